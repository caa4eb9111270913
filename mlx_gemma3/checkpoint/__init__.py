"""From a name to a model: local files, the Hub, GGUF; weights under the model's names; how much memory they need."""

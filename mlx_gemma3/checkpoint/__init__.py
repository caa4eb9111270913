"""From a name to a model: local files, tensors under the model's names, the loaded Gemma 3."""

"""What an embedding model does around its decoder: prompts and special tokens before it, pooling and matrices after it.

Frozen data with its bounds; read from files by checkpoint/sentence.py (folders) and gguf_config.py (GGUF).

Source: sentence-transformers 6.2 (its modules Transformer, Pooling, Dense, Normalize); EmbeddingGemma's model card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import ConfigError

# EmbeddingGemma's own prompts by name. The last two stand on its model card only.
PROMPTS: Mapping[str, str] = {
    "query": "task: search result | query: ",
    "document": "title: none | text: ",
    "BitextMining": "task: search result | query: ",
    "Clustering": "task: clustering | query: ",
    "Classification": "task: classification | query: ",
    "InstructionRetrieval": "task: code retrieval | query: ",
    "MultilabelClassification": "task: classification | query: ",
    "PairClassification": "task: sentence similarity | query: ",
    "Reranking": "task: search result | query: ",
    "Retrieval": "task: search result | query: ",
    "Retrieval-query": "task: search result | query: ",
    "Retrieval-document": "title: none | text: ",
    "STS": "task: sentence similarity | query: ",
    "Summarization": "task: summarization | query: ",
    "question answering": "task: question answering | query: ",
    "fact checking": "task: fact checking | query: ",
}
ACTIVATIONS = ("identity", "tanh", "relu", "gelu", "sigmoid")
_MOST_DENSE, _MOST_WIDTH = 16, 1 << 16


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """One matrix after pooling: activation(x @ weightᵀ + bias)."""

    inputs: int
    outputs: int
    bias: bool = False
    activation: str = "identity"  # one of ACTIVATIONS
    folder: str = field(default="", compare=False)  # of its own weights file; "" where they are with the others

    def __post_init__(self) -> None:
        for name, value in (("in_features", self.inputs), ("out_features", self.outputs)):
            if not 1 <= value <= _MOST_WIDTH:
                raise ConfigError(f"Dense {name}", got=value, want=f"1 to {_MOST_WIDTH:,}")
        if self.activation not in ACTIVATIONS:
            raise ConfigError("Dense activation_function", got=self.activation, want=", ".join(ACTIVATIONS))


@dataclass(frozen=True, kw_only=True)
class EmbedderConfig:
    """From a text to a vector: prefix + prompt + text + suffix → decoder → mean → dense → length 1."""

    hidden_size: int
    max_length: int  # tokens of a text with all that stands around it; more are cut, the suffix stays
    dense: tuple[DenseConfig, ...] = ()
    normalize: bool = True  # the vector is brought to length 1 after the last matrix
    include_prompt: bool = True  # the prompt's tokens, and what stands before it, count in the mean
    prefix: tuple[int, ...] = ()  # token ids before a text: <bos>
    suffix: tuple[int, ...] = ()  # and after it: <eos>
    prompts: Mapping[str, str] = field(default_factory=dict, hash=False)
    default_prompt: str | None = None  # the name of the one that is used where none is asked for

    @property
    def dimensions(self) -> int:
        """Numbers of a vector."""
        return self.dense[-1].outputs if self.dense else self.hidden_size

    def __post_init__(self) -> None:
        if len(self.dense) > _MOST_DENSE:
            raise ConfigError("Dense modules", got=len(self.dense), want=f"at most {_MOST_DENSE}")
        width = self.hidden_size
        for number, one in enumerate(self.dense):
            if one.inputs != width:
                raise ConfigError(f"Dense module {number + 1}: in_features", got=one.inputs, want=width)
            width = one.outputs
        least = len(self.prefix) + len(self.suffix) + 1
        if self.max_length < least:
            raise ConfigError("max_seq_length", got=self.max_length, want=f">= {least}")
        if self.default_prompt is not None and self.default_prompt not in self.prompts:
            raise ConfigError(
                "default_prompt_name", got=repr(self.default_prompt), want=f"one of {', '.join(self.prompts) or 'none'}"
            )

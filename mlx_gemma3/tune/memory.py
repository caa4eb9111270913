"""What a training will need in memory, before it starts, and what would fit.

    total = weights + learning + kept + working + overhead

learning: the adapter's numbers, their gradients and AdamW's two moments. kept: what the way back needs of each token
and layer, or with checkpointing a layer's input. working: one layer at its widest, a slice of logits with its slopes.
Formulas on the upper side of peaks measured on the CPU (docs/tune.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..checkpoint.memory import GIB, OVERHEAD, Machine
from ..config import Config
from ..errors import MemoryNeedError
from .forward import SLICE

LIBRARIES = 128 << 20  # mlx-lm brings transformers


@dataclass(frozen=True)
class Need:
    """Bytes."""

    weights: int
    learning: int
    kept: int
    working: int
    overhead: int = OVERHEAD + LIBRARIES

    @property
    def total(self) -> int:
        return self.weights + self.learning + self.kept + self.working + self.overhead


def need(
    config: Config,
    *,
    weights: int,
    learnt: int,
    lengths: Sequence[int],
    counted: int,
    checkpointing: bool,
    pictures: int = 0,
    dtype_bytes: int = 4,
) -> Need:
    """
    Args:
        weights: bytes of the model as it is held.
        learnt: numbers of the adapter.
        lengths: tokens of the sequences of the largest batch.
        counted: of their tokens those that count.
        pictures: that go through a tower which learns.
    """
    text = config.text
    tokens, longest = sum(lengths), max(lengths, default=0)
    heads = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    # A layer keeps its inputs of products, norms and GEGLU: about 6 rows of D, 5 of heads, 4 of keys, 3 of I; 4 bytes.
    inner = 4 * (6 * text.hidden_size + 5 * heads + 4 * keys + 3 * text.intermediate_size)
    layers = text.num_hidden_layers
    kept = tokens * (layers * text.hidden_size * dtype_bytes + inner if checkpointing else layers * inner)
    scores = 3 * 4 * text.num_attention_heads * longest * longest
    working = scores + 3 * tokens * inner // 2 + 3 * 4 * min(SLICE, max(counted, 1) * text.vocab_size)
    working += 2 * 4 * counted * text.hidden_size
    if pictures and config.vision is not None:
        vision = config.vision
        row = 4 * (12 * vision.hidden_size + 3 * vision.intermediate_size)
        kept += pictures * vision.num_hidden_layers * vision.grid**2 * row
        working += 3 * 4 * vision.num_attention_heads * vision.grid**4
    return Need(weights, 4 * 4 * learnt, kept, working)


def check(found: Need, machine: Machine, cheaper: Sequence[tuple[str, Need]]) -> None:
    """
    Args:
        cheaper: other settings in words, and what they would need; the first that fits is named.

    Raises:
        MemoryNeedError: it does not fit into the machine.
    """
    if found.total <= machine.budget:
        return
    fits = next((words for words, other in cheaper if other.total <= machine.budget), "")
    raise MemoryNeedError(
        "training",
        got=f"about {found.total / GIB:.1f} GiB",
        want=f"at most {machine.budget / GIB:.1f} GiB ({machine.rule})",
        do=f"this would fit: {fits}" if fits else "take a smaller model, or one in 4 bits",
    )


def halved(found: Need) -> Need:
    """About what half the tokens need: scores go with their square, so this is on the upper side."""
    return replace(found, kept=found.kept // 2, working=found.working // 2)

"""A model over several machines: which part of it each of them holds, and how their parts become one result.

    q, k, v    by heads: a machine has some query heads, and the key-value heads that these read
    gate, up   by rows: some of the inner numbers
    o, down    by columns: those that multiply what this machine has; the results of all are added up
    embedding, head    by rows of the vocabulary, where they divide: rows are added up, logits put side by side
    norms      whole, everywhere
    tower      on the first machine; the others are sent the rows of its pictures

Every machine has the same residual stream, so a layer needs two sums (Megatron-LM, arXiv 1909.08053, section 3). Where
there are fewer key-value heads than machines, those that need the same one hold it each. Groups of packed matrices are
never cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from ..config import Config, TextConfig
from ..errors import OptionError

MOST = 16  # machines

_ROWS = frozenset(("q_proj", "gate_proj", "up_proj"))
_KV_ROWS = frozenset(("k_proj", "v_proj"))
_COLUMNS = frozenset(("o_proj", "down_proj"))
_VOCABULARY = frozenset(("embed_tokens", "lm_head"))
_PARTS = frozenset(("weight", "scales", "biases"))

Cut = tuple[int, slice]  # an axis, and what of it


class Group(Protocol):
    """The machines, as one of them sees them. All make the same calls in the same order."""

    def all_sum(self, x: mx.array) -> mx.array:
        """The sum of every machine's x, of its shape and dtype."""

    def all_gather(self, x: mx.array) -> mx.array:
        """Every machine's x (n, …), one behind another: (machines * n, …)."""


@dataclass(frozen=True, eq=False)
class Shard:
    """The part of a model that one machine holds."""

    rank: int = 0
    size: int = 1
    group: Group | None = None  # None for a machine alone

    # --- sizes

    def heads(self, config: TextConfig) -> int:
        """Query heads of this machine."""
        return config.num_attention_heads // self.size

    def kv_range(self, config: TextConfig) -> range:
        """Its key-value heads."""
        heads, together = self.heads(config), config.num_attention_heads // config.num_key_value_heads
        first = self.rank * heads
        return range(first // together, (first + heads - 1) // together + 1)

    def cuts_vocabulary(self, config: TextConfig) -> bool:
        """Whether the embedding, and a head of its own, are cut."""
        return self.size > 1 and config.vocab_size % self.size == 0

    def vocabulary(self, config: TextConfig) -> range:
        """The ids whose rows it holds."""
        if not self.cuts_vocabulary(config):
            return range(config.vocab_size)
        count = config.vocab_size // self.size
        return range(self.rank * count, (self.rank + 1) * count)

    def cut(self, name: str, shape: tuple[int, ...], config: TextConfig) -> Cut | None:
        """What this machine holds of a parameter, or of a packed one's weight, scales or biases; None for all of it.

        Args:
            name: canonical, as "language_model.layers.0.self_attn.q_proj.weight".
            shape: of the whole.

        Raises:
            OptionError: groups of a packed matrix would be cut.
        """
        module, _, part = name.rpartition(".")
        place, _, kind = module.rpartition(".")
        if self.size == 1 or part not in _PARTS or not (place.startswith("language_model") or kind == "lm_head"):
            return None
        if kind in _VOCABULARY:
            return (0, _slice(self.vocabulary(config))) if self.cuts_vocabulary(config) else None
        if kind in _KV_ROWS:
            kv, rows = self.kv_range(config), shape[0] // config.num_key_value_heads
            return 0, slice(kv.start * rows, kv.stop * rows)
        if kind not in _ROWS | _COLUMNS:
            return None
        axis = 0 if kind in _ROWS else 1
        count, left = divmod(shape[axis], self.size)
        if left:
            raise OptionError(
                "machines",
                got=self.size,
                want=f"a number that divides the {shape[axis]} columns of {name}",
                do="take fewer machines, or convert it with a smaller --group-size",
            )
        return axis, slice(self.rank * count, (self.rank + 1) * count)

    def own(self, name: str, tensor: mx.array, config: TextConfig) -> mx.array:
        """Of a parameter in memory what this machine holds; raises as `cut`."""
        cut = self.cut(name, tensor.shape, config)
        if cut is None:
            return tensor
        axis, part = cut
        return mx.contiguous(tensor[part] if axis == 0 else tensor[:, part])

    # --- what machines do together

    def sum(self, x: mx.array) -> mx.array:
        """The sum of all machines' x."""
        return x if self.group is None else self.group.all_sum(x)

    def embed(self, embedding: nn.Module, tokens: mx.array, config: TextConfig, dtype: mx.Dtype) -> mx.array:
        """(…) ids → (…, D) rows of the whole embedding, in dtype. Each row is on one machine, so nothing is rounded."""
        if not self.cuts_vocabulary(config):
            return embedding(tokens).astype(dtype)
        here = tokens - self.vocabulary(config).start
        own = (here >= 0) & (here < len(self.vocabulary(config)))
        rows = embedding(mx.where(own, here, 0)).astype(dtype)
        return self.sum(mx.where(own[..., None], rows, mx.array(0, dtype)))

    def logits(self, x: mx.array, config: TextConfig) -> mx.array:
        """(…, rows of this machine) → (…, V)"""
        if self.group is None or not self.cuts_vocabulary(config):
            return x
        return self.joined(x, -1)

    def joined(self, x: mx.array, axis: int) -> mx.array:
        """Every machine's x side by side along an axis."""
        return mx.concatenate(self.each(x), axis=axis)

    def each(self, x: mx.array) -> list[mx.array]:
        """Every machine's x, of one shape, in the order of the machines."""
        assert self.group is not None
        return [part[0] for part in mx.split(self.group.all_gather(x[None]), self.size)]

    def from_first(self, x: mx.array | None, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """The first machine's x on all; the others say its shape and dtype."""
        return self.sum(mx.zeros(shape, dtype) if x is None else x)

    # --- keys and values, (B, K, rows, …)

    def all_heads(self, x: mx.array, config: TextConfig) -> mx.array:
        """Keys or values of this machine's heads → of all heads, each once."""
        apart = max(1, self.size // config.num_key_value_heads)  # machines that hold the same head
        return mx.concatenate(self.each(x)[::apart], axis=1)

    def own_heads(self, x: mx.array, config: TextConfig) -> mx.array:
        """Keys or values of all heads → of this machine's."""
        return x[:, _slice(self.kv_range(config))]


WHOLE = Shard()


def fitting_machines(config: Config) -> list[int]:
    """The numbers of machines that a model divides among."""
    return [count for count in range(1, MOST + 1) if _divides(config.text, count)]


def check_machines(config: Config, count: int) -> None:
    """Refuse a number of machines that the model does not divide among. Raises OptionError."""
    if not _divides(config.text, count):
        text, numbers = config.text, fitting_machines(config)
        raise OptionError(
            "machines",
            got=count,
            want=" or ".join(map(str, numbers)),
            do=f"the model has {text.num_attention_heads} query heads, {text.num_key_value_heads} key-value heads and "
            f"{text.intermediate_size} inner numbers to divide",
        )


def _divides(text: TextConfig, count: int) -> bool:
    heads, kv = text.num_attention_heads, text.num_key_value_heads
    return not (heads % count or text.intermediate_size % count or (kv % count and count % kv))


def _slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)

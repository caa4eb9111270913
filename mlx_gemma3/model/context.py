"""Where the tokens of one forward pass stand, and what each may attend to: the only door between layers and caches.

A chunk is a stretch of tokens (B, L) on one set of caches, or on none. A step is a token, or a few, for each of several
sequences, each on its own caches: matrices take all of them together, attention goes sequence by sequence, so nothing
is padded, and sequences join and leave from one step to the next. Texts of an embedding model and the sequences that a
model is trained on go the same way: all their tokens are rows of one product, and each attends to itself alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Protocol

import mlx.core as mx
import numpy as np

from .cache import Caches, Rows, keys_and_values
from .masks import attention_mask, two_sided_mask

Attend = Callable[..., mx.array]  # attention.attend


class Rule(Protocol):
    """What a layer's attention is: its place, its scale, its window."""

    layer: int
    scale: float
    window: int | None


class Context(Protocol):
    """What a layer needs of the tokens it is given."""

    positions: mx.array  # of the first token of each sequence: () or (B,)

    def attend(self, q: mx.array, k: mx.array, v: mx.array, rule: Rule, attend: Attend) -> mx.array:
        """Put keys and values (B, K, L, D) into the cache; what queries (B, H, L or 1, D) find there, of their shape.

        With a single query for several keys it is the last one.
        """


class Chunk:
    """L tokens of each sequence, on one set of caches."""

    def __init__(
        self,
        length: int,
        caches: Caches | None,
        blocks: mx.array | None = None,
        padding: tuple[int, ...] | None = None,
    ) -> None:
        """
        Args:
            blocks: (B, L) int, 0 for text, n for the tokens of the n-th image block.
            padding: leading pad tokens of each sequence.
        """
        self.length, self.caches, self.blocks = length, caches, blocks
        self.offset = caches.offset if caches is not None else 0
        self.padding = mx.array(padding) if padding is not None else None
        # The first real token of a padded sequence stands at position 0.
        self.positions = mx.array(self.offset) if self.padding is None else self.offset - self.padding
        self._masks: dict[int | None, mx.array | str | None] = {}

    def attend(self, q: mx.array, k: mx.array, v: mx.array, rule: Rule, attend: Attend) -> mx.array:
        keys: Rows = (k,)
        values: Rows = (v,)
        bits = 16
        if self.caches is not None:
            cache = self.caches[rule.layer]
            bits = cache.bits
            keys, values = keys_and_values(cache.append(mx.concatenate([k, v], axis=1)))
        mask = self._mask(keys[0].shape[2], rule.window)
        if q.shape[2] < k.shape[2]:  # the last of these queries: in a triangle it sees all
            mask = None if mask is None or isinstance(mask, str) else mask[:, :, -1:]
        return attend(q, keys, values, scale=rule.scale, mask=mask, bits=bits)

    def _mask(self, key_count: int, window: int | None) -> mx.array | str | None:
        """One mask for all global layers and one for all local ones: layers of a kind hold as many keys."""
        if window not in self._masks:
            self._masks[window] = attention_mask(
                self.length, self.offset, key_count, window=window, blocks=self.blocks, padding=self.padding
            )
        return self._masks[window]


class Step:
    """The next tokens of each sequence, each on its own caches: one of each, or `counts`, one behind another.

    Every token is a row of its own, (T, 1, D). For a single one there is no mask: a local cache returns no more than
    the window.
    """

    def __init__(self, rows: Sequence[Caches], counts: Sequence[int] | None = None) -> None:
        self.rows, self.counts = rows, counts if counts is not None and max(counts) > 1 else None
        self._offsets = [caches.offset for caches in rows]
        self._masks: dict[tuple[int, int | None], mx.array | str | None] = {}
        if self.counts is None:
            self.positions = mx.array(self._offsets)
            return
        places = [range(offset, offset + count) for offset, count in zip(self._offsets, self.counts, strict=True)]
        self.positions = mx.array([place for those in places for place in those])

    def attend(self, q: mx.array, k: mx.array, v: mx.array, rule: Rule, attend: Attend) -> mx.array:
        both = mx.concatenate([k, v], axis=1)  # (T, 2 K, 1, D)
        if self.counts is not None:
            return self._several(q, both, rule, attend, self.counts)
        if len(self.rows) == 1:
            return self._row(self.rows[0], q, both, rule, attend)
        found = [
            self._row(caches, q[row : row + 1], both[row : row + 1], rule, attend)
            for row, caches in enumerate(self.rows)
        ]
        return mx.concatenate(found)

    def _several(
        self, q: mx.array, both: mx.array, rule: Rule, attend: Attend, counts: Sequence[int]
    ) -> mx.array:  # (T, H, 1, D)
        found, start = [], 0
        for row, (caches, count) in enumerate(zip(self.rows, counts, strict=True)):
            cache, some = caches[rule.layer], slice(start, start + count)
            keys, values = keys_and_values(cache.append(both[some].transpose(2, 1, 0, 3)))
            mask = self._mask(row, count, keys[0].shape[2], rule.window)
            mine = attend(q[some].transpose(2, 1, 0, 3), keys, values, scale=rule.scale, mask=mask, bits=cache.bits)
            found.append(mine.transpose(2, 1, 0, 3))
            start += count
        return found[0] if len(found) == 1 else mx.concatenate(found)

    def _mask(self, row: int, count: int, key_count: int, window: int | None) -> mx.array | str | None:
        """The same in all layers of a kind."""
        if (row, window) not in self._masks:
            self._masks[row, window] = attention_mask(count, self._offsets[row], key_count, window=window)
        return self._masks[row, window]

    @staticmethod
    def _row(caches: Caches, q: mx.array, both: mx.array, rule: Rule, attend: Attend) -> mx.array:
        cache = caches[rule.layer]
        keys, values = keys_and_values(cache.append(both))
        return attend(q, keys, values, scale=rule.scale, mask=None, bits=cache.bits)


class _Runs:
    """Sequences one behind another, each token a row: (T, 1, D). Neighbours of one length are a run, never padded."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """lengths: tokens of each sequence, T together; fastest when those of one length are neighbours."""
        self.positions = mx.array(np.concatenate([np.arange(length) for length in lengths]))  # (T,)
        self._runs = [(length, len(list(same))) for length, same in groupby(lengths)]

    def attend(self, q: mx.array, k: mx.array, v: mx.array, rule: Rule, attend: Attend) -> mx.array:
        found, start = [], 0
        for length, count in self._runs:
            stop = start + length * count
            qs, ks, vs = (
                x[start:stop].reshape(count, length, -1, x.shape[-1]).transpose(0, 2, 1, 3)  # (count, heads, L, D)
                for x in (q, k, v)
            )
            out = self._within(start, qs, ks, vs, rule, attend)
            found.append(out.transpose(0, 2, 1, 3).reshape(stop - start, -1, 1, out.shape[-1]))
            start = stop
        return found[0] if len(found) == 1 else mx.concatenate(found)

    def _within(self, start: int, q: mx.array, k: mx.array, v: mx.array, rule: Rule, attend: Attend) -> mx.array:
        """The run that begins at row `start`: (count, H, L, D), (count, K, L, D) twice → (count, H, L, D)."""
        raise NotImplementedError


class Texts(_Runs):
    """Whole texts of an embedding model, one behind another, each token a row: (T, 1, D). No caches, no causality.

    Neighbours of one length attend in one call. A long text goes through a local layer some queries at a time, each
    with the keys that any of them sees.
    """

    SHORTEST_BLOCK = 64  # queries

    def __init__(self, lengths: Sequence[int]) -> None:
        """See _Runs."""
        super().__init__(lengths)
        self._masks: dict[tuple[int, ...], mx.array | None] = {}

    def _within(self, start: int, q: mx.array, k: mx.array, v: mx.array, rule: Rule, attend: Attend) -> mx.array:
        length, window = q.shape[2], rule.window
        if window is None or length <= window:
            return attend(q, (k,), (v,), scale=rule.scale, mask=None)
        step, blocks = max(window, self.SHORTEST_BLOCK), []
        for begin in range(0, length, step):
            stop = min(begin + step, length)
            first, last = max(0, begin - window + 1), min(length, stop + window - 1)
            mask = self._mask(stop - begin, begin - first, last - first, window)
            keys, values = k[:, :, first:last], v[:, :, first:last]
            blocks.append(attend(q[:, :, begin:stop], (keys,), (values,), scale=rule.scale, mask=mask))
        return mx.concatenate(blocks, axis=2)

    def _mask(self, queries: int, before: int, keys: int, window: int) -> mx.array | None:
        """Of `queries` queries, `before` keys before the first of them, `keys` keys. The same in all layers."""
        name = (queries, before, keys, window)
        if name not in self._masks:
            self._masks[name] = two_sided_mask(range(before, before + queries), range(keys), window)
        return self._masks[name]


class Sequences(_Runs):
    """Whole sequences one behind another, each token a row: (T, 1, D). No caches; each attends to itself by the rule.

    What training reads: nothing is padded, whatever the lengths. Neighbours of one length attend in one call.
    """

    def __init__(self, lengths: Sequence[int], blocks: mx.array | None = None) -> None:
        """
        Args:
            lengths: tokens of each sequence, T together; fastest when those of one length are neighbours.
            blocks: (T,) int, 0 for text, n for the tokens of the n-th image block of all; None where there is none.
        """
        super().__init__(lengths)
        self._blocks = blocks
        self._masks: dict[tuple[int, int | None], mx.array | str | None] = {}

    def _within(self, start: int, q: mx.array, k: mx.array, v: mx.array, rule: Rule, attend: Attend) -> mx.array:
        mask = self._mask(start, q.shape[0], q.shape[2], rule.window)
        return attend(q, (k,), (v,), scale=rule.scale, mask=mask)

    def _mask(self, start: int, count: int, length: int, window: int | None) -> mx.array | str | None:
        """Of the run of sequences that begins at row `start`: the same in all layers of a kind."""
        name = (start, None if window is not None and length <= window else window)
        if name not in self._masks:
            blocks = None
            if self._blocks is not None:
                blocks = self._blocks[start : start + count * length].reshape(count, length)
            self._masks[name] = attention_mask(length, 0, length, window=window, blocks=blocks)
        return self._masks[name]

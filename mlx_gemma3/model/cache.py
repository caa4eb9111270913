"""Keys and values of the tokens already read, one cache a layer; how far back they can go, and copies to go back to.

A global layer keeps all of them, in a buffer that grows in steps. A local layer never looks back more than W - 1 keys,
so its buffer has a fixed size: the window and some slack, filled from the left; when it is full the newest move to its
front. Keys stay in order of position, so a mask never has to know where the buffer starts.

Keys and values of a layer share one buffer, side by side on the axis of the heads: one write a layer for each token.
Rows are stored as they are, or packed in 8 or 4 bits with groups of 64 (`kv_bits`). Writes are in place: MLX reuses a
buffer that nobody else holds. A snapshot or a fork holds references, so the first write after it copies, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..config import Config
from ..errors import OptionError

STEP = 256  # tokens by which a global buffer grows
SLACK = 128  # tokens that a local layer can always go back, and as many again before its rows move
KV_BITS = (16, 8, 4)
KV_GROUP = 64

Extent = tuple[int, tuple[int, ...]]  # tokens read, and the rows that each local layer holds of them
Rows = tuple[mx.array, ...]  # (B, heads, S, D) alone, or packed: weight, scales, biases of (B, heads, S, …)


class LayerCache:
    """Keys and values of one layer, with room for more: (B, 2 K, capacity, …), the K heads of keys first."""

    filled: int  # tokens in the buffer
    window: int | None = None

    def __init__(self, bits: int = 16) -> None:
        self.bits = bits
        self.offset = 0  # tokens seen
        self.parts: list[mx.array] = []

    def append(self, keys_values: mx.array) -> Rows:
        """Add (B, 2 K, L, D) and return what these L queries can reach, the newest last."""
        raise NotImplementedError

    def reaches(self, position: int) -> bool:
        raise NotImplementedError

    def rewind(self, position: int) -> None:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def rows(self) -> Rows:
        """What is in the buffer, `filled` rows."""
        return self._view(0, self.filled)

    def hold(self) -> Rows:
        """References to the whole buffer that later writes do not reach: a write changes the object it is made on."""
        return tuple(part[...] for part in self.parts)

    def reserve(self, like: Rows, count: int) -> None:
        """Make room for `count` rows in all, each as `like`."""
        have = self.parts[0].shape[2] if self.parts else 0
        if count > have:
            rooms = [mx.zeros((*part.shape[:2], count - have, part.shape[3]), dtype=part.dtype) for part in like]
            pairs = zip(self.parts, rooms, strict=True)
            self.parts = [mx.concatenate(list(pair), axis=2) for pair in pairs] if have else rooms

    def _pack(self, x: mx.array) -> Rows:
        return (x,) if self.bits == 16 else tuple(mx.quantize(x, group_size=KV_GROUP, bits=self.bits))

    def _write(self, start: int, stop: int, rows: Rows) -> None:
        if self.bits == 16:  # called once a layer for each token
            self.parts[0][:, :, start:stop] = rows[0]
            return
        for part, new in zip(self.parts, rows, strict=True):
            part[:, :, start:stop] = new

    def _view(self, start: int, stop: int) -> Rows:
        if self.bits == 16:
            return (self.parts[0][:, :, start:stop],) if self.parts else ()
        return tuple(part[:, :, start:stop] for part in self.parts)

    def take(self, offset: int, filled: int, rows: Rows) -> None:
        """Become what `hold` or `rows` of such a layer returned."""
        self.offset, self.parts = offset, [part[...] for part in rows]


class GlobalCache(LayerCache):
    """All keys and values."""

    expected = 0  # tokens that are to come in all, as far as is known

    @property
    def filled(self) -> int:  # type: ignore[override]
        return self.offset

    def append(self, keys_values: mx.array) -> Rows:
        start, stop = self.offset, self.offset + keys_values.shape[2]
        self.offset = stop
        rows = self._pack(keys_values)
        if not self.parts or stop > self.parts[0].shape[2]:
            self.reserve(rows, -(-max(stop, self.expected) // STEP) * STEP)
        self._write(start, stop, rows)
        return self._view(0, stop)

    def reaches(self, position: int) -> bool:
        return position <= self.offset

    def rewind(self, position: int) -> None:
        self.offset = position


class WindowCache(LayerCache):
    """The last W - 1 keys and values and some slack, in a buffer of fixed size."""

    window: int

    def __init__(self, window: int, bits: int = 16) -> None:
        super().__init__(bits)
        self.window = window
        self.slack = min(window, SLACK)
        self.capacity = window - 1 + 2 * self.slack
        self.filled = 0

    def append(self, keys_values: mx.array) -> Rows:
        length, before = keys_values.shape[2], self.filled
        reach, stop = max(0, before - (self.window - 1)), before + length
        self.offset += length
        self.filled = stop if stop <= self.capacity else min(self.window - 1 + self.slack, stop)
        rows = self._pack(keys_values)
        self.reserve(rows, self.capacity)
        if stop <= self.capacity:
            self._write(before, stop, rows)
            return self._view(reach, stop)
        held = self._view(0, before)
        rows = tuple(mx.concatenate(list(pair), axis=2) for pair in zip(held, rows, strict=True))
        self._write(0, self.filled, tuple(part[:, :, -self.filled :] for part in rows))
        return tuple(part[:, :, reach:] for part in rows)

    def reaches(self, position: int) -> bool:
        first = self.offset - self.filled  # position of the oldest row held
        return position <= self.offset and (position == 0 or first == 0 or position - (self.window - 1) >= first)

    def rewind(self, position: int) -> None:
        self.filled = max(0, self.filled - (self.offset - position))  # below 0 only where nothing is kept: position 0
        self.offset = position

    def take(self, offset: int, filled: int, rows: Rows) -> None:
        super().take(offset, filled, rows)
        self.filled = filled


def keys_and_values(rows: Rows) -> tuple[Rows, Rows]:
    """(B, 2 K, S, …) as keys and values, (B, K, S, …) each."""
    heads = rows[0].shape[1] // 2
    if len(rows) == 1:
        return (rows[0][:, :heads],), (rows[0][:, heads:],)
    return tuple(part[:, :heads] for part in rows), tuple(part[:, heads:] for part in rows)


@dataclass(frozen=True)
class Snapshot:
    """The local layers at one position, by reference, and the logits after it. Global layers need none."""

    position: int
    layers: tuple[tuple[int, Rows] | None, ...]  # (filled, buffer); None for a global layer
    logits: mx.array | None  # (1, V) after `position` tokens

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.layers if layer for part in layer[1])

    @property
    def extent(self) -> Extent:
        return self.position, tuple(layer[0] for layer in self.layers if layer)


class Caches:
    """One cache a layer, and what they share: how many tokens were read, how rows are padded, where one can go back."""

    def __init__(
        self, config: Config, *, padding: Sequence[int] | None = None, kv_bits: int = 16, local_kv_bits: int = 16
    ) -> None:
        text = config.text
        for name, bits in (("kv_bits", kv_bits), ("local_kv_bits", local_kv_bits)):
            if bits not in KV_BITS:
                raise OptionError(name, got=bits, want=", ".join(map(str, KV_BITS)))
            if bits != 16 and text.head_dim % KV_GROUP:
                raise OptionError(
                    name, got=bits, want=f"16, since head_dim {text.head_dim} is no multiple of {KV_GROUP}"
                )
        self.layers: list[LayerCache] = [
            GlobalCache(kv_bits) if text.is_global(layer) else WindowCache(text.sliding_window, local_kv_bits)
            for layer in range(text.num_hidden_layers)
        ]
        self.padding = check_padding(padding)
        self.adapter: str | None = None  # what keys and values are computed with: its name in the runner
        self.ends_in_image = False  # the last token read was an image token: its block may not go on in a later call
        self.snapshots: list[Snapshot] = []  # by position
        self.unsettled: mx.array | None = None  # what a chunk that is being computed ends in: generation/prefill.py

    def expect(self, tokens: int) -> None:
        """Make the next room for so many tokens in all: growing by STEP copies everything each time."""
        for layer in self.layers:
            if isinstance(layer, GlobalCache):
                layer.expected = tokens

    @property
    def offset(self) -> int:
        """Tokens read so far, padding counted."""
        return self.layers[0].offset

    @property
    def arrays(self) -> list[mx.array]:
        """Every buffer, to be evaluated together at the end of a prefill chunk."""
        return [part for layer in self.layers for part in layer.parts]

    @property
    def nbytes(self) -> int:
        """Of the buffers, without the snapshots."""
        return sum(layer.nbytes for layer in self.layers)

    def fork(self) -> Caches:
        """The same once more, by reference: whichever of the two writes first copies what it writes to."""
        other = object.__new__(type(self))
        other.layers = []
        for layer in self.layers:
            twin: Any = WindowCache(layer.window, layer.bits) if layer.window is not None else GlobalCache(layer.bits)
            twin.take(layer.offset, layer.filled, layer.hold())
            other.layers.append(twin)
        other.padding, other.adapter, other.ends_in_image = self.padding, self.adapter, self.ends_in_image
        other.snapshots, other.unsettled = list(self.snapshots), self.unsettled
        return other

    def take_snapshot(self, logits: mx.array | None = None, *, budget: int) -> None:
        """Remember this position. The oldest snapshots are dropped until all of them fit into `budget` bytes."""
        if logits is None and any(old.position == self.offset for old in self.snapshots):
            return
        layers = tuple((layer.filled, layer.hold()) if layer.window is not None else None for layer in self.layers)
        self.snapshots = [old for old in self.snapshots if old.position != self.offset]
        mx.eval([part for layer in layers if layer for part in layer[1]])
        self.snapshots.append(Snapshot(self.offset, layers, logits))
        total = sum(snapshot.nbytes for snapshot in self.snapshots)
        while total > budget and self.snapshots:
            total -= self.snapshots.pop(0).nbytes

    def reach(self, position: int) -> int:
        """The last position up to `position` to which `rewind` can go with nothing lost."""
        return reach(position, [*(snapshot.extent for snapshot in self.snapshots), self.extent], self.window)

    def rewind(self, position: int) -> mx.array | None:
        """Go back to a position that `reach` returned; returns the logits after it where a snapshot knows them."""
        assert self.reach(position) == position, (position, self.offset)
        known = next((snapshot for snapshot in self.snapshots if snapshot.position == position), None)
        if not all(layer.reaches(position) for layer in self.layers):
            source = next(
                snapshot for snapshot in self.snapshots if reach(position, [snapshot.extent], self.window) == position
            )
            for layer, held in zip(self.layers, source.layers, strict=True):
                if held is not None:
                    layer.take(source.position, *held)
        for layer in self.layers:
            layer.rewind(position)
        self.snapshots = [snapshot for snapshot in self.snapshots if snapshot.position <= position]
        self.ends_in_image = False
        return known.logits if known is not None else None

    @property
    def slack(self) -> int:
        """How many tokens, of those that one call read last, `take_back` can always take back."""
        return min((layer.slack for layer in self.layers if isinstance(layer, WindowCache)), default=SLACK)

    def take_back(self, count: int) -> None:
        """Forget the last `count` tokens, at most `slack`, of those that one call read: nothing else is lost with them.

        A local layer holds W - 1 rows before every call, if so many were read, and W - 1 + slack after its rows moved.
        """
        position = self.offset - count
        for layer in self.layers:
            assert layer.reaches(position), (position, layer.offset, layer.filled)
            layer.rewind(position)

    @property
    def extent(self) -> Extent:
        """What the local layers hold now."""
        return self.offset, tuple(layer.filled for layer in self.layers if layer.window is not None)

    @property
    def window(self) -> int:
        """Of the local layers; 1 where there are none."""
        return next((layer.window for layer in self.layers if layer.window is not None), 1)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self.layers)


def reach(position: int, extents: Iterable[Extent], window: int) -> int:
    """The last position up to `position` to which caches that were held to these extents can go with nothing lost.

    An extent is the present or a snapshot: for each local layer the rows from `first` to `end`, without a gap. Going
    back to q <= end is exact when all that later queries can see is there. A query at p >= q sees, of the rows before
    q, those from p - W + 1 on, at the earliest q - W + 1. So a local layer needs the rows q - W + 1 to q - 1 that
    exist: first = 0, or q - (W - 1) >= first. A global layer needs rows 0 to q - 1: it is only ever written at its end,
    and `Caches.rewind` drops the snapshots beyond q, so what lies before a snapshot's position is what lay there when
    it was taken. A row never depends on rows after it, but for image tokens, whose block must be read whole: q must not
    lie inside one, and that is the caller's part.
    """
    best = 0
    for end, filled in extents:
        q = min(position, end)
        if all(rows == end or q - (window - 1) >= end - rows for rows in filled):
            best = max(best, q)
    return best


def check_padding(padding: Sequence[int] | None) -> tuple[int, ...] | None:
    """Leading pad tokens of each row, or None when there are none at all."""
    if padding is None or not any(padding):
        return None
    if any(count < 0 for count in padding):
        raise OptionError("padding", got=list(padding), want="counts >= 0, one a row")
    return tuple(padding)

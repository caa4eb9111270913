"""Keys and values of the tokens already read, one cache a layer; how far back they can go, and copies to go back to.

A global layer keeps all of them, in a buffer that grows in steps. A local layer never looks back more than W - 1 keys,
so its buffer has a fixed size: the window and some slack, filled from the left; when it is full the newest move to its
front. Keys stay in order of position, so a mask never has to know where the buffer starts.

Rows are stored as they are, or packed in 8 or 4 bits with groups of 64 (`kv_bits`). Updates write in place: MLX reuses
a buffer that nobody else holds. A snapshot holds references, so the first update after it copies, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..config import Config
from ..errors import OptionError

STEP = 256  # tokens by which a global buffer grows
SLACK = 128  # tokens that a local layer can always go back, and as many again before its rows move
KV_BITS = (16, 8, 4)
KV_GROUP = 64

Rows = tuple[mx.array, ...]  # (B, K, S, D) alone, or packed: weight, scales, biases of (B, K, S, …)


class Buffer:
    """Keys or values of one layer, with room for more."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.parts: list[mx.array] = []

    def pack(self, x: mx.array) -> Rows:
        return (x,) if self.bits == 16 else tuple(mx.quantize(x, group_size=KV_GROUP, bits=self.bits))

    def make_room(self, like: Rows, count: int) -> None:
        """Grow to `count` rows."""
        have = self.parts[0].shape[2] if self.parts else 0
        if count > have:
            rooms = [mx.zeros((*part.shape[:2], count - have, part.shape[3]), dtype=part.dtype) for part in like]
            pairs = zip(self.parts, rooms, strict=True)
            self.parts = [mx.concatenate(list(pair), axis=2) for pair in pairs] if have else rooms

    def write(self, start: int, stop: int, rows: Rows) -> None:
        if self.bits == 16:  # both are called twice a layer for each token
            self.parts[0][:, :, start:stop] = rows[0]
            return
        for part, new in zip(self.parts, rows, strict=True):
            part[:, :, start:stop] = new

    def view(self, start: int, stop: int) -> Rows:
        if self.bits == 16:
            return (self.parts[0][:, :, start:stop],)
        return tuple(part[:, :, start:stop] for part in self.parts)

    def hold(self) -> Rows:
        """References that later writes do not reach: a write changes the array object that it is made on."""
        return tuple(part[...] for part in self.parts)


class GlobalCache:
    """All keys and values."""

    def __init__(self, bits: int = 16) -> None:
        self.offset = 0  # tokens seen
        self.keys, self.values = Buffer(bits), Buffer(bits)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Rows, Rows]:
        """Append (B, K, L, D) and return everything, offset rows."""
        start, stop = self.offset, self.offset + keys.shape[2]
        self.offset = stop
        for buffer, new in ((self.keys, keys), (self.values, values)):
            rows = buffer.pack(new)
            buffer.make_room(rows, -(-stop // STEP) * STEP)
            buffer.write(start, stop, rows)
        return self.keys.view(0, stop), self.values.view(0, stop)

    def reaches(self, position: int) -> bool:
        return position <= self.offset

    def rewind(self, position: int) -> None:
        self.offset = position


class WindowCache:
    """The last W - 1 keys and values and some slack, in a buffer of fixed size."""

    def __init__(self, window: int, bits: int = 16) -> None:
        self.window = window
        self.slack = min(window, SLACK)
        self.capacity = window - 1 + 2 * self.slack
        self.offset = 0  # tokens seen
        self.filled = 0  # of them in the buffer
        self.keys, self.values = Buffer(bits), Buffer(bits)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Rows, Rows]:
        """Append (B, K, L, D) and return what these L queries can reach: at most W - 1 + L rows, the newest last."""
        length, before = keys.shape[2], self.filled
        reach, stop = max(0, before - (self.window - 1)), before + length
        self.offset += length
        self.filled = stop if stop <= self.capacity else min(self.window - 1 + self.slack, stop)
        out = []
        for buffer, new in ((self.keys, keys), (self.values, values)):
            rows = buffer.pack(new)
            buffer.make_room(rows, self.capacity)
            if stop <= self.capacity:
                buffer.write(before, stop, rows)
                out.append(buffer.view(reach, stop))
                continue
            held = buffer.view(0, before)
            rows = tuple(mx.concatenate(list(pair), axis=2) for pair in zip(held, rows, strict=True))
            buffer.write(0, self.filled, tuple(part[:, :, -self.filled :] for part in rows))
            out.append(tuple(part[:, :, reach:] for part in rows))
        return out[0], out[1]

    def reaches(self, position: int) -> bool:
        first = self.offset - self.filled  # position of the oldest row held
        return position <= self.offset and (position == 0 or first == 0 or position - (self.window - 1) >= first)

    def rewind(self, position: int) -> None:
        self.filled = max(0, self.filled - (self.offset - position))  # below 0 only where nothing is kept: position 0
        self.offset = position


@dataclass(frozen=True)
class Snapshot:
    """The local layers at one position, by reference, and the logits after it. Global layers need none."""

    position: int
    layers: tuple[tuple[int, Rows, Rows] | None, ...]  # (filled, keys, values); None for a global layer
    logits: mx.array | None  # (1, V) after `position` tokens

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.layers if layer for rows in layer[1:] for part in rows)


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
        self.layers: list[GlobalCache | WindowCache] = [
            GlobalCache(kv_bits) if text.is_global(layer) else WindowCache(text.sliding_window, local_kv_bits)
            for layer in range(text.num_hidden_layers)
        ]
        self.padding = check_padding(padding)
        self.ends_in_image = False  # the last token read was an image token: its block may not go on in a later call
        self.snapshots: list[Snapshot] = []  # by position

    @property
    def offset(self) -> int:
        """Tokens read so far, padding counted."""
        return self.layers[0].offset

    @property
    def arrays(self) -> list[mx.array]:
        """Every buffer, to be evaluated together at the end of a prefill chunk."""
        return [part for layer in self.layers for buffer in (layer.keys, layer.values) for part in buffer.parts]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def take_snapshot(self, logits: mx.array | None = None, *, budget: int) -> None:
        """Remember this position. The oldest snapshots are dropped until all of them fit into `budget` bytes."""
        layers = tuple(
            (layer.filled, layer.keys.hold(), layer.values.hold()) if isinstance(layer, WindowCache) else None
            for layer in self.layers
        )
        if logits is None and any(old.position == self.offset for old in self.snapshots):
            return
        self.snapshots = [old for old in self.snapshots if old.position != self.offset]
        mx.eval([part for layer in layers if layer for rows in layer[1:] for part in rows])
        self.snapshots.append(Snapshot(self.offset, layers, logits))
        total = sum(snapshot.nbytes for snapshot in self.snapshots)
        while total > budget and self.snapshots:
            total -= self.snapshots.pop(0).nbytes

    def reach(self, position: int) -> int:
        """The last position up to `position` to which `rewind` can go with nothing lost.

        A state is the present or a snapshot: for each local layer the rows from `first` to `end`, without a gap.
        Going back to q <= end is exact when all that later queries can see is there. A query at p >= q sees, of the
        rows before q, those from p - W + 1 on, at the earliest q - W + 1. So a local layer needs the rows q - W + 1 to
        q - 1 that exist: first = 0, or q - (W - 1) >= first. A global layer needs rows 0 to q - 1: it is only ever
        written at its end, and `rewind` drops the snapshots beyond q, so what lies before a snapshot's position is
        what lay there when it was taken. A row never depends on rows after it, but for image tokens, whose block must
        be read whole: q must not lie inside one, and that is the caller's part.
        """
        best = 0
        for snapshot in self.snapshots:
            q = min(position, snapshot.position)
            if all(layer is None or _holds(snapshot, layer[0], self._window, q) for layer in snapshot.layers):
                best = max(best, q)
        q = min(position, self.offset)
        return max(best, q) if all(layer.reaches(q) for layer in self.layers) else best

    def rewind(self, position: int) -> mx.array | None:
        """Go back to a position that `reach` returned; returns the logits after it where a snapshot knows them."""
        assert self.reach(position) == position, (position, self.offset)
        known = next((snapshot for snapshot in self.snapshots if snapshot.position == position), None)
        if not all(layer.reaches(position) for layer in self.layers):
            source = next(
                snapshot
                for snapshot in self.snapshots
                if snapshot.position >= position
                and all(
                    layer is None or _holds(snapshot, layer[0], self._window, position) for layer in snapshot.layers
                )
            )
            for layer, held in zip(self.layers, source.layers, strict=True):
                if isinstance(layer, WindowCache) and held is not None:
                    layer.offset, layer.filled = source.position, held[0]
                    layer.keys.parts = [part[...] for part in held[1]]
                    layer.values.parts = [part[...] for part in held[2]]
        for layer in self.layers:
            layer.rewind(position)
        self.snapshots = [snapshot for snapshot in self.snapshots if snapshot.position <= position]
        self.ends_in_image = False
        return known.logits if known is not None else None

    @property
    def _window(self) -> int:
        return next((layer.window for layer in self.layers if isinstance(layer, WindowCache)), 1)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> GlobalCache | WindowCache:
        return self.layers[layer]

    def __iter__(self) -> Iterator[GlobalCache | WindowCache]:
        return iter(self.layers)


def _holds(snapshot: Snapshot, filled: int, window: int, position: int) -> bool:
    first = snapshot.position - filled
    return first == 0 or position - (window - 1) >= first


def check_padding(padding: Sequence[int] | None) -> tuple[int, ...] | None:
    """Leading pad tokens of each row, or None when there are none at all."""
    if padding is None or not any(padding):
        return None
    if any(count < 0 for count in padding):
        raise OptionError("padding", got=list(padding), want="counts >= 0, one a row")
    return tuple(padding)

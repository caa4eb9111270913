"""Keys and values of the tokens already read, one cache a layer.

A global layer keeps all of them, in a buffer that grows in steps. A local layer never looks back more than W - 1 keys,
so its buffer has a fixed size: the window and some slack, filled from the left; when it is full the last W - 1 keys
move to its front. Keys stay in order of position, so a mask never has to know where the buffer starts.

Updates write in place: MLX may reuse a buffer that nobody else holds, so no reference to an old one is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from ..config import Config
from ..errors import OptionError

STEP = 256  # tokens by which a global cache grows, and the largest slack of a local one


class GlobalCache:
    """All keys and values, (B, K, S, D) each."""

    def __init__(self) -> None:
        self.offset = 0  # tokens seen
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (B, K, L, D) and return everything, (B, K, offset, D)."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        capacity = -(-self.offset // STEP) * STEP
        if self.keys is None or self.values is None:
            self.keys, self.values = _room(keys, capacity), _room(values, capacity)
        elif capacity > self.keys.shape[2]:
            more = capacity - self.keys.shape[2]
            self.keys = mx.concatenate([self.keys, _room(keys, more)], axis=2)
            self.values = mx.concatenate([self.values, _room(values, more)], axis=2)
        self.keys[:, :, start : self.offset] = keys
        self.values[:, :, start : self.offset] = values
        return self.keys[:, :, : self.offset], self.values[:, :, : self.offset]

    @property
    def arrays(self) -> list[mx.array]:
        return [array for array in (self.keys, self.values) if array is not None]


class WindowCache:
    """The last W - 1 keys and values and some slack, in a buffer of fixed size."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.capacity = window - 1 + min(window, STEP)
        self.offset = 0  # tokens seen
        self.filled = 0  # of them in the buffer
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (B, K, L, D) and return what these L queries can reach: at most W - 1 + L keys, the newest last."""
        length = keys.shape[2]
        if self.keys is None or self.values is None:
            self.keys, self.values = _room(keys, self.capacity), _room(values, self.capacity)
        self.offset += length
        start = max(0, self.filled - (self.window - 1))
        if self.filled + length <= self.capacity:
            end = self.filled + length
            self.keys[:, :, self.filled : end] = keys
            self.values[:, :, self.filled : end] = values
            self.filled = end
            return self.keys[:, :, start:end], self.values[:, :, start:end]
        keys = mx.concatenate([self.keys[:, :, start : self.filled], keys], axis=2)
        values = mx.concatenate([self.values[:, :, start : self.filled], values], axis=2)
        self.filled = min(self.window - 1, keys.shape[2])
        first = keys.shape[2] - self.filled
        self.keys[:, :, : self.filled] = keys[:, :, first:]
        self.values[:, :, : self.filled] = values[:, :, first:]
        return keys, values

    @property
    def arrays(self) -> list[mx.array]:
        return [array for array in (self.keys, self.values) if array is not None]


class Caches:
    """One cache a layer, and what they share: how many tokens were read and how each row is padded."""

    def __init__(self, config: Config, padding: Sequence[int] | None = None) -> None:
        text = config.text
        self.layers: list[GlobalCache | WindowCache] = [
            GlobalCache() if text.is_global(layer) else WindowCache(text.sliding_window)
            for layer in range(text.num_hidden_layers)
        ]
        self.padding = check_padding(padding)
        self.ends_in_image = False  # the last token read was an image token: its block may not go on in a later call

    @property
    def offset(self) -> int:
        """Tokens read so far, padding counted."""
        return self.layers[0].offset

    @property
    def arrays(self) -> list[mx.array]:
        """Every buffer, to be evaluated together at the end of a prefill chunk."""
        return [array for layer in self.layers for array in layer.arrays]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> GlobalCache | WindowCache:
        return self.layers[layer]

    def __iter__(self) -> Iterator[GlobalCache | WindowCache]:
        return iter(self.layers)


def check_padding(padding: Sequence[int] | None) -> tuple[int, ...] | None:
    """Leading pad tokens of each row, or None when there are none at all."""
    if padding is None or not any(padding):
        return None
    if any(count < 0 for count in padding):
        raise OptionError("padding", got=list(padding), want="counts >= 0, one a row")
    return tuple(padding)


def _room(like: mx.array, count: int) -> mx.array:
    """Empty (B, K, count, D) of like's dtype."""
    batch, heads, _, size = like.shape
    return mx.zeros((batch, heads, count, size), dtype=like.dtype)

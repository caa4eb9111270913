"""What is fastest on MLX's CPU backend, a matrix at a time. Only there: a GPU's path never comes here.

Measured on Linux x86-64, MLX 0.32, float32, reference BLAS (docs/performance.md): a plain matrix stored input by input
is multiplied 1.6 to 1.9 times as fast as one stored output by output. Packed matrices are multiplied number by number:
right for one token, but from a few rows on it is cheaper to unpack the matrix, multiply, and drop it again.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path

from .attention import attend_all

MOST_CORES = 4
WORTH_SHARING = 1 << 22  # multiplications, a millisecond or so; handing over to another thread takes some 50 µs
UNPACK_FROM = 8  # rows
BLOCK = 64  # rows
QUERIES = 1024  # of the tower's attention at once

_here = threading.local()


def multiplier(module: nn.Module) -> Callable[[mx.array], mx.array]:
    """(…, in) → (…, out). A plain matrix is stored anew; its module then holds a view of that."""
    if isinstance(module, nn.QuantizedLinear):
        mx.eval(module.parameters())
        return lambda x: unpacking_matmul(x, module)
    turn(module)
    turned = module.weight.T
    mx.eval(turned)
    return lambda x: shared_matmul(x, turned)


def arrange(model: nn.Module) -> None:
    """The same for every matrix of modules that call them themselves: the tower's."""

    def changed(_: str, module: nn.Module) -> nn.Module:
        if isinstance(module, nn.QuantizedLinear):
            return UnpackingLinear(module)
        return SharedLinear(module) if isinstance(module, nn.Linear) else module

    model.update_modules(tree_map_with_path(changed, model.leaf_modules(), is_leaf=nn.Module.is_module))


def attend_by_head(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """attention.attend_all, a head a core at a time, some queries at a time: the scores are memory here.

    Half the time goes into the exponentials, which MLX computes on one thread: so with OpenBLAS too.
    """
    out: list[mx.array] = []
    streams = _streams(min(all_cores(), MOST_CORES))
    k = mx.contiguous(k.swapaxes(2, 3)).swapaxes(2, 3)  # turned, as in `turn`
    for first in range(0, q.shape[1], len(streams)):
        for head, stream in zip(range(first, q.shape[1]), streams, strict=False):
            one = slice(head, head + 1)
            with mx.stream(stream):
                parts = [
                    attend_all(q[:, one, start : start + QUERIES], k[:, one], v[:, one], scale)
                    for start in range(0, q.shape[2], QUERIES)
                ]
                out.append(mx.concatenate(parts, axis=2))
        mx.eval(out[first:])
    return mx.concatenate(out, axis=1)


def turn(module: nn.Module) -> None:
    """Store a float32 matrix (out, in) input by input; it stays (out, in) for whoever looks at it.

    By numpy and some rows at a time, as the cache likes it: six times as fast as mx.contiguous.
    """
    mx.eval(module.weight)
    if module.weight.dtype != mx.float32:
        return
    rows = np.array(module.weight, copy=False)
    stored = mx.zeros(rows.shape[::-1])
    mx.eval(stored)
    turned = np.array(stored, copy=False)
    for start in range(0, len(rows), BLOCK):
        turned[:, start : start + BLOCK] = rows[start : start + BLOCK].T
    module.weight = stored.T
    mx.eval(module.weight)


def shared_matmul(x: mx.array, turned: mx.array) -> mx.array:
    """x (…, in) @ turned (in, out): large products in parts of the inputs, a part for each core, added up.

    For BLAS of one thread (`cores`): each of MLX's streams has a thread of its own.
    """
    work = x.size * turned.shape[1]  # multiplications
    parts = min(cores(), MOST_CORES) if work >= WORTH_SHARING else 1
    if parts == 1 or turned.dtype != mx.float32:
        return x @ turned
    size = turned.shape[0]
    borders = [size * part // parts for part in range(parts + 1)]
    sums = [
        mx.matmul(x[..., start:stop], turned[start:stop], stream=stream)
        for start, stop, stream in zip(borders, borders[1:], _streams(parts), strict=False)
    ]
    total = sums[0]
    for part in sums[1:]:
        total = total + part
    return total


@cache
def cores() -> int:
    """Cores that a matrix product of MLX leaves idle: 1 where its BLAS has threads itself (Accelerate, OpenBLAS)."""
    if sys.platform != "linux":
        return 1
    loaded = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    if "/libopenblas" in loaded:  # numpy's own is called otherwise
        return 1
    return all_cores()


def all_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _streams(count: int) -> list[mx.Stream]:
    """The default stream and `count` - 1 more; a stream belongs to the thread that made it."""
    if not hasattr(_here, "streams"):
        _here.streams = []
    while len(_here.streams) < count - 1:
        _here.streams.append(mx.new_stream(mx.cpu))
    return [mx.default_stream(mx.cpu), *_here.streams[: count - 1]]


class SharedLinear(nn.Linear):
    """A plain matrix, turned, and multiplied with by all cores."""

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        for name, array in plain.items():
            self[name] = array
        turn(self)
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        out = shared_matmul(x, self["weight"].T)
        return out + self.bias if "bias" in self else out


class SharedEmbedding(nn.Embedding):
    """A plain embedding, turned: it is multiplied with as the head."""

    def __init__(self, plain: nn.Embedding) -> None:
        nn.Module.__init__(self)
        self.weight = plain.weight
        turn(self)
        self.freeze()

    def as_linear(self, x: mx.array) -> mx.array:
        return shared_matmul(x, self["weight"].T)


class UnpackingLinear(nn.QuantizedLinear):
    """A packed matrix that is unpacked for each call of more than a few rows."""

    def __init__(self, packed: nn.QuantizedLinear) -> None:
        nn.Module.__init__(self)
        for name, array in packed.items():
            self[name] = array
        self.group_size, self.bits, self.mode = packed.group_size, packed.bits, packed.mode
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        out = unpacking_matmul(x, self)
        return out + self.bias if "bias" in self else out


def unpacking_matmul(x: mx.array, packed: nn.QuantizedLinear) -> mx.array:
    """x @ Wᵀ without the bias."""
    weight, scales, biases = packed["weight"], packed["scales"], packed.get("biases")
    group, bits, mode = packed.group_size, packed.bits, packed.mode
    if x.size < UNPACK_FROM * x.shape[-1]:
        return mx.quantized_matmul(x, weight, scales, biases, True, group, bits, mode)
    plain = mx.dequantize(weight, scales, biases, group, bits, mode).astype(x.dtype)
    return shared_matmul(x, mx.contiguous(plain.T))

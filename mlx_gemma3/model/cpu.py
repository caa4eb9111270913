"""What is fastest on MLX's CPU backend. Only there: a GPU's path never comes here.

MLX's Linux wheel multiplies with a reference BLAS on one thread, and takes exp and tanh a number at a time. numpy's
wheels bring a BLAS that uses all cores, and vectorised functions. So matrices, attention, norms and GELU are computed
by numpy here, in float32, on MLX's own memory; the rest of a layer stays MLX's (docs/performance.md has the figures).
numpy computes at once: there is no graph of a whole step.

Packed matrices of a model that is small beside the memory are unpacked once: with a prompt, or, the head, with the
second token. Others, and those of 16 bits, are unpacked some rows at a time, for each product; a packed one is left to
MLX for a row or two, a part of it on each core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from math import pi, prod, sqrt
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from . import attention
from .cache import Rows
from .fused import Kernels
from .layers import PatchConv
from .streams import cpu_streams
from .unpacking import (
    BLOCK,
    LARGE,
    MOST_CORES,
    Floats,
    MatrixRows,
    Room,
    all_cores,
    floats,
    matrix_rows,
    packed_rows,
    rows_of,
    unpack_all,
)
from .vision import TowerKernels

Multiply = Callable[[mx.array], mx.array]  # (…, in) → (…, out)

UNPACK_FROM = 4  # rows
MANY = 64  # rows; a product with fewer is slow
VECTOR_ROWS = 4  # up to as many are multiplied one by one, a block of the matrix after another
FEW_ROWS = 6  # with a LARGE matrix, which memory delivers more slowly than it is multiplied with
MOST_TURNED = 32  # rows; up to as many the matrix is the left side
WORTH_SHARING = 1 << 18  # numbers of a packed matrix, a quarter of a millisecond; another thread takes up work in 50 µs
SMALL = 1 << 16  # numbers; fewer are copied sooner than MLX makes room for them
# Numbers that one vector meets. For more OpenBLAS wakes its threads, which then stay in the way of MLX's.
VECTOR_NUMBERS = 400_000
MASKED = np.float32(-1e30)  # the score of a key that is not seen; its exponential is 0


def kernels(*, unpack: bool = False) -> Kernels:
    """
    Args:
        unpack: keep packed matrices as float32 once they were needed, beside the packed ones.
    """
    return Kernels(partial(matrix, unpack=unpack), multiply, attend, geglu, norm, add, add_product, ahead=False)


def multiply(x: mx.array, matrix: Multiply) -> mx.array:
    """A matrix is a function here."""
    return matrix(x)


def matrix(module: nn.Module, *, unpack: bool = False) -> Multiply:
    """(…, in) → (…, out), without the bias."""
    mx.eval(module.parameters())
    packed = "scales" in module
    rows = matrix_rows(module)
    kept: list[Floats] = []
    room = Room(rows[1], module.scales.shape[1] * module.group_size) if packed and unpack else None
    left_packed = True  # its first product of a row or two; a prompt needs it unpacked anyway
    parts = list(_parts(module)) if packed else []

    def multiplied(x: mx.array) -> mx.array:
        nonlocal left_packed
        few = x.size < UNPACK_FROM * x.shape[-1]
        if room is not None and not (few and left_packed):
            if not kept:
                kept.append(unpack_all(room.get(), rows[0], rows[2]))
            return matmul(x, lambda some, room: kept[0][some], rows[1], 0)
        left_packed = False
        if room is not None:
            room.fetch()
        if packed and few:
            out = [part(x, stream) for part, stream in zip(parts, cpu_streams(len(parts)), strict=True)]
            return (out[0] if len(out) == 1 else mx.concatenate(out, axis=-1)).astype(x.dtype)
        return matmul(x, *rows)

    return multiplied


def matmul(x: mx.array, rows: MatrixRows, count: int, step: int) -> mx.array:
    """x (…, in) @ a matrix (count, in), whose rows are asked for `step` at a time, or all: (…, count), in x's dtype."""
    left = floats(x).reshape(-1, x.shape[-1])
    room = np.empty((step, x.shape[-1]), np.float32)

    vectors = len(left) <= VECTOR_ROWS or (len(left) <= FEW_ROWS and count * x.shape[-1] > LARGE)
    if not step:  # several rows go over a block of the matrix while the cache holds it
        block = (BLOCK if vectors else 2 * BLOCK) if 1 < len(left) <= MOST_TURNED else count * x.shape[-1]
        step = min(count, max(1, block // x.shape[-1]))

    def write(out: Floats) -> None:
        for start in range(0, count, step):
            some = slice(start, start + step)
            _multiply(left, rows(some, room), out[:, some], vectors)

    return written((len(left), count), write).reshape(*x.shape[:-1], count).astype(x.dtype)


def _multiply(left: Floats, part: Floats, out: Floats, vectors: bool) -> None:
    """left (R, in) @ partᵀ (in, O) into out (R, O). OpenBLAS is slow where one side has few rows."""
    if vectors:
        for row, found in zip(left, out, strict=True):
            np.matmul(part, row, out=found)
    elif len(left) > MOST_TURNED:
        np.matmul(left, part.T, out=out)
    else:  # the few rows as the right side, as many of them as fill its kernels
        full: Floats = np.zeros((-len(left) % 4 + len(left), left.shape[1]), np.float32)
        full[: len(left)] = left
        out[:] = (part @ full.T).T[: len(left)]


def attend(
    q: mx.array, keys: Rows, values: Rows, *, scale: float, mask: mx.array | str | None, bits: int = 16
) -> mx.array:
    """attention.attend, some queries at a time: their scores stay in the cache, and are never held for all."""
    if bits != 16:
        return attention.attend(q, keys, values, scale=scale, mask=mask, bits=bits)
    queries, k, v = floats(q), floats(keys[0]), floats(values[0])
    batch, heads, length, size = queries.shape
    groups, count = k.shape[1], k.shape[2]
    together = heads // groups
    hidden = None if mask is None else unseen(mask, batch, length, count)
    step = max(-(-MANY // together), BLOCK // (together * count))
    room = np.empty(together * min(step, length) * count, np.float32)

    def write(out: Floats) -> None:
        for row, group, start in product(range(batch), range(groups), range(0, length, step)):
            here = row, slice(group * together, (group + 1) * together), slice(start, start + step)
            part = queries[here].reshape(-1, size) * np.float32(scale)
            seen = count - length + min(start + step, length) if isinstance(mask, str) else count  # keys
            pieces = [slice(0, seen)]
            if length == 1:
                part, few = part[:, None], VECTOR_NUMBERS // size
                pieces = [slice(first, min(first + few, seen)) for first in range(0, seen, few)]
            scores = room[: len(part) * seen].reshape(*part.shape[:-1], seen)
            for some in pieces:
                np.matmul(part, k[row, group, some].T, out=scores[..., some])
            if hidden is not None:
                np.copyto(scores.reshape(together, -1, seen), MASKED, where=hidden[row, here[2], :seen])
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            found = sum(scores[..., some] @ v[row, group, some] for some in pieces)
            found /= scores.sum(axis=-1, keepdims=True)
            out[here] = found.reshape(together, -1, size)

    return written((batch, heads, length, size), write).astype(q.dtype)


def attend_all(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """attention.attend_all, likewise."""
    return attend(q, (k,), (v,), scale=scale, mask=None)


def norm(x: mx.array, gain: mx.array | None, eps: float) -> mx.array:
    """mx.fast.rms_norm."""
    rows = floats(x)

    def write(out: Floats) -> None:
        inverse = 1 / np.sqrt(np.einsum("...i,...i->...", rows, rows) / np.float32(rows.shape[-1]) + np.float32(eps))
        np.multiply(rows, inverse[..., None], out=out)
        if gain is not None:
            out *= floats(gain)

    return written(rows.shape, write).astype(x.dtype)


def add(x: mx.array, y: mx.array) -> mx.array:
    """x + y, of one shape and dtype."""
    left, right = floats(x), floats(y)
    return written(left.shape, lambda out: np.add(left, right, out=out)).astype(x.dtype)


def add_product(y: mx.array, x: mx.array, matrix: Multiply) -> mx.array:
    """y (…, out) + x (…, in) times a matrix."""
    return add(y, multiply(x, matrix))


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu_tanh(gate) * up, (…, I) each."""
    return _gelu(gate, up)


def gelu_tanh(x: mx.array) -> mx.array:
    """layers.gelu_tanh."""
    return _gelu(x, None)


def _gelu(x: mx.array, times: mx.array | None) -> mx.array:
    size = x.shape[-1]
    rows = floats(x).reshape(-1, size)
    factor = None if times is None else floats(times).reshape(-1, size)
    step = max(1, BLOCK // size)

    def write(out: Floats) -> None:
        for start in range(0, len(rows), step):
            some, y = rows[start : start + step], out[start : start + step]
            np.multiply(some, some, out=y)
            y *= np.float32(0.044715 * sqrt(2 / pi))
            y += np.float32(sqrt(2 / pi))
            y *= some
            np.tanh(y, out=y)
            y += np.float32(1)
            y *= some
            y *= np.float32(0.5)
            if factor is not None:
                y *= factor[start : start + step]

    return written(rows.shape, write).reshape(x.shape).astype(x.dtype)


def written(shape: tuple[int, ...], write: Callable[[Floats], Any]) -> mx.array:
    """A float32 array that numpy fills; infinities and NaN pass in silence, as MLX has it."""
    with np.errstate(all="ignore"):
        if prod(shape) <= SMALL:
            out: Floats = np.empty(shape, np.float32)
            write(out)
            return mx.array(out)
        made = mx.zeros(shape)
        write(np.array(made, copy=False))
        return made


def tower_kernels(tower: nn.Module) -> TowerKernels:
    """For this tower: its matrices arranged, one by one, as `matrix` does."""
    arranged = {
        id(module): with_bias(module)
        for _, module in tower.named_modules()
        if isinstance(module, nn.Linear | nn.QuantizedLinear | PatchConv)
    }
    return TowerKernels(lambda module, x: arranged[id(module)](x), attend_all, gelu_tanh)


def with_bias(module: nn.Module) -> Multiply:
    """What calling the module computes; a convolution over patches side by side is a matrix."""
    if isinstance(module, PatchConv):
        return _patches(module)
    multiplied = matrix(module)
    return lambda x: multiplied(x) + module.bias if "bias" in module else multiplied(x)


def _patches(conv: PatchConv) -> Multiply:
    """(N, S, S, 3) → (N, S / patch, S / patch, out)"""
    patch = conv.stride[0]
    rows = rows_of(conv.weight.flatten(1))

    def convolved(pixels: mx.array) -> mx.array:
        count, side, _, channels = pixels.shape
        grid = side // patch
        parts = pixels[:, : grid * patch, : grid * patch].reshape(count, grid, patch, grid, patch, channels)
        flat = parts.transpose(0, 1, 3, 2, 4, 5).reshape(count, grid, grid, -1)
        return matmul(flat, *rows) + conv.bias

    return convolved


def _parts(module: nn.Module) -> Iterator[Callable[[mx.array, mx.Stream], mx.array]]:
    """Runs of a packed matrix's rows, one for each core that is worth asking: (x, stream) → x @ rowsᵀ."""
    count = module.weight.shape[0]
    worth = module.weight.size * 32 // module.bits // WORTH_SHARING
    parts = max(1, min(all_cores(), MOST_CORES, worth))
    for part in range(parts):
        yield _part(module, slice(count * part // parts, count * (part + 1) // parts))


def _part(module: nn.Module, rows: slice) -> Callable[[mx.array, mx.Stream], mx.array]:
    weight, scales, biases = packed_rows(module, rows)
    group, bits, mode = module.group_size, module.bits, module.mode
    return lambda x, stream: mx.quantized_matmul(x, weight, scales, biases, True, group, bits, mode, stream=stream)


def unseen(mask: mx.array | str, batch: int, length: int, count: int) -> npt.NDArray[np.bool_]:
    """(B, L, S): the keys that a query does not see."""
    if isinstance(mask, str):
        positions = np.arange(count)
        hidden = positions > positions[count - length :, None]
    else:
        hidden = ~np.array(mask)[:, 0]
    return np.broadcast_to(hidden, (batch, length, count))

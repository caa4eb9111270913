"""Matrices in float32 for numpy: a few rows at a time, or all of one at once. Of MLX's CPU backend (cpu.py).

    packed groups · float16 · bfloat16 ─ some rows ─ room of the caller's ─ float32

numpy reads MLX's own memory. A matrix that is kept unpacked gets its memory from a thread of its own.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from ctypes import CDLL, c_size_t, c_void_p
from functools import cache
from math import gcd
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from .device import memory_bytes

Floats = npt.NDArray[np.float32]
MatrixRows = Callable[[slice, Floats], Floats]  # (which, room for as many) → those rows, in that room or elsewhere

MOST_CORES = 4
BLOCK = 1 << 19  # numbers that are worked on at a time: two megabytes, which the cache holds
LARGE = 1 << 22  # numbers
FILLED = 1 << 17  # numbers that a core unpacks at a time
PAGES = 8 << 20  # bytes that are asked for at a time
MADV_POPULATE_WRITE = 23  # Linux 5.14
ROOM_TO_UNPACK = 4  # times a packed model as float32 must fit into the memory


def unpacked_bytes(model: nn.Module) -> int:
    """Of a model's packed matrices as float32, if they are to be kept so: they fit into the memory several times over.

    0 where they do not, or none is packed.
    """
    packed = [module for _, module in model.named_modules() if "scales" in module]
    numbers = sum(module.weight.size * 32 // module.bits for module in packed)
    return 4 * numbers if ROOM_TO_UNPACK * 4 * numbers <= memory_bytes() else 0


def floats(x: mx.array) -> Floats:
    """x's own memory, computed now; a float32 copy where it has another dtype."""
    return np.array(x if x.dtype == mx.float32 else x.astype(mx.float32), copy=False)


def matrix_rows(module: nn.Module) -> tuple[MatrixRows, int, int]:
    """A matrix (out, in) for `matmul`: some rows in float32, how many there are, and at a time (0: all, in no room)."""
    if "scales" not in module:
        return rows_of(module.weight)
    count, words = module.weight.shape
    step = max(1, min(count, BLOCK * module.bits // 32 // words))
    if module.mode == "affine":
        return _unpacker(module), count, step

    def unpacked(some: slice, room: Floats) -> Floats:
        weight, scales, biases = packed_rows(module, some)
        return floats(mx.dequantize(weight, scales, biases, module.group_size, module.bits, module.mode))

    return unpacked, count, step


def rows_of(weight: mx.array) -> tuple[MatrixRows, int, int]:
    """The same of a plain matrix."""
    count = len(weight)
    if weight.dtype == mx.float32:
        stored = floats(weight)
        return lambda some, room: stored[some], count, 0
    step = max(1, min(count, BLOCK // weight.shape[1]))
    if weight.dtype == mx.float16:
        halves = np.array(weight, copy=False)
        return lambda some, room: _filled(room, halves[some]), count, step
    upper = np.array(weight.view(mx.uint16), copy=False)  # bfloat16 is the upper half of a float32

    def widened(some: slice, room: Floats) -> Floats:
        found = upper[some]
        np.left_shift(found, 16, out=room[: len(found)].view(np.uint32), dtype=np.uint32)
        return room[: len(found)]

    return widened, count, step


def _unpacker(module: nn.Module) -> MatrixRows:
    """Groups of affine codes: code * scale + bias. Two (2 bits) to ten (5, 6) times as fast as mx.dequantize."""
    bits, group = module.bits, module.group_size
    codes = np.array(module.weight, copy=False).view(np.uint8)
    scales, biases = rows_of(module.scales)[0], rows_of(module.biases)[0]

    def unpacked(some: slice, room: Floats) -> Floats:
        found = codes[some]
        out = room[: len(found)]
        _write_codes(found, bits, out)
        groups = out.reshape(len(out), -1, group)
        room_of_scales: Floats = np.empty(groups.shape[:2], np.float32)
        groups *= scales(some, room_of_scales)[..., None]
        groups += biases(some, room_of_scales)[..., None]
        return out

    return unpacked


def _write_codes(packed: npt.NDArray[np.uint8], bits: int, out: Floats) -> None:
    """Codes that follow each other without a gap, the lowest bits first: packed (R, N * bits / 8) → out (R, N)."""
    if bits == 8:
        out[:] = packed
        return
    if bits == 4:  # the same as below, in three quarters of the time
        pairs = packed.astype(np.uint16)
        out[:] = ((pairs | pairs << 4) & 0x0F0F).view(np.uint8)
        return
    count = 8 // gcd(bits, 8)  # codes that end with a byte
    parts = packed.reshape(-1, count * bits // 8)
    columns = [np.ascontiguousarray(parts[:, byte]) for byte in range(parts.shape[1])]
    codes = np.empty((len(parts), count), np.uint8)
    for index in range(count):
        byte, shift = divmod(index * bits, 8)
        code = columns[byte] >> shift
        if shift + bits > 8:
            code |= columns[byte + 1] << (8 - shift)
        codes[:, index] = code & (1 << bits) - 1
    out[:] = codes.reshape(out.shape)


def _filled(room: Floats, found: npt.NDArray[Any]) -> Floats:
    room[: len(found)] = found
    return room[: len(found)]


def unpack_all(out: Floats, rows: MatrixRows, step: int) -> Floats:
    """Unpack all rows of a matrix into `out`, `step` at a time, the cores side by side: numpy lets go of the lock."""

    def fill(start: int) -> None:
        some = slice(start, min(start + step, len(out)))
        found = rows(some, out[some])
        if not np.may_share_memory(found, out[some]):
            out[some] = found

    step = max(1, min(step, FILLED // out.shape[1]))
    for _ in _cores().map(fill, range(0, len(out), step)):
        pass
    return out


class Room:
    """Memory for a matrix, got ready by a thread of its own meanwhile: its pages cost as much as the unpacking."""

    def __init__(self, count: int, width: int) -> None:
        self._ready: Future[None] | None = None
        if sys.platform == "linux":
            memory = mmap.mmap(-1, 4 * count * width, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._out: Floats = np.frombuffer(memory, np.float32).reshape(count, width)
            if self._out.size <= LARGE:
                self.fetch()
        else:
            self._out = np.empty((count, width), np.float32)

    def fetch(self) -> None:
        """Begin, unless it has begun. A large one waits for this: while the model loads, others need memory."""
        if self._ready is None and sys.platform == "linux":
            self._ready = _pages().submit(self._fetch)

    def get(self) -> Floats:
        self.fetch()
        if self._ready is not None:
            self._ready.result()
        return self._out

    def _fetch(self) -> None:  # an older Linux refuses: then the pages come one by one
        for start in range(0, self._out.nbytes, PAGES):  # in between another thread gets memory
            size = min(PAGES, self._out.nbytes - start)
            _libc().madvise(c_void_p(self._out.ctypes.data + start), c_size_t(size), MADV_POPULATE_WRITE)


@cache
def _pages() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "mlx-gemma3 pages")


@cache
def _cores() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(MOST_CORES, all_cores()), "mlx-gemma3 unpacking")


@cache
def _libc() -> CDLL:
    return CDLL(None)


def packed_rows(module: nn.Module, rows: slice) -> tuple[mx.array, mx.array, mx.array | None]:
    biases = module.get("biases")
    return module.weight[rows], module.scales[rows], biases if biases is None else biases[rows]


def all_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1

"""ggml's blocks of few bits → MLX's packed groups of 32, or floats.

Owns what each type of a GGUF tensor becomes, and reading a run of blocks from a file. Knows nothing of names, of the
model, nor of what a tensor is for (gguf.py).

Both hold a code of few bits for each number and a scale for each group of a row; MLX's affine groups are
`scale * code + bias`. Seven types are such groups already, with nothing rounded in float32:

    type   code                       scale    bias        bits a number: file → MLX (float32 scales, 16-bit scales)
    Q4_0   q            0 … 15        d        -8 d        4.5    → 6, 5
    Q4_1   q            0 … 15        d        m           5      → 6, 5
    Q5_0   q            0 … 31        d        -16 d       5.5    → 7, 6
    Q5_1   q            0 … 31        d        m           6      → 7, 6
    Q8_0   q + 128      1 … 255       d        -128 d      8.5    → 10, 9
    Q4_K   q            0 … 15        d * sc   -dmin * m   4.5    → 6, 5
    Q5_K   q            0 … 31        d * sc   -dmin * m   5.5    → 7, 6

d, m and dmin are float16 (11 significant bits), sc and m of K-quants 6 bits, codes at most 8: each product has at most
22 bits and is exact in float32's 24, so `scale * code + bias` rounds once at most, where ggml's own formula does.

Q2_K, Q3_K and Q6_K have a scale for each 16 numbers, which MLX's affine groups cannot say: they are dequantised and
quantised again, in 8 bits. All other types become floats.

Sources: llama.cpp's ggml-common.h (the blocks) and ggml-quants.c (dequantize_row_…); MLX's affine_quantize and
affine_dequantize (codes are one little-endian stream of bits along a row).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from .entries import Packing

GROUP = 32
_EXACT_BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5}
_GROUPS_OF_16 = frozenset(("Q2_K", "Q3_K", "Q6_K"))
_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}  # NumPy has no bfloat16: its bits
_PIECE = 1 << 18  # numbers worked on at once: the temporaries of one piece stay in the processor's cache

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class BlockType:
    """One type of a GGUF tensor."""

    name: str  # ggml's: "Q4_K"
    values: int  # numbers in a block
    nbytes: int  # of a block
    packing: Packing | None  # what a matrix of this type becomes; None for floats
    exact: bool  # whether that rounds nothing


def block_type(number: int) -> BlockType:
    """The type with this number in a file.

    Raises:
        ValueError: no such type, or one that the gguf package does not dequantise; the text is its name.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    known = {kind.value: kind for kind in GGMLQuantizationType}
    if number not in known:
        raise ValueError(str(number))
    kind = known[number]
    values, nbytes = GGML_QUANT_SIZES[kind]
    try:
        dequantize(np.zeros((1, nbytes), dtype=np.uint8), kind)
    except NotImplementedError:
        raise ValueError(kind.name) from None
    bits = 8 if kind.name in _GROUPS_OF_16 else _EXACT_BITS.get(kind.name)
    packing = Packing(bits, GROUP) if bits else None
    return BlockType(kind.name, values, nbytes, packing, exact=kind.name not in _GROUPS_OF_16)


def empty_rows(kind: BlockType, rows: int, width: int, *, packed: bool) -> list[mx.array]:
    """Arrays for some rows of a matrix, all zero: weight, scales and biases when packed, else the numbers.

    Evaluated, so `np.asarray` of them is a view that may be written to: a matrix takes its own size in memory, once.
    bfloat16 numbers are uint16, to be viewed as bfloat16 when they are in place.
    """
    if packed:
        assert kind.packing is not None, kind
        words, groups = width * kind.packing.bits // 32, width // GROUP
        arrays = [mx.zeros((rows, words), dtype=mx.uint32), *(mx.zeros((rows, groups)) for _ in range(2))]
    else:
        types = {"F16": mx.float16, "BF16": mx.uint16}
        arrays = [mx.zeros((rows, width), dtype=types.get(kind.name, mx.float32))]
    mx.eval(arrays)
    return arrays


def read_rows(path: Path, offset: int, kind: BlockType, out: Sequence[np.ndarray], *, packed: bool) -> None:
    """Read as many rows as `out` has from the byte `offset` on, into `out`: views of `empty_rows`, or parts of them.

    Pieces are worked on side by side: NumPy lets go of the interpreter lock in each step.

    Raises:
        CheckpointError: the file ends before.
    """
    if not len(out[0]):
        return
    width = out[0].shape[1] if not packed else out[1].shape[1] * GROUP
    count, step = len(out[0]) * width // kind.values, max(1, _PIECE // kind.values)
    flat = [part.reshape(count, -1) for part in out]
    convert: Callable[[BlockType, np.ndarray], Arrays] = pack_blocks if packed else float_blocks
    with path.open("rb", buffering=0) as file:

        def fill(start: int) -> None:
            stop = min(start + step, count)
            wanted = (stop - start) * kind.nbytes
            raw = os.pread(file.fileno(), wanted, offset + start * kind.nbytes)
            if len(raw) != wanted:
                raise CheckpointError(f"{path}", got="a file that ends early", do="it is cut off: fetch it again")
            blocks = np.frombuffer(raw, dtype=np.uint8).reshape(-1, kind.nbytes)
            for part, values in zip(flat, convert(kind, blocks), strict=True):
                part[start:stop] = values

        starts = range(0, count, step)
        if len(starts) == 1 or (packed and not kind.exact):  # the second quantisation is MLX's own, on this thread
            for start in starts:
                fill(start)
        else:
            pieces = [_readers().submit(fill, start) for start in starts]
            wait(pieces)  # all of them, also when one fails: the file is closed then
            for piece in pieces:
                piece.result()


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(4, os.cpu_count() or 1), "mlx-gemma3 gguf")


def float_blocks(kind: BlockType, blocks: np.ndarray) -> Arrays:
    """(n, bytes) uint8 → the numbers (n, values): float32, or for F16 and BF16 as they are stored."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    if kind.name in _PLAIN:
        return (blocks.view(_PLAIN[kind.name]),)
    # One long row: the package walks rows in Python, and a block knows nothing of the row that it is in.
    values: np.ndarray = dequantize(blocks.reshape(1, -1), GGMLQuantizationType[kind.name])
    return (values.reshape(len(blocks), -1),)


def pack_blocks(kind: BlockType, blocks: np.ndarray) -> Arrays:
    """(n, bytes) uint8 → packed codes (n, values * bits / 32) uint32, scales and biases (n, values / 32) float32."""
    if not kind.exact:
        (values,) = float_blocks(kind, blocks)
        parts = mx.quantize(mx.array(values), group_size=GROUP, bits=8)
        mx.eval(parts)
        return tuple(np.asarray(part) for part in parts)
    codes, scales, biases = _unpack(kind, blocks)
    return _pack_codes(codes, _EXACT_BITS[kind.name]).view(np.uint32), scales, biases


def _unpack(kind: BlockType, blocks: np.ndarray) -> Arrays:
    """(n, bytes) → codes (n, values) uint8 in the order of the numbers, scales and biases (n, values / 32) float32."""
    if kind.name.endswith("_K"):
        return _unpack_k(blocks, high_bits=kind.name == "Q5_K")
    floats = 2 if kind.name.endswith("_1") else 1  # d, or d and m
    scale = _halves(blocks, 0)
    rest = blocks[:, 2 * floats :]
    if kind.name == "Q8_0":
        return np.bitwise_xor(rest, 0x80), scale, -128 * scale  # int8 + 128, as uint8
    codes, zero = _nibbles(rest[:, -16:], 16), 8
    if kind.name.startswith("Q5"):  # the fifth bits of all 32, in order
        codes |= np.unpackbits(rest[:, :4], axis=1, bitorder="little") << 4
        zero = 16
    return codes, scale, -zero * scale if floats == 1 else _halves(blocks, 2)


def _unpack_k(blocks: np.ndarray, *, high_bits: bool) -> Arrays:
    """Q4_K and Q5_K: d, dmin, 12 bytes of 6-bit factors, (32 bytes of fifth bits,) 128 bytes of low nibbles.

    Group j's factors, of scale and minimum: for j < 4 the low six bits of bytes j and j + 4; for the others the
    nibbles of byte j + 4 under the top two bits of bytes j - 4 and j.
    """
    packed = blocks[:, 4:16]
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = np.hstack((low & 63, (high & 15) | (low >> 6 << 4)))
    minimum = np.hstack((middle & 63, (high >> 4) | (middle >> 6 << 4)))
    codes = _nibbles(blocks[:, -128:], 32)
    if high_bits:  # bit j of byte i belongs to number i of group j
        fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]
        codes |= ((fifth & 1) << 4).reshape(len(blocks), -1)
    return codes, _halves(blocks, 0) * scale, -_halves(blocks, 2) * minimum


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at one place of each block: (n, 1) float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(raw: np.ndarray, run: int) -> np.ndarray:
    """(n, m) bytes → (n, 2m) codes: each `run` of bytes holds that many low nibbles, then as many high ones."""
    raw = np.ascontiguousarray(raw).reshape(len(raw), -1, run)
    codes = np.empty((len(raw), raw.shape[1], 2, run), dtype=np.uint8)
    np.bitwise_and(raw, 15, out=codes[:, :, 0])
    np.right_shift(raw, 4, out=codes[:, :, 1])
    return codes.reshape(len(raw), -1)


def _pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """(n, m) uint8 below 2**bits → (n, m * bits / 8) uint8: MLX's stream of bits, the first code lowest.

    Neighbours join in ever wider lanes: two codes of a byte each, then for 5 bits two pairs, two fours.
    """
    if bits == 8:
        return codes
    if bits == 4:
        pairs = codes.view(np.uint16)
        return (pairs | (pairs >> 4)).astype(np.uint8)
    lanes: np.ndarray = codes.view(np.uint64)  # eight codes
    lanes = (lanes & 0x001F001F001F001F) | ((lanes >> 3) & 0x03E003E003E003E0)
    lanes = (lanes & 0x000003FF000003FF) | ((lanes >> 6) & 0x000FFC00000FFC00)
    lanes = (lanes & 0x00000000000FFFFF) | ((lanes >> 12) & 0x000000FFFFF00000)
    return lanes.view(np.uint8).reshape(len(codes), -1, 8)[..., :5].reshape(len(codes), -1)

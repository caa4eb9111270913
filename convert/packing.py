"""Numbers → MLX's packed groups, with codes chosen for the scales that are written.

MLX's affine groups say `scale * code + bias`. `mx.quantize` takes scale and bias from a group's extremes and its codes
with them in float32; written as bfloat16 (8 significant bits) both move, the codes do not, and at 8 bits a third of the
error is that. Here scale and bias are rounded first and the codes are taken for what they became.

With `search` several ranges are tried for each group, a few extremes cut off, each improved by one step of least
squares, and the one with the smallest squared error is kept. docs/quantisation.md has what both are worth.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_gemma3.checkpoint.entries import Packing

_RANGES = (1.0, 0.9, 0.8)  # shares of a group's range that `search` tries
_LEAST = 1e-7  # smaller scales are of groups whose numbers are all the same


def pack(x: mx.array, packing: Packing, dtype: mx.Dtype, *, search: bool = False) -> tuple[mx.array, ...]:
    """Pack rows.

    Args:
        x: (R, W) float32, W a multiple of the group.
        dtype: of scales and biases, where the mode is affine.
        search: try several ranges; some ten times slower, for affine modes only.

    Returns:
        weight (R, W * bits / 32) uint32, scales (R, W / group) and, when affine, biases, both in `dtype`.
    """
    made = mx.quantize(x, group_size=packing.group_size, bits=packing.bits, mode=packing.mode)
    if packing.mode != "affine" or (dtype == mx.float32 and not search):  # nothing is rounded after the codes
        return tuple(made)
    rows = x.shape[0]
    groups = x.reshape(rows, -1, packing.group_size)  # (R, G, group)
    _, scales, biases = (part[..., None] for part in made)  # (R, G, 1)
    top = 2**packing.bits - 1
    if not search:
        scales, biases = _written(scales, dtype), _written(biases, dtype)
        codes = _codes(groups, scales, biases, top)
    else:
        codes, scales, biases = _searched(groups, scales, biases, top, dtype)
    return (
        join_codes(codes.astype(mx.uint32).reshape(rows, -1), packing.bits),
        scales[..., 0].astype(dtype),
        biases[..., 0].astype(dtype),
    )


def _searched(
    groups: mx.array, scales: mx.array, biases: mx.array, top: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scales and biases of the smallest squared error, group by group, of those tried."""
    middle = biases + scales * (top / 2)
    best: list[mx.array] = []
    for share in _RANGES:
        scale, bias = _written(scales * share, dtype), _written(middle - scales * (share * top / 2), dtype)
        codes = _codes(groups, scale, bias, top)
        for step in range(2):
            if step:
                scale, bias = (_written(part, dtype) for part in _least_squares(groups, codes, scale))
                codes = _codes(groups, scale, bias, top)
            error = mx.square(scale * codes + bias - groups).sum(axis=-1, keepdims=True)
            tried = [error, codes, scale, bias]
            if best:
                tried = [mx.where(error < best[0], new, old) for new, old in zip(tried, best, strict=True)]
            best = tried
            mx.eval(best)
    return best[1], best[2], best[3]


def _least_squares(groups: mx.array, codes: mx.array, scale: mx.array) -> tuple[mx.array, mx.array]:
    """The scale and bias that fit given codes best; the old scale where all codes of a group are the same."""
    codes_mean, mean = codes.mean(axis=-1, keepdims=True), groups.mean(axis=-1, keepdims=True)
    spread = codes - codes_mean
    squares = mx.square(spread).sum(axis=-1, keepdims=True)
    slope = (spread * (groups - mean)).sum(axis=-1, keepdims=True) / mx.maximum(squares, 1e-6)
    scale = mx.where(mx.abs(slope) > _LEAST, slope, scale)
    return scale, mean - scale * codes_mean


def _written(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """What a reader will find, as float32."""
    return x.astype(dtype).astype(mx.float32)


def _codes(groups: mx.array, scale: mx.array, bias: mx.array, top: int) -> mx.array:
    """The nearest code of each number, as whole float32 numbers."""
    return mx.clip(mx.round((groups - bias) / scale), 0, top)


def join_codes(codes: mx.array, bits: int) -> mx.array:
    """(R, W) uint32 below 2**bits → (R, W * bits / 32) uint32: one stream of bits a row, the first code lowest."""
    rows = codes.shape[0]
    codes = codes.reshape(rows, -1, 32)  # 32 codes are `bits` words
    words = []
    for word in range(bits):
        first, last = 32 * word // bits, (32 * word + 31) // bits  # codes that reach into it
        parts = codes[..., first : last + 1]
        shifts = [code * bits - 32 * word for code in range(first, last + 1)]
        up = mx.array([max(shift, 0) for shift in shifts], dtype=mx.uint32)
        down = mx.array([max(-shift, 0) for shift in shifts], dtype=mx.uint32)
        words.append(mx.right_shift(mx.left_shift(parts, up), down).sum(axis=-1))
    return mx.stack(words, axis=-1).reshape(rows, -1)

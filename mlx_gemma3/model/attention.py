"""Queries against the rows of a cache, plain or packed.

Plain rows go through MLX's fused attention. Packed ones are multiplied as they are, never unpacked as a whole; the
scores are real memory then, as they are on Metal for heads of 256 anyway.
"""

from __future__ import annotations

import mlx.core as mx

from .cache import KV_GROUP, Rows


def attend(
    q: mx.array, keys: Rows, values: Rows, *, scale: float, mask: mx.array | str | None, bits: int = 16
) -> mx.array:
    """softmax(q @ keysᵀ * scale + mask) @ values

    Args:
        q: (B, H, L, D); H a multiple of the rows' K, query head h uses row head h // (H / K).
        keys, values: (B, K, S, D) each, alone or packed in `bits` (see cache.Rows).
        mask: bool (B or 1, 1, L, S), "causal", or None for all.

    Returns:
        (B, H, L, D) in q's dtype.
    """
    if bits == 16:
        return mx.fast.scaled_dot_product_attention(q, keys[0], values[0], scale=scale, mask=mask)
    batch, heads, length, size = q.shape
    groups, count = keys[0].shape[1], keys[0].shape[2]
    # The H / K queries of a group are rows of one product, so that packed keys are read once for all of them.
    rows = (q * scale).reshape(batch, groups, heads // groups * length, size)
    scores = _multiply(rows, keys, bits=bits, transpose=True).reshape(batch, groups, heads // groups, length, count)
    if isinstance(mask, str):
        queries = mx.arange(count - length, count)[:, None]
        mask = (mx.arange(count)[None] <= queries)[None, None]
    if mask is not None:
        scores = mx.where(mask[:, :, None], scores, mx.finfo(scores.dtype).min)
    weights = mx.softmax(scores, axis=-1, precise=True).reshape(batch, groups, -1, count)
    return _multiply(weights, values, bits=bits, transpose=False).reshape(batch, heads, length, size)


def _multiply(x: mx.array, rows: Rows, *, bits: int, transpose: bool) -> mx.array:
    """x @ rows, or rowsᵀ"""
    weight, scales, biases = rows
    return mx.quantized_matmul(x, weight, scales, biases, transpose=transpose, group_size=KV_GROUP, bits=bits)


def attend_all(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """softmax(q @ kᵀ * scale) @ v, everything sees everything: (N, H, L, D) each → (N, H, L, D)."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)

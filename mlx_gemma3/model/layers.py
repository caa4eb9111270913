"""The small parts that the decoder and the projector share: RMSNorm(1 + w), RoPE, tanh GELU.

Source of each rule: transformers 5.23, modeling_gemma3.py (Gemma3RMSNorm, rotate_half, Gemma3MLP).
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn


class RMSNorm(nn.Module):
    """`x / rms(x) * (1 + weight)`, computed in float32 and returned in x's dtype.

    `1 + weight` is formed in float32: in bfloat16 it would lose the low bits of a weight near zero.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.zeros((size,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        gain = 1.0 + self.weight.astype(mx.float32)
        return mx.fast.rms_norm(x.astype(mx.float32), gain, self.eps).astype(x.dtype)


def rope(x: mx.array, *, theta: float, scale: float, offset: int | mx.array) -> mx.array:
    """Rotate the two halves of each head by position.

    Args:
        x: (B, H, L, D).
        theta: base of the frequencies.
        scale: positions are divided by it (linear scaling; 1 on local layers).
        offset: position of x[:, :, 0], one number or one a row (B,).
    """
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=theta, scale=1.0 / scale, offset=offset)


def gelu_tanh(x: mx.array) -> mx.array:
    """The tanh form of GELU (`gelu_pytorch_tanh`), in float32 inside, in x's dtype outside.

    Not mlx.nn's: that one is compiled, and on Linux's CPU backend compiling means a second of g++ at run time.
    """
    y = x.astype(mx.float32)
    inner = math.sqrt(2 / math.pi) * (y + 0.044715 * y * y * y)
    return (0.5 * y * (1 + mx.tanh(inner))).astype(x.dtype)

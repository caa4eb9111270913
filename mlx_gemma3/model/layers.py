"""The small parts of the decoder and the tower: RMSNorm(1 + w), RoPE, tanh GELU, and matrices that start empty.

mlx.nn's own Linear, Embedding and Conv2d draw random weights, from a state that MLX keeps for each thread and frees,
with Python's lock held, when the thread ends: an engine's thread that ended while the interpreter does would abort the
process. Ours start as zeros, which are never computed, since loading replaces them.

Source of each rule: transformers 5.23, modeling_gemma3.py (Gemma3RMSNorm, rotate_half, Gemma3MLP).
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np


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


class Linear(nn.Linear):
    """`x @ weight.T + bias`, weight (out, in)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        nn.Module.__init__(self)
        self.weight = mx.zeros((outputs, inputs))
        if bias:
            self.bias = mx.zeros((outputs,))

    def to_quantized(self, group_size: int, bits: int, mode: str = "affine", **_: object) -> nn.QuantizedLinear:
        packed = _packed(nn.QuantizedLinear, self.weight, group_size, bits, mode)
        if "bias" in self:
            packed.bias = self.bias
        return packed


class Embedding(nn.Embedding):
    """Rows by id, weight (V, D); `as_linear` is the tied head."""

    def __init__(self, count: int, size: int) -> None:
        nn.Module.__init__(self)
        self.weight = mx.zeros((count, size))

    def to_quantized(self, group_size: int, bits: int, mode: str = "affine", **_: object) -> nn.QuantizedEmbedding:
        packed = _packed(nn.QuantizedEmbedding, self.weight, group_size, bits, mode)
        packed.num_embeddings, packed.dims = self.weight.shape
        return packed


class PatchConv(nn.Conv2d):
    """A convolution over patches side by side, weight (out, patch, patch, 3)."""

    def __init__(self, outputs: int, patch: int) -> None:
        nn.Module.__init__(self)
        self.weight = mx.zeros((outputs, patch, patch, 3))
        self.bias = mx.zeros((outputs,))
        self.stride, self.padding, self.dilation, self.groups = (patch, patch), (0, 0), 1, 1


def _packed(kind: Any, weight: mx.array, group_size: int, bits: int, mode: str) -> nn.Module:
    """An mlx.nn quantised module with weight's packed form, made without its constructor."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.group_size, module.bits, module.mode = group_size, bits, mode
    module.weight, module.scales, *biases = mx.quantize(weight, group_size=group_size, bits=bits, mode=mode)
    module.biases = biases[0] if biases else None
    return module


class Rope:
    """Rotates the two halves of each head by position.

    The D / 2 wavelengths are computed once, and rounded once to float32, as the reference's inverses are
    (modeling_rope_utils.py). Of an nn.Module this is no parameter.

    Args:
        size: D.
        theta: base of the wavelengths.
        scale: positions are divided by it (linear scaling; 1 on local layers).
    """

    def __init__(self, size: int, theta: float, scale: float) -> None:
        self.wavelengths = mx.array((scale * theta ** (np.arange(0, size, 2) / size)).astype(np.float32))

    def __call__(self, x: mx.array, offset: mx.array) -> mx.array:
        return rotate(x, offset, self.wavelengths)


def rotate(x: mx.array, offset: mx.array, wavelengths: mx.array) -> mx.array:
    """x (B, H, L, D), offset the position of x[:, :, 0], one number or one a row (B,); wavelengths (D / 2,)."""
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=offset, freqs=wavelengths)


def gelu_tanh(x: mx.array) -> mx.array:
    """The tanh form of GELU (`gelu_pytorch_tanh`), in float32 inside, in x's dtype outside.

    Not mlx.nn's: that one is compiled, and on Linux's CPU backend compiling means a second of g++ at run time.
    """
    y = x.astype(mx.float32)
    inner = math.sqrt(2 / math.pi) * (y + 0.044715 * y * y * y)
    return (0.5 * y * (1 + mx.tanh(inner))).astype(x.dtype)

"""Pictures to rows: the SigLIP tower, then pooling and projection to the decoder's width.

Source of each rule: transformers 5.23, modeling_siglip.py and modeling_gemma3.py (Gemma3MultiModalProjector).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import Config, VisionConfig
from .attention import attend_all
from .layers import Embedding, Linear, PatchConv, RMSNorm, gelu_tanh


@dataclass(frozen=True)
class TowerKernels:
    """How a device computes the large parts of the tower. The defaults are the rule."""

    multiply: Callable[[nn.Module, mx.array], mx.array] = lambda module, x: module(x)  # a matrix or convolution of it
    attend: Callable[[mx.array, mx.array, mx.array, float], mx.array] = attend_all
    gelu: Callable[[mx.array], mx.array] = gelu_tanh
    project: Callable[[Any, mx.array], mx.array] = lambda projector, x: projector.project(x)


PLAIN = TowerKernels()


class VisionEmbeddings(nn.Module):
    """Patches, row by row, each with a learned position; no class token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = PatchConv(config.hidden_size, config.patch_size)
        self.places = config.grid**2
        self.position_embedding = Embedding(self.places, config.hidden_size)

    def __call__(self, pixels: mx.array, kernels: TowerKernels) -> mx.array:
        """(N, S, S, 3) → (N, patches, hidden)"""
        patches = kernels.multiply(self.patch_embedding, pixels)  # (N, grid, grid, hidden)
        return patches.flatten(1, 2) + self.position_embedding(mx.arange(self.places))


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.scale = (size // self.heads) ** -0.5
        self.q_proj = Linear(size, size, bias=True)
        self.k_proj = Linear(size, size, bias=True)
        self.v_proj = Linear(size, size, bias=True)
        self.out_proj = Linear(size, size, bias=True)

    def __call__(self, x: mx.array, kernels: TowerKernels) -> mx.array:
        count, length, _ = x.shape
        q, k, v = (
            kernels.multiply(proj, x).reshape(count, length, self.heads, -1).transpose(0, 2, 1, 3)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = kernels.attend(q, k, v, self.scale)  # (N, H, patches, D)
        return kernels.multiply(self.out_proj, out.transpose(0, 2, 1, 3).reshape(count, length, -1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def __call__(self, x: mx.array, kernels: TowerKernels) -> mx.array:
        return kernels.multiply(self.fc2, kernels.gelu(kernels.multiply(self.fc1, x)))


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, x: mx.array, kernels: TowerKernels) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x), kernels)
        return x + self.mlp(self.layer_norm2(x), kernels)


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = [VisionLayer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, x: mx.array, kernels: TowerKernels) -> mx.array:
        for layer in self.layers:
            x = layer(x, kernels)
        return x


class VisionTower(nn.Module):
    """SigLIP without its pooling head."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, pixels: mx.array, kernels: TowerKernels = PLAIN) -> mx.array:
        """(N, S, S, 3) in [-1, 1] → (N, patches, hidden), in the dtype of the weights."""
        pixels = pixels.astype(self.post_layernorm.weight.dtype)
        return self.post_layernorm(self.encoder(self.embeddings(pixels, kernels), kernels))


class Projector(nn.Module):
    """Average pool to sqrt(T) by sqrt(T), RMSNorm, then a plain matrix (in, out): `x @ W`."""

    def __init__(self, config: Config, vision: VisionConfig) -> None:
        super().__init__()
        self.mm_input_projection_weight = mx.zeros((vision.hidden_size, config.text.hidden_size))
        self.mm_soft_emb_norm = RMSNorm(vision.hidden_size, vision.layer_norm_eps)
        self.grid, self.side = vision.grid, math.isqrt(config.mm_tokens_per_image)

    def __call__(self, x: mx.array, kernels: TowerKernels = PLAIN) -> mx.array:
        """(N, patches, hidden) → (N, T, D)"""
        return kernels.project(self, self.pool(x))

    def pool(self, x: mx.array) -> mx.array:
        """(N, patches, hidden) → (N, T, hidden), normed"""
        count, _, size = x.shape
        kernel = self.grid // self.side
        x = x.reshape(count, self.side, kernel, self.side, kernel, size)
        pooled = x.astype(mx.float32).mean(axis=(2, 4)).astype(x.dtype)  # float32: the mean of 16 rows rounds once
        rows: mx.array = self.mm_soft_emb_norm(pooled.flatten(1, 2))
        return rows

    def project(self, rows: mx.array) -> mx.array:
        """(N, T, hidden) → (N, T, D)"""
        return rows @ self.mm_input_projection_weight

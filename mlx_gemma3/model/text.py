"""The decoder: rows in, rows out. Attributes are named as the checkpoint's tensors.

Source of each rule: transformers 5.23, modeling_gemma3.py (Gemma3Attention, Gemma3DecoderLayer, Gemma3TextModel).
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from ..config import TextConfig
from .attention import attend
from .context import Context
from .layers import Embedding, Linear, RMSNorm, Rope, gelu_tanh
from .shard import WHOLE, Shard


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys; global or local by the layer's place."""

    def __init__(self, config: TextConfig, layer: int, shard: Shard = WHOLE) -> None:
        super().__init__()
        self.shard = shard
        self.heads, self.kv_heads, self.head_dim = shard.heads(config), len(shard.kv_range(config)), config.head_dim
        self.scale = config.query_pre_attn_scalar**-0.5
        self.layer, is_global = layer, config.is_global(layer)
        self.window = None if is_global else config.sliding_window
        theta, scale = (config.rope_theta, config.rope_scale) if is_global else (config.rope_local_theta, 1.0)
        self.rotate = Rope(self.head_dim, theta, scale)
        size, q_size, kv_size = config.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = Linear(size, q_size, bias=False)
        self.k_proj = Linear(size, kv_size, bias=False)
        self.v_proj = Linear(size, kv_size, bias=False)
        self.o_proj = Linear(q_size, size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def __call__(self, x: mx.array, context: Context) -> mx.array:
        q, k, v = self._heads(self.q_proj(x)), self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        q, k = self.rotate(self.q_norm(q), context.positions), self.rotate(self.k_norm(k), context.positions)
        out = context.attend(q, k, v, self, attend)  # (B, H, L, D)
        batch, _, length, _ = out.shape
        return self.shard.sum(self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1)))

    def _heads(self, x: mx.array) -> mx.array:
        """(B, L, heads * D) → (B, heads, L, D)"""
        batch, length, _ = x.shape
        return x.reshape(batch, length, -1, self.head_dim).transpose(0, 2, 1, 3)


class MLP(nn.Module):
    """`down(gelu_tanh(gate(x)) * up(x))`"""

    def __init__(self, config: TextConfig, shard: Shard = WHOLE) -> None:
        super().__init__()
        self.shard, inner = shard, config.intermediate_size // shard.size
        self.gate_proj = Linear(config.hidden_size, inner, bias=False)
        self.up_proj = Linear(config.hidden_size, inner, bias=False)
        self.down_proj = Linear(inner, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.shard.sum(self.down_proj(gelu_tanh(self.gate_proj(x)) * self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Attention and MLP, each normed before and after, each added to the residual."""

    def __init__(self, config: TextConfig, layer: int, shard: Shard = WHOLE) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer, shard)
        self.mlp = MLP(config, shard)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, context: Context) -> mx.array:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), context))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class TextModel(nn.Module):
    """Embedding, layers, final norm. The head is the embedding again, or gemma3.py's lm_head."""

    def __init__(self, config: TextConfig, shard: Shard = WHOLE) -> None:
        """
        Args:
            shard: the part of it that this machine holds.
        """
        super().__init__()
        self.config, self.shard = config, shard
        self.embed_tokens = Embedding(len(shard.vocabulary(config)), config.hidden_size)
        self.layers = [DecoderLayer(config, layer, shard) for layer in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.embed_scale = math.sqrt(config.hidden_size)

    def embed(self, tokens: mx.array) -> mx.array:
        """(B, L) ids → (B, L, D) rows, scaled by sqrt(D), in the dtype of the activations.

        The scale is rounded to that dtype first (modeling_gemma3.py:113-116): 50.5 instead of 50.596 for 4B in
        bfloat16, exact in float32.
        """
        dtype = self.norm.weight.dtype
        rows = self.shard.embed(self.embed_tokens, tokens, self.config, dtype)
        return rows * mx.array(self.embed_scale, dtype=dtype)

    def __call__(self, x: mx.array, context: Context, *, last_only: bool = False) -> mx.array:
        """(B, L, D) rows → (B, L, D) normed rows, or (B, 1, D), the last ones."""
        for layer in self.layers:
            x = layer(x, context)
        return self.norm(x[:, -1:] if last_only else x)

"""The decoder once more, in fewer steps: what a loaded model runs on. text.py is the rule; tests hold this equal to it.

    x ─ norm ─ [q|k|v] ┬ q|k: norm × gains ─ rope ┐
                       └ v ───────────────────────┴ cache ─ attention ─ o ─ norm ─ + ─┐
      ┌───────────────────────────────────────────────────────────────────────────────┘
      └ norm ─ [gate|up] ─ GeGLU ─ down ─ norm ─ +

Matrices that read the same rows are one matrix, as far as they are packed alike; queries and keys are normed and
rotated together; a norm's gain 1 + w is stored; GeGLU is one kernel on a GPU. In float32 the numbers are those of
text.py; in bfloat16 a gain is rounded once more, since Metal's norm takes rows and gain of one type.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .attention import attend
from .cache import Caches, GlobalCache, WindowCache
from .layers import RMSNorm
from .text import Attention, Context, DecoderLayer, TextModel

Multiply = Callable[[mx.array], mx.array]  # (…, in) → (…, out)
Multiplier = Callable[[nn.Module], Multiply]  # of a matrix module


@dataclass(frozen=True)
class Kernels:
    """How a device computes the large parts."""

    multiplier: Multiplier
    attend: Callable[..., mx.array]  # attention.attend
    geglu: Callable[[mx.array, mx.array], mx.array]  # gelu_tanh(gate) * up
    norm: Callable[[mx.array, mx.array | None, float], mx.array]  # mx.fast.rms_norm
    add: Callable[[mx.array, mx.array], mx.array] = operator.add


class LeanText:
    """The same rows as TextModel, from the same weights: parts that were joined become views of the whole.

    Weights must not be replaced afterwards.
    """

    def __init__(self, text: TextModel, kernels: Kernels, between: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            between: called before each layer.
        """
        dtype = text.norm.weight.dtype
        self.layers: list[LeanLayer] = []
        for layer in text.layers:
            between()
            self.layers.append(LeanLayer(layer, kernels, dtype))
        self.norm, self.gain, self.eps = kernels.norm, gain(text.norm, dtype), text.norm.eps

    def __call__(
        self,
        x: mx.array,
        *,
        caches: Caches | None = None,
        blocks: mx.array | None = None,
        padding: tuple[int, ...] | None = None,
    ) -> mx.array:
        """See TextModel."""
        context = Context(x.shape[1], caches.offset if caches is not None else 0, blocks, padding)
        for index, layer in enumerate(self.layers):
            x = layer(x, context, caches[index] if caches is not None else None)
        return self.norm(x, self.gain, self.eps)


class LeanLayer:
    """See DecoderLayer."""

    def __init__(self, layer: DecoderLayer, kernels: Kernels, dtype: mx.Dtype) -> None:
        attention, mlp, multiplier = layer.self_attn, layer.mlp, kernels.multiplier
        self.attention: Attention = attention
        self.borders = [attention.heads, attention.heads + attention.kv_heads]
        self.qkv = joined([attention.q_proj, attention.k_proj, attention.v_proj], multiplier)
        self.gate_up = joined([mlp.gate_proj, mlp.up_proj], multiplier)
        self.o, self.down = multiplier(attention.o_proj), multiplier(mlp.down_proj)
        self.attend, self.geglu, self.norm, self.add = kernels.attend, kernels.geglu, kernels.norm, kernels.add
        self.eps = layer.input_layernorm.eps
        gains = [*[attention.q_norm] * attention.heads, *[attention.k_norm] * attention.kv_heads]
        self.qk_gains = mx.stack([gain(norm, dtype) for norm in gains])[:, None]  # (H + K, 1, D)
        mx.eval(self.qk_gains)
        self.before_attention = gain(layer.input_layernorm, dtype)
        self.after_attention = gain(layer.post_attention_layernorm, dtype)
        self.before_mlp = gain(layer.pre_feedforward_layernorm, dtype)
        self.after_mlp = gain(layer.post_feedforward_layernorm, dtype)

    def __call__(self, x: mx.array, context: Context, cache: GlobalCache | WindowCache | None) -> mx.array:
        norm, add, eps = self.norm, self.add, self.eps
        attended = self._attend(norm(x, self.before_attention, eps), context, cache)
        x = add(x, norm(attended, self.after_attention, eps))
        gate, up = mx.split(self.gate_up(norm(x, self.before_mlp, eps)), 2, axis=-1)
        return add(x, norm(self.down(self.geglu(gate, up)), self.after_mlp, eps))

    def _attend(self, x: mx.array, context: Context, cache: GlobalCache | WindowCache | None) -> mx.array:
        rule, size = self.attention, self.attention.head_dim
        batch, length, _ = x.shape
        if length == 1:  # nothing to turn round
            qkv = self.qkv(x).reshape(batch, -1, 1, size)
        else:
            qkv = self.qkv(x).reshape(batch, length, -1, size).transpose(0, 2, 1, 3)
        qk, v = mx.split(qkv, self.borders[1:], axis=1)  # (B, H + K, L, D), (B, K, L, D)
        qk = rule.rotate(self.norm(qk, None, self.eps) * self.qk_gains, context.positions)
        q, k = mx.split(qk, self.borders[:1], axis=1)
        keys, values = ((k,), (v,)) if cache is None else cache.update_and_fetch(k, v)
        mask = context.mask(keys[0].shape[2], rule.window)
        bits = 16 if cache is None else cache.keys.bits
        out = self.attend(q, keys, values, scale=rule.scale, mask=mask, bits=bits)
        return self.o((out if length == 1 else out.transpose(0, 2, 1, 3)).reshape(batch, length, -1))


def joined(modules: Sequence[nn.Module], multiplier: Multiplier) -> Multiply:
    """Several matrices that read the same rows, (…, in) → (…, out of all); neighbours packed alike are one product."""
    parts: list[Multiply] = []
    for _, run in groupby(modules, key=_packing):
        alike = list(run)
        whole = alike[0] if len(alike) == 1 else _stacked(alike)
        parts.append(multiplier(whole))
        if len(alike) > 1:
            _share(whole, alike)
    if len(parts) == 1:
        return parts[0]
    return lambda x: mx.concatenate([multiply(x) for multiply in parts], axis=-1)


def gpu_kernels(*, compiled: bool = True) -> Kernels:
    """Of a GPU: matrices as they are stored, MLX's fused attention, one kernel for GeGLU.

    Args:
        compiled: compile GeGLU. On Linux's CPU backend that calls g++ at run time.
    """
    return Kernels(
        multiplier, attend, mx.compile(gelu_times, shapeless=True) if compiled else gelu_times, mx.fast.rms_norm
    )


def multiplier(module: nn.Module) -> Multiply:
    """A matrix as the checkpoint stores it, plain or packed."""
    mx.eval(module.parameters())
    if "scales" not in module:
        turned = module.weight.T
        return lambda x: x @ turned
    weight, scales, biases = module.weight, module.scales, module.biases
    group, bits, mode = module.group_size, module.bits, module.mode
    return lambda x: mx.quantized_matmul(x, weight, scales, biases, True, group, bits, mode)


def gain(norm: RMSNorm, dtype: mx.Dtype) -> mx.array:
    """1 + w, added in float32."""
    stored = (1.0 + norm.weight.astype(mx.float32)).astype(dtype)
    mx.eval(stored)
    return stored


def gelu_times(gate: mx.array, up: mx.array) -> mx.array:
    """layers.gelu_tanh(gate) * up, in float32 inside; tanh as a sigmoid: (1 + tanh z) / 2 = sigmoid(2 z).

    In this order it is 11 steps deep, which is as much as MLX puts into one kernel.
    """
    y = gate.astype(mx.float32)
    a = 2 * math.sqrt(2 / math.pi)
    return ((up * y) * mx.sigmoid(y * (a + (0.044715 * a) * mx.square(y)))).astype(gate.dtype)


def _packing(module: nn.Module) -> tuple[object, ...]:
    if "scales" not in module:
        return ("plain", str(module.weight.dtype))
    return (module.bits, module.group_size, module.mode, str(module.scales.dtype))


def _stacked(modules: Sequence[nn.Module]) -> nn.Module:
    """A module of the same kind with the rows of all."""
    first = modules[0]
    kind: Any = type(first)
    whole: nn.Module = kind.__new__(kind)
    nn.Module.__init__(whole)
    for name in ("weight", "scales", "biases"):
        if first.get(name) is not None:
            whole[name] = mx.concatenate([module[name] for module in modules])
    if "scales" in first:
        whole.group_size, whole.bits, whole.mode = first.group_size, first.bits, first.mode
        whole.biases = whole.get("biases")
    return whole


def _share(whole: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Let the parts be rows of the whole, so that nothing is held twice."""
    borders = list(accumulate((module.weight.shape[0] for module in modules), initial=0))
    for module, start, stop in zip(modules, borders, borders[1:], strict=False):
        for name in ("weight", "scales", "biases"):
            if whole.get(name) is not None:
                module[name] = whole[name][start:stop]
        mx.eval(module.parameters())

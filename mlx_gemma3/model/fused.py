"""The decoder once more, in fewer steps: what a loaded model runs on. text.py is the rule; tests hold this equal to it.

        x ─ norm ─ [q|k|v] ┬ q|k: norm × gains ─ rope ┐
    before                 └ v ───────────────────────┴ cache ─ attention
    ──────────────────────────────────────────────────────────────┐
    after   o ─ norm ─ + ─ norm ─ [gate|up] ─ GeGLU ─ down ─ norm ─ +

Matrices that read the same rows are one matrix, as far as they are packed alike; queries and keys are normed and
rotated together; a norm's gain 1 + w is stored. On a GPU GeGLU is one kernel, and for one token a row what happens
before and after attention is a compiled graph, the same for all layers: their weights are its inputs. An adapter's
matrices stand beside them (adapter_terms.py); without one nothing is computed for it. In float32 the
numbers are those of text.py; in bfloat16 a gain is rounded once more, since Metal's norm takes rows and gain of one
type.
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

from .adapter_terms import Term, Terms, adapted_by, add_product
from .attention import attend
from .context import Context
from .layers import RMSNorm, rotate
from .text import Attention, DecoderLayer, TextModel
from .vision import TowerKernels

Matrix = Any  # as a device wants to multiply with it: arrays and constants, or a function
Matrices = list[Matrix]  # that read the same rows, their results side by side
Function = Callable[..., Any]


@dataclass(frozen=True)
class Kernels:
    """How a device computes the large parts."""

    matrix: Callable[[nn.Module], Matrix]
    multiply: Callable[[mx.array, Matrix], mx.array]  # (…, in) → (…, out)
    attend: Callable[..., mx.array]  # attention.attend
    geglu: Callable[[mx.array, mx.array], mx.array]  # gelu_tanh(gate) * up
    norm: Callable[[mx.array, mx.array | None, float], mx.array]  # mx.fast.rms_norm
    add: Callable[[mx.array, mx.array], mx.array] = operator.add
    add_product: Callable[[mx.array, mx.array, Matrix], mx.array] = add_product  # y + what `multiply` gives
    compile: Callable[[Function], Function] = lambda function: function  # of arrays and constants
    ahead: bool = True  # it computes while the host goes on, so that the next step can be issued early


class FusedDecoder:
    """The same numbers as TextModel, from the same weights: parts that were joined become views of the whole.

    Weights must not be replaced afterwards.
    """

    def __init__(self, text: TextModel, kernels: Kernels, between: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            between: called before each layer.
        """
        dtype = text.norm.weight.dtype
        self.layers: list[FusedLayer] = []
        for layer in text.layers:
            between()
            self.layers.append(FusedLayer(layer, kernels, dtype))
        self.gain, self.eps = gain(text.norm, dtype), text.norm.eps
        self.kernels = kernels
        self.parts = LayerFunctions(kernels, text.layers[0].self_attn, self.eps)
        self.before, self.after = kernels.compile(self.parts.before), kernels.compile(self.parts.after)

    def __call__(
        self, x: mx.array, context: Context, *, last_only: bool = False, adapted: Terms | None = None
    ) -> mx.array:
        """See TextModel. With `last_only` the last layer reads all rows into its cache, and goes on with one.

        Args:
            adapted: what the sequences have beside the matrices; None without adapters.
        """
        # A graph is compiled for each shape, and prompts have many.
        single = x.shape[1] == 1
        before, after = (self.before, self.after) if single else (self.parts.before, self.parts.after)
        more: tuple[tuple[Any, ...], tuple[Any, ...]] = ((), ())
        for number, layer in enumerate(self.layers):
            if adapted is not None:
                terms = adapted.layers[number]
                more = ((terms[0], adapted.slots), (terms[1], adapted.slots))
            q, k, v = before(x, context.positions, *layer.before, *more[0])
            if last_only and layer is self.layers[-1]:
                q, x = q[:, :, -1:], x[:, -1:]
            x = after(x, context.attend(q, k, v, layer.rule, self.kernels.attend), *layer.after, *more[1])
        return self.kernels.norm(x, self.gain, self.eps)


class FusedLayer:
    """The weights of a DecoderLayer, as LayerFunctions takes them."""

    def __init__(self, layer: DecoderLayer, kernels: Kernels, dtype: mx.Dtype) -> None:
        self.rule = attention = layer.self_attn
        mlp = layer.mlp
        gains = [*[attention.q_norm] * attention.heads, *[attention.k_norm] * attention.kv_heads]
        qk_gains = mx.stack([gain(norm, dtype) for norm in gains])[None, :, None]  # (1, H + K, 1, D')
        mx.eval(qk_gains)
        self.before = (
            gain(layer.input_layernorm, dtype),
            joined([attention.q_proj, attention.k_proj, attention.v_proj], kernels.matrix),
            qk_gains,
            attention.rotate.wavelengths,
        )
        self.after = (
            kernels.matrix(attention.o_proj),
            gain(layer.post_attention_layernorm, dtype),
            gain(layer.pre_feedforward_layernorm, dtype),
            joined([mlp.gate_proj, mlp.up_proj], kernels.matrix),
            kernels.matrix(mlp.down_proj),
            gain(layer.post_feedforward_layernorm, dtype),
        )


class LayerFunctions:
    """What a layer does before its attention, and after it, with the weights of any layer."""

    def __init__(self, kernels: Kernels, attention: Attention, eps: float) -> None:
        self.kernels, self.eps = kernels, eps
        self.heads, self.kv_heads, self.size = attention.heads, attention.kv_heads, attention.head_dim
        self.sum = attention.shard.sum  # over the machines

    def before(
        self,
        x: mx.array,
        positions: mx.array,
        gain: mx.array,
        qkv: Matrices,
        qk_gains: mx.array,
        wavelengths: mx.array,
        terms: tuple[Term | None, ...] = (None,),
        slots: mx.array | None = None,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """x (B, L, D) → queries (B, H, L, D'), keys and values (B, K, L, D')

        Args:
            terms: of adapters, beside q|k|v.
            slots: see adapter_terms.Terms.
        """
        norm, (batch, length, _) = self.kernels.norm, x.shape
        rows = self._multiply(norm(x, gain, self.eps), qkv, terms[0], slots)
        if length == 1:  # nothing to turn round
            heads = rows.reshape(batch, -1, 1, self.size)
        else:
            heads = rows.reshape(batch, length, -1, self.size).transpose(0, 2, 1, 3)
        qk, v = mx.split(heads, [self.heads + self.kv_heads], axis=1)
        q, k = mx.split(rotate(norm(qk, None, self.eps) * qk_gains, positions, wavelengths), [self.heads], axis=1)
        return q, k, v

    def after(
        self,
        x: mx.array,
        attended: mx.array,
        o: Matrix,
        after_attention: mx.array,
        before_mlp: mx.array,
        gate_up: Matrices,
        down: Matrix,
        after_mlp: mx.array,
        terms: tuple[Term | None, ...] = (None, None, None),
        slots: mx.array | None = None,
    ) -> mx.array:
        """x (B, L, D) and what its queries found (B, H, L, D') → (B, L, D)

        Args:
            terms: of adapters, beside o, gate|up and down.
            slots: see adapter_terms.Terms.
        """
        kernels, eps, (batch, length, _) = self.kernels, self.eps, x.shape
        found = (attended if length == 1 else attended.transpose(0, 2, 1, 3)).reshape(batch, length, -1)
        found = self.sum(self._multiply(found, [o], terms[0], slots))
        x = kernels.add(x, kernels.norm(found, after_attention, eps))
        both = self._multiply(kernels.norm(x, before_mlp, eps), gate_up, terms[1], slots)
        gate, up = mx.split(both, 2, axis=-1)
        inner = kernels.geglu(gate, up)
        found = self.sum(self._multiply(inner, [down], terms[2], slots))
        return kernels.add(x, kernels.norm(found, after_mlp, eps))

    def _multiply(self, x: mx.array, matrices: Matrices, term: Term | None, slots: mx.array | None) -> mx.array:
        parts = [self.kernels.multiply(x, matrix) for matrix in matrices]
        y = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
        kernels = self.kernels
        return y if term is None else adapted_by(y, x, term, slots, kernels.multiply, kernels.add_product)


def joined(modules: Sequence[nn.Module], matrix: Callable[[nn.Module], Matrix]) -> Matrices:
    """Matrices that read the same rows; neighbours packed alike are one."""
    matrices = []
    for _, run in groupby(modules, key=_packing):
        alike = list(run)
        whole = alike[0] if len(alike) == 1 else _stacked(alike)
        matrices.append(matrix(whole))
        if len(alike) > 1:
            _share(whole, alike)
    return matrices


def gpu_kernels(*, compiled: bool = True) -> Kernels:
    """Of a GPU: matrices as they are stored, MLX's fused attention, one kernel for GeGLU.

    Args:
        compiled: on Linux's CPU backend that calls g++ at run time.
    """
    if not compiled:
        return Kernels(matrix, multiply, attend, gelu_times, mx.fast.rms_norm)
    geglu = mx.compile(gelu_times, shapeless=True)
    return Kernels(matrix, multiply, attend, geglu, mx.fast.rms_norm, compile=mx.compile)


def gpu_tower(*, compiled: bool = True) -> TowerKernels:
    """Of a GPU, for the vision tower: GELU in one kernel. MLX has kernels for heads of 72 as they are."""
    return TowerKernels(gelu=mx.compile(gelu, shapeless=True) if compiled else gelu)


def matrix(module: nn.Module) -> Matrix:
    """A matrix as the checkpoint stores it: (weightᵀ,), or the arrays and constants of a packed one."""
    mx.eval(module.parameters())
    if "scales" not in module:
        turned = module.weight.T
        mx.eval(turned)
        return (turned,)
    return module.weight, module.scales, module.biases, True, module.group_size, module.bits, module.mode


def multiply(x: mx.array, matrix: Matrix) -> mx.array:
    """(…, in) → (…, out)"""
    return x @ matrix[0] if len(matrix) == 1 else mx.quantized_matmul(x, *matrix)


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


def gelu(x: mx.array) -> mx.array:
    """layers.gelu_tanh, by the same form."""
    y = x.astype(mx.float32)
    a = 2 * math.sqrt(2 / math.pi)
    return (y * mx.sigmoid(y * (a + (0.044715 * a) * mx.square(y)))).astype(x.dtype)


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

"""What training computes on MLX's CPU backend: the model's own formulas and their derivatives, by numpy.

MLX's Linux wheel multiplies with a reference BLAS on one thread (model/cpu.py); a step of training is all products. So
the modules of a model are replaced, one by one, by modules that compute the same with numpy and tell MLX's automatic
differentiation their derivative. Only inputs are kept for the way back; what can be computed again is. tests hold
every one of these against MLX's own derivative of the plain module.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import pi, sqrt
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..model import attention, cpu
from ..model.cache import Rows
from ..model.context import Context
from ..model.gemma3 import Gemma3
from ..model.layers import PatchConv, RMSNorm
from ..model.text import MLP, Attention
from ..model.unpacking import BLOCK, Floats, floats, matrix_rows, unpacked_bytes
from ..model.vision import TowerKernels


class Matrix:
    """A frozen matrix (out, in), plain or packed, as products in both directions need it."""

    def __init__(self, module: nn.Module, *, unpack: bool) -> None:
        """
        Args:
            unpack: keep a packed one as float32 too, from its first product on.
        """
        mx.eval(module.parameters())
        self._rows, self.count, self._step = matrix_rows(module)
        packed = "scales" in module
        self.width = module.scales.shape[1] * module.group_size if packed else module.weight.shape[1]
        if self._step == 0:  # it is float32 already
            self._whole: Floats | None = self._rows(slice(0, self.count), np.empty((0, 0), np.float32))
        else:
            self._whole = None
        self._unpack = unpack

        @mx.custom_function
        def multiplied(x: mx.array) -> mx.array:
            return self.forward(x)

        @multiplied.vjp
        def back(x: mx.array, slope: mx.array, _: mx.array) -> mx.array:
            return self.backward(slope)

        self._multiplied = multiplied

    def __call__(self, x: mx.array) -> mx.array:
        """(…, in) → (…, out), with a derivative."""
        return _array(self._multiplied(x))

    def forward(self, x: mx.array) -> mx.array:
        """(…, in) → (…, out)"""
        left = _flat(x)

        def write(out: Floats) -> None:
            for some, rows in self._parts():
                np.matmul(left, rows.T, out=out[:, some])

        return cpu.written((len(left), self.count), write).reshape(*x.shape[:-1], self.count)

    def backward(self, slope: mx.array) -> mx.array:
        """(…, out) → (…, in): what each input's slope is by those of the outputs."""
        left = _flat(slope)

        def write(out: Floats) -> None:
            for number, (some, rows) in enumerate(self._parts()):
                if number == 0:
                    np.matmul(left[:, some], rows, out=out)
                else:
                    out += left[:, some] @ rows

        return cpu.written((len(left), self.width), write).reshape(*slope.shape[:-1], self.width)

    def _parts(self) -> list[tuple[slice, Floats]] | Any:
        if self._whole is None and self._unpack:
            room: Floats = np.empty((self.count, self.width), np.float32)
            for some in self._slices():
                found = self._rows(some, room[some])
                if found.base is not room:
                    room[some] = found
            self._whole = room
        if self._whole is not None:
            return [(slice(0, self.count), self._whole)]
        room = np.empty((self._step, self.width), np.float32)
        return ((some, self._rows(some, room)) for some in self._slices())

    def _slices(self) -> list[slice]:
        return [slice(at, min(at + self._step, self.count)) for at in range(0, self.count, self._step)]


class HostLinear(nn.Module):
    """A frozen matrix and its bias."""

    def __init__(self, base: nn.Module, *, unpack: bool) -> None:
        super().__init__()
        self._base, self._matrix = base, Matrix(base, unpack=unpack)

    def __call__(self, x: mx.array) -> mx.array:
        y = self._matrix(x)
        return y + self._base.bias if "bias" in self._base else y


class HostLoRA(nn.Module):
    """mlx-lm's LoRALinear: the same parameters under the same names, the same product."""

    def __init__(self, lora: nn.Module, *, unpack: bool) -> None:
        super().__init__()
        self._linear = HostLinear(lora.linear, unpack=unpack)
        self._scale = lora.scale
        self.lora_a, self.lora_b = lora.lora_a, lora.lora_b

    def __call__(self, x: mx.array) -> mx.array:
        low = multiply(multiply(x, self.lora_a), self.lora_b)
        return self._linear(x) + self._scale * low


class HostDoRA(nn.Module):
    """mlx-lm's DoRALinear, likewise."""

    def __init__(self, dora: nn.Module, *, unpack: bool) -> None:
        super().__init__()
        self._matrix = Matrix(dora.linear, unpack=unpack)
        self._base, self._scale = dora.linear, dora.scale
        self._weight = floats(dora._dequantized_weight())
        self.lora_a, self.lora_b, self.m = dora.lora_a, dora.lora_b, dora.m

    def __call__(self, x: mx.array) -> mx.array:
        y = self._matrix(x) + self._scale * multiply(multiply(x, self.lora_a), self.lora_b)
        a, b = floats(mx.stop_gradient(self.lora_a)), floats(mx.stop_gradient(self.lora_b))
        lengths = np.linalg.norm(self._weight + self._scale * (a @ b).T, axis=1)
        y = y * (self.m / mx.array(lengths))
        return y + self._base.bias if "bias" in self._base else y


@mx.custom_function
def multiply(x: mx.array, w: mx.array) -> mx.array:
    """x (…, in) @ w (in, out), both with derivatives."""
    left, right = _flat(x), floats(w)
    done = cpu.written((len(left), w.shape[1]), lambda out: np.matmul(left, right, out=out))
    return done.reshape(*x.shape[:-1], w.shape[1])


@multiply.vjp
def _multiply_back(primals: tuple[mx.array, mx.array], slope: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    x, w = primals
    left, right, slopes = _flat(x), floats(w), _flat(slope)
    dx = cpu.written(left.shape, lambda out: np.matmul(slopes, right.T, out=out)).reshape(x.shape)
    return dx, cpu.written(right.shape, lambda out: np.matmul(left.T, slopes, out=out))


@mx.custom_function
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu_tanh(gate) * up, (…, I) each."""
    return cpu.geglu(gate, up)


@geglu.vjp
def _geglu_back(primals: tuple[mx.array, mx.array], slope: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    gate, up = primals
    x, times, slopes = _flat(gate), _flat(up), _flat(slope)
    step = max(1, BLOCK // x.shape[1])
    made = [cpu.written(x.shape, lambda out: None) for _ in range(2)]
    dgate, dup = (floats(one) for one in made) if x.size > cpu.SMALL else (np.empty_like(x) for _ in range(2))
    for start in range(0, len(x), step):
        some = slice(start, start + step)
        value, grown = _gelu_and_slope(x[some])
        np.multiply(slopes[some], value, out=dup[some])
        np.multiply(slopes[some], times[some], out=dgate[some])
        dgate[some] *= grown
    if x.size <= cpu.SMALL:
        made = [mx.array(dgate), mx.array(dup)]
    return made[0].reshape(gate.shape), made[1].reshape(gate.shape)


@mx.custom_function
def gelu(x: mx.array) -> mx.array:
    """gelu_tanh."""
    return cpu.gelu_tanh(x)


@gelu.vjp
def _gelu_back(x: mx.array, slope: mx.array, _: mx.array) -> mx.array:
    rows, slopes = _flat(x), _flat(slope)

    def write(out: Floats) -> None:
        step = max(1, BLOCK // rows.shape[1])
        for start in range(0, len(rows), step):
            some = slice(start, start + step)
            np.multiply(slopes[some], _gelu_and_slope(rows[some])[1], out=out[some])

    return cpu.written(rows.shape, write).reshape(x.shape)


def _gelu_and_slope(x: Floats) -> tuple[Floats, Floats]:
    """gelu_tanh and its derivative."""
    factor = np.float32(sqrt(2 / pi))
    square = x * x
    curve = np.tanh(factor * x * (1 + np.float32(0.044715) * square))
    half = np.float32(0.5) * (1 + curve)
    inner = factor * (1 + np.float32(3 * 0.044715) * square)
    return x * half, half + np.float32(0.5) * x * (1 - curve * curve) * inner


def rms_norm(x: mx.array, gain: mx.array, eps: float) -> mx.array:
    """mx.fast.rms_norm; the gain is frozen."""
    g = floats(gain)

    @mx.custom_function
    def normed(x: mx.array) -> mx.array:
        return cpu.norm(x, gain, eps)

    @normed.vjp
    def back(x: mx.array, slope: mx.array, _: mx.array) -> mx.array:
        rows, slopes = floats(x), floats(slope)
        size = np.float32(rows.shape[-1])

        def write(out: Floats) -> None:
            inverse = 1 / np.sqrt(np.einsum("...i,...i->...", rows, rows) / size + np.float32(eps))
            np.multiply(slopes, g, out=out)
            along = np.einsum("...i,...i->...", out, rows) * inverse**3 / size
            out *= inverse[..., None]
            out -= rows * along[..., None]

        return cpu.written(rows.shape, write)

    return _array(normed(x))


class HostNorm(nn.Module):
    """A frozen RMSNorm."""

    def __init__(self, base: RMSNorm) -> None:
        super().__init__()
        self.weight = base.weight  # the decoder asks for its dtype
        self._gain, self._eps = 1.0 + base.weight.astype(mx.float32), base.eps
        mx.eval(self._gain)
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self._gain, self._eps)


class HostMLP(nn.Module):
    """The decoder's MLP, of the same three matrices."""

    def __init__(self, base: MLP) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = base.gate_proj, base.up_proj, base.down_proj

    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array = self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))
        return out


def attend(
    q: mx.array, keys: Rows, values: Rows, *, scale: float, mask: mx.array | str | None, bits: int = 16
) -> mx.array:
    """attention.attend with a derivative; the scores are computed again on the way back."""
    if bits != 16 or q.shape[2] < 2:
        return attention.attend(q, keys, values, scale=scale, mask=mask, bits=bits)
    batch, heads, length, size = q.shape
    groups, count = keys[0].shape[1], keys[0].shape[2]
    together = heads // groups
    hidden = None
    if mask is not None:
        hidden = np.ascontiguousarray(cpu.unseen(mask, batch, length, count))

    @mx.custom_function
    def attended(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return cpu.attend(q, (k,), (v,), scale=scale, mask=mask)

    @attended.vjp
    def back(
        primals: tuple[mx.array, mx.array, mx.array], slope: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        queries, ks, vs = (floats(x) for x in primals)
        slopes = floats(slope)
        dq, dk, dv = np.empty_like(queries), np.empty_like(ks), np.empty_like(vs)
        for row, group in product(range(batch), range(groups)):
            some = slice(group * together, (group + 1) * together)
            part, out = queries[row, some].reshape(-1, size), slopes[row, some].reshape(-1, size)
            scores = part @ ks[row, group].T  # (together * L, S)
            scores *= np.float32(scale)
            if hidden is not None:
                np.copyto(scores.reshape(together, length, count), cpu.MASKED, where=hidden[row])
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            dv[row, group] = scores.T @ out
            grown = out @ vs[row, group].T
            grown -= np.einsum("ij,ij->i", grown, scores)[:, None]
            grown *= scores
            grown *= np.float32(scale)
            dq[row, some] = (grown @ ks[row, group]).reshape(together, length, size)
            dk[row, group] = grown.T @ part
        return mx.array(dq), mx.array(dk), mx.array(dv)

    return _array(attended(q, keys[0], values[0]))


def attend_all(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """attention.attend_all, likewise."""
    return attend(q, (k,), (v,), scale=scale, mask=None)


class HostAttention(nn.Module):
    """The decoder's attention, of the same parts, by `attend`."""

    def __init__(self, base: Attention) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = base.q_proj, base.k_proj, base.v_proj, base.o_proj
        self.q_norm, self.k_norm = base.q_norm, base.k_norm
        self._base = base

    def __call__(self, x: mx.array, context: Context) -> mx.array:
        base = self._base
        q, k, v = (base._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = base.rotate(self.q_norm(q), context.positions), base.rotate(self.k_norm(k), context.positions)
        out = context.attend(q, k, v, base, attend)  # (B, H, L, D)
        batch, _, length, _ = out.shape
        done: mx.array = self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))
        return done


class HostPatches(nn.Module):
    """The tower's convolution over patches, of pixels, which need no derivative."""

    def __init__(self, base: PatchConv) -> None:
        super().__init__()
        mx.eval(base.parameters())
        self._convolved = cpu.with_bias(base)

    def __call__(self, pixels: mx.array) -> mx.array:
        return self._convolved(pixels)


TOWER = TowerKernels(lambda module, x: module(x), attend_all, lambda x: _array(gelu(x)))


def arrange(model: Gemma3) -> Matrix:
    """Replace the modules of a model whose adapters are in place. Returns the head (V, D)."""
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear

    unpack = unpacked_bytes(model) > 0
    head = model.language_model.embed_tokens if model.config.tie_word_embeddings else model.lm_head

    def replaced(module: nn.Module) -> nn.Module | None:
        if isinstance(module, LoRALinear):
            return HostLoRA(module, unpack=unpack)
        if isinstance(module, DoRALinear):
            return HostDoRA(module, unpack=unpack)
        if isinstance(module, RMSNorm):
            return HostNorm(module)
        if isinstance(module, PatchConv):
            return HostPatches(module)
        plain = isinstance(module, nn.Linear | nn.QuantizedLinear)
        return HostLinear(module, unpack=unpack) if plain and module is not head else None

    _replace(model, replaced)
    for layer in model.language_model.layers:
        layer.self_attn, layer.mlp = HostAttention(layer.self_attn), HostMLP(layer.mlp)
    return Matrix(head, unpack=unpack)


def _replace(module: nn.Module, replaced: Callable[[nn.Module], nn.Module | None]) -> None:
    """Of a module and all below it, the ones for which there is another."""
    for name, child in list(module.items()):
        each = enumerate(child) if isinstance(child, list) else [(None, child)]
        for place, one in list(each):
            if not isinstance(one, nn.Module):
                continue
            other = replaced(one)
            if other is None:
                _replace(one, replaced)
            elif place is None:
                module[name] = other
            else:
                child[place] = other


def _array(x: Any) -> mx.array:
    """What a custom function returns, whose type MLX does not say."""
    found: mx.array = x
    return found


def _flat(x: mx.array) -> Floats:
    """(…, K) → (R, K), x's own memory."""
    return floats(x).reshape(-1, x.shape[-1])

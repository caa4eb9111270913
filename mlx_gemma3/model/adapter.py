"""An adapter: to some matrices W (out, in) a product of low rank is added, and the model stays as it is.

    LoRA    y = x Wᵀ + (x Aᵀ) Bᵀ                    A (r, in), B (out, r), the scale in B
    DoRA    y_o = m_o / |row o of W + B A| of that   m (out,): each row has a length of its own
    bias    of the tower's matrices: is added after all that

The projector's matrix stands the other way round, W (in, out), and so do its two: y = x W + (x B) A, never DoRA.
This is the rule, as plain modules: `attach` puts them into a model. adapter_terms.py is what a loaded model runs on.
Sources: PEFT 0.21, tuners/lora/layer.py and dora.py; mlx-lm 0.32, tuner/lora.py and dora.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from ..config import TextConfig
from .gemma3 import Gemma3
from .shard import Shard
from .vision import PLAIN, Projector, TowerKernels

PROJECTOR = "multi_modal_projector.mm_input_projection_weight"


@dataclass(frozen=True, eq=False)
class LowRank:
    """What an adapter does to one matrix."""

    a: mx.array  # (r, in) float32
    b: mx.array  # (out, r) float32, the scale in it
    magnitude: mx.array | None = None  # (out,) float32, of DoRA

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + (0 if self.magnitude is None else self.magnitude.nbytes)

    def melted(self, rows: mx.array, start: int = 0) -> mx.array:
        """Rows of W' from the same rows of W.

        Args:
            rows: (R, in) float32, from row `start` on.
        """
        part = slice(start, start + rows.shape[0])
        rows = rows + self.b[part] @ self.a
        return rows if self.magnitude is None else rows * (self.magnitude[part] / lengths(rows))[:, None]


Adapter = Mapping[str, LowRank]  # by the module's path, "language_model.layers.0.self_attn.q_proj"; or PROJECTOR


class AdaptedLinear(nn.Module):
    """A matrix, plain or packed, and what an adapter does to it."""

    def __init__(self, base: nn.Module, term: LowRank, dtype: mx.Dtype) -> None:
        """
        Args:
            dtype: of the activations.
        """
        super().__init__()
        self.base = base
        self.lora_a, self.lora_b = term.a.astype(dtype), term.b.astype(dtype)
        gain = gain_of(base, term)
        if gain is not None:
            self.gain = gain.astype(dtype)

    def __call__(self, x: mx.array) -> mx.array:
        bias = self.base.get("bias")
        y = self.base(x) if bias is None else self.base(x) - bias
        y = y + (x @ self.lora_a.T) @ self.lora_b.T
        y = y * self.gain if "gain" in self else y
        return y if bias is None else y + bias


class AdaptedProjector(nn.Module):
    """The projector, and what an adapter does to its matrix."""

    def __init__(self, base: Projector, term: LowRank, dtype: mx.Dtype) -> None:
        """
        Args:
            dtype: of the activations.
        """
        super().__init__()
        self.base = base
        self.lora_a, self.lora_b = term.a.astype(dtype), term.b.astype(dtype)

    def __call__(self, x: mx.array, kernels: TowerKernels = PLAIN) -> mx.array:
        rows = self.base.pool(x)
        return kernels.project(self.base, rows) + (rows @ self.lora_b) @ self.lora_a


def attach(model: Gemma3, adapter: Adapter) -> None:
    """Let a model's modules compute with an adapter, from now on."""
    modules = dict(model.named_modules())
    dtype = model.language_model.norm.weight.dtype
    for path, term in adapter.items():
        parent, _, name = path.rpartition(".")
        if path == PROJECTOR:
            model.multi_modal_projector = AdaptedProjector(model.multi_modal_projector, term, dtype)
        else:
            modules[parent][name] = AdaptedLinear(modules[path], term, dtype)
    model.eval()
    model.freeze()


def own_terms(adapter: Adapter, config: TextConfig, shard: Shard) -> Adapter:
    """What one of several machines needs of an adapter: of each matrix the rows or columns that it holds itself."""

    def own(path: str, term: LowRank) -> LowRank:
        cut = shard.cut(f"{path}.weight", (term.b.shape[0], term.a.shape[1]), config)
        if cut is None:
            return term
        axis, part = cut
        if axis == 1:
            return replace(term, a=term.a[:, part])
        return replace(term, b=term.b[part], magnitude=None if term.magnitude is None else term.magnitude[part])

    return {path: own(path, term) for path, term in adapter.items()}


def gain_of(module: nn.Module, term: LowRank, summed: Callable[[mx.array], mx.array] = lambda x: x) -> mx.array | None:
    """What DoRA multiplies a matrix's results with: (out,) float32; None for LoRA.

    Args:
        summed: over the machines that have columns of the matrix, each its own.
    """
    if term.magnitude is None:
        return None
    gain = term.magnitude / mx.sqrt(summed(mx.square(numbers_of(module) + term.b @ term.a).sum(axis=-1)))
    mx.eval(gain)
    return gain


def lengths(rows: mx.array) -> mx.array:
    """(R, in) → (R,) Euclidean, in float32."""
    return mx.sqrt(mx.square(rows).sum(axis=-1))


def numbers_of(module: nn.Module) -> mx.array:
    """(out, in) float32 of a matrix, packed or not."""
    if "scales" not in module:
        return module.weight.astype(mx.float32)
    scales, biases = module.scales, module.get("biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(module.weight, scales, biases, module.group_size, module.bits, module.mode).astype(mx.float32)

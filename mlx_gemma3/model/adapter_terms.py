"""Adapters as the fused decoder and the tower run on them: beside the joined and packed matrices, a few steps more.

    x ─┬─ [q|k|v] ──────────────────────── + ─ × gain ─
       └─ [A of q; A of k; A of v] ─ own ─ B ┘

Matrices that are joined have one A and one B, whose rows and columns stand where those of the joined matrix do, zeros
elsewhere. Sequences of one step may have different adapters: then these stand side by side in A and B, and of what A
finds each sequence keeps what belongs to its own adapter. What is left out is exactly 0, so nobody's numbers change.
A, B and gains are inputs of the compiled graphs, as weights are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .adapter import PROJECTOR, Adapter, gain_of
from .layers import Linear
from .vision import Projector, TowerKernels

Matrix = Any  # as fused.Kernels.matrix makes it
# What is computed beside one joined matrix: A, B, the slot of each row of A (R,) int32, gains by slot (N + 1, out) or
# None. Slot 0 is of sequences without an adapter.
Term = tuple[Matrix, Matrix, mx.array, mx.array | None]
LayerTerms = tuple[tuple[Term | None, ...], tuple[Term | None, ...]]  # before attention, and after it
# What the fused decoder joins, as fused.FusedLayer does, before attention and after it.
BEFORE = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),)
AFTER = (("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
COLUMNS = ("self_attn.o_proj", "mlp.down_proj")  # several machines have some columns each (shard.py)

MIXES = 2  # sets of several adapters whose arrays side by side are kept


@dataclass(frozen=True, eq=False)
class _Joined:
    """One adapter beside one joined matrix."""

    a: mx.array  # (R, in)
    b: mx.array  # (out, R)
    gain: mx.array | None  # (out,)


@dataclass(frozen=True, eq=False)
class Terms:
    """What the sequences of one forward pass have beside the matrices."""

    layers: Sequence[LayerTerms]
    slots: mx.array | None  # (B, 1, 1) int32, the adapter of each; None where all have the only one


class AdapterTerms:
    """The adapters of a runner by name."""

    def __init__(self, text: nn.Module, matrix: Callable[[nn.Module], Matrix], dtype: mx.Dtype) -> None:
        """
        Args:
            text: the plain decoder, whose modules are those of adapters.
            matrix: see fused.Kernels.
            dtype: of the activations.
        """
        self._modules: Mapping[str, nn.Module] = dict(text.named_modules())
        self._layers, self._matrix, self._dtype, self._shard = len(text.layers), matrix, dtype, text.shard
        self._joined: dict[str, list[list[_Joined | None]]] = {}  # by name, layer, joined matrix
        self._alone: dict[str, Sequence[LayerTerms]] = {}
        self._mixes: OrderedDict[tuple[str, ...], Sequence[LayerTerms]] = OrderedDict()

    def add(self, name: str, adapter: Adapter) -> None:
        """Have an adapter of the decoder's matrices; others are not looked at."""
        self._joined[name] = [
            [self._join(adapter, f"layers.{layer}.", parts) for parts in (*BEFORE, *AFTER)]
            for layer in range(self._layers)
        ]
        self._alone[name] = self._side_by_side([name])

    def of(self, names: Sequence[str | None]) -> Terms | None:
        """What sequences with these adapters have; None when none has any.

        Several adapters that have not been together lately are put side by side first, which the host waits for.
        """
        mix = tuple(name for name in self._joined if name in names)
        if not mix:
            return None
        slots = [0 if name is None else 1 + mix.index(name) for name in names]
        if len(mix) == 1 and 0 not in slots:
            return Terms(self._alone[mix[0]], None)
        layers = self._alone[mix[0]] if len(mix) == 1 else self._mix(mix)
        return Terms(layers, mx.array(slots, dtype=mx.int32)[:, None, None])

    def _mix(self, mix: tuple[str, ...]) -> Sequence[LayerTerms]:
        if mix in self._mixes:
            self._mixes.move_to_end(mix)
        else:
            self._mixes[mix] = self._side_by_side(mix)
            if len(self._mixes) > MIXES:
                self._mixes.popitem(last=False)
        return self._mixes[mix]

    def _join(self, adapter: Adapter, layer: str, parts: Sequence[str]) -> _Joined | None:
        terms = [adapter.get(f"language_model.{layer}{part}") for part in parts]
        if not any(terms):
            return None
        modules = [self._modules[layer + part] for part in parts]
        outs = [module.weight.shape[0] for module in modules]
        columns = []
        for part, term in enumerate(terms):
            if term is not None:
                above, below = sum(outs[:part]), sum(outs[part + 1 :])
                columns.append(mx.pad(term.b, [(above, below), (0, 0)]))
        summed = [self._shard.sum if part in COLUMNS else lambda x: x for part in parts]
        gains = [
            None if term is None else gain_of(module, term, over)
            for term, module, over in zip(terms, modules, summed, strict=True)
        ]
        gain = None
        if any(one is not None for one in gains):
            ones = [mx.ones((out,)) if one is None else one for one, out in zip(gains, outs, strict=True)]
            gain = mx.concatenate(ones).astype(self._dtype)
        a = mx.concatenate([term.a for term in terms if term is not None]).astype(self._dtype)
        joined = _Joined(a, mx.concatenate(columns, axis=1).astype(self._dtype), gain)
        mx.eval(joined.a, joined.b, *([] if gain is None else [gain]))
        return joined

    def _side_by_side(self, mix: Sequence[str]) -> Sequence[LayerTerms]:
        layers = []
        for layer in range(self._layers):
            terms = [self._term([self._joined[name][layer][place] for name in mix]) for place in range(4)]
            layers.append((tuple(terms[: len(BEFORE)]), tuple(terms[len(BEFORE) :])))
        return layers

    def _term(self, each: Sequence[_Joined | None]) -> Term | None:
        """The adapters of a mix beside one joined matrix; their slots are 1, 2 and so on."""
        there = [(slot, one) for slot, one in enumerate(each, start=1) if one is not None]
        if not there:
            return None
        first = there[0][1]
        alone = len(there) == 1
        a = first.a if alone else mx.concatenate([one.a for _, one in there])
        b = first.b if alone else mx.concatenate([one.b for _, one in there], axis=1)
        owner = mx.array([slot for slot, one in there for _ in range(one.a.shape[0])], dtype=mx.int32)
        gains = None
        if any(one.gain is not None for _, one in there):
            ones = mx.ones((b.shape[0],), dtype=self._dtype)
            gains = mx.stack([ones, *(ones if one is None or one.gain is None else one.gain for one in each)])
        mx.eval(owner, *([] if gains is None else [gains]))
        return self._matrix(_plain(a)), self._matrix(_plain(b)), owner, gains


def adapted_by(
    y: mx.array,
    x: mx.array,
    term: Term,
    slots: mx.array | None,
    multiply: Callable[[mx.array, Matrix], mx.array],
    add_product: Callable[[mx.array, mx.array, Matrix], mx.array],
) -> mx.array:
    """What a joined matrix gives with each sequence's own adapter.

    Args:
        y: (B, L, out), what it gives of x (B, L, in) alone.
        slots: see Terms.
        multiply, add_product: see fused.Kernels.
    """
    a, b, owner, gains = term
    low = multiply(x, a)  # (B, L, R)
    if slots is not None:
        low = mx.where(owner == slots, low, 0)
    y = add_product(y, low, b)
    if gains is None:
        return y
    return y * (gains[1] if slots is None else gains[slots[:, 0]])


def add_product(y: mx.array, x: mx.array, matrix: Matrix) -> mx.array:
    """y (…, out) + x (…, in) @ a plain matrix, rounded once."""
    return mx.addmm(y, x, matrix[0])


def adapted_tower(tower: nn.Module, kernels: TowerKernels, adapter: Adapter, dtype: mx.Dtype) -> TowerKernels | None:
    """The tower's kernels with an adapter; None where it does nothing to the tower and the projector.

    Args:
        dtype: of the activations.
    """
    terms = {}
    for path, module in tower.named_modules():
        if (term := adapter.get(f"vision_tower.{path}")) is not None:
            gain = gain_of(module, term)
            a, b = term.a.astype(dtype).T, term.b.astype(dtype).T
            mx.eval(a, b)
            terms[id(module)] = (a, b, None if gain is None else gain.astype(dtype))
    projector = adapter.get(PROJECTOR)
    if not terms and projector is None:
        return None

    def multiply(module: nn.Module, x: mx.array) -> mx.array:
        y = kernels.multiply(module, x)
        if (term := terms.get(id(module))) is None:
            return y
        a, b, gain = term
        low = (x @ a) @ b
        if gain is None:
            return y + low
        bias = module.get("bias", 0)
        return (y - bias + low) * gain + bias

    if projector is None:
        return replace(kernels, multiply=multiply)
    down, up = projector.b.astype(dtype), projector.a.astype(dtype)
    mx.eval(down, up)

    def project(module: Projector, x: mx.array) -> mx.array:
        return kernels.project(module, x) + (x @ down) @ up

    return replace(kernels, multiply=multiply, project=project)


def _plain(weight: mx.array) -> nn.Module:
    """A matrix as modules hold it: (out, in)."""
    module = Linear(1, 1, bias=False)
    module.weight = weight
    return module

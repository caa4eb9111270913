"""Models of the published sizes without their weights, on the kernels of a GPU: arrays that take no memory.

Made inside a Trace (metal_trace.py).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from metal_trace import Spec, without_storage
from mlx.utils import tree_flatten, tree_map

from mlx_gemma3.config import Config
from mlx_gemma3.model.cache import Caches, GlobalCache
from mlx_gemma3.model.fused import Kernels, gpu_kernels
from mlx_gemma3.model.gemma3 import Gemma3
from mlx_gemma3.model.runner import Runner, on_device
from mlx_gemma3.model.vision import TowerKernels

LARGE = 1 << 20  # bytes of an array that is made of weights: more than a norm has


def empty_model(config: Config, *, bits: int | None = 4, dtype: mx.Dtype = mx.bfloat16) -> Gemma3:
    """Every parameter in its shape and type.

    Args:
        bits: of the decoder's matrices, in groups of 64; None packs nothing.
    """
    model = Gemma3(config)
    if bits is not None:

        def choose(path: str, module: nn.Module) -> Any:
            return path.startswith("language_model") and isinstance(module, nn.Linear | nn.Embedding)

        nn.quantize(model, group_size=64, bits=bits, class_predicate=choose)

    def empty(array: mx.array) -> mx.array:
        floats = mx.issubdtype(array.dtype, mx.floating)
        return without_storage(Spec(tuple(array.shape), dtype if floats else array.dtype))

    model.update(tree_map(empty, model.parameters()))
    mx.eval(model.parameters())
    return model


def gpu_runner(model: Gemma3, kernels: Kernels | None = None, tower: TowerKernels | None = None) -> Runner:
    """What `on_device` makes on a Mac; matrices that are joined take no memory either.

    Args:
        kernels, tower: others than those of `on_device`.
    """
    concatenate = mx.concatenate

    def joined(parts: list[mx.array], axis: int = 0) -> mx.array:
        whole = concatenate(parts, axis)
        if whole.nbytes < LARGE:
            return whole
        empty = without_storage(Spec(tuple(whole.shape), whole.dtype))
        mx.eval(empty)
        return empty

    with on_gpu() as patch:
        patch.setattr(mx, "concatenate", joined)
        if kernels is None and tower is None:
            return on_device(model)
        return Runner(model, kernels or gpu_kernels(), tower or TowerKernels())


class on_gpu:  # noqa: N801  a context
    """Inside, MLX's default device is said to be a GPU; nothing may be computed on it."""

    def __enter__(self) -> pytest.MonkeyPatch:
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        return self._patch

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def caches_after(runner: Runner, tokens: int, *, kv_bits: int = 16, local_kv_bits: int = 16) -> Caches:
    """Caches that hold so many tokens; what is in them takes no memory."""
    caches = runner.make_caches(kv_bits=kv_bits, local_kv_bits=local_kv_bits)
    text = runner.config.text
    for layer in caches:
        row = without_storage(Spec((1, 2 * text.num_key_value_heads, 1, text.head_dim), runner.dtype))
        parts = layer._pack(row)
        capacity = -(-tokens // 256) * 256 if isinstance(layer, GlobalCache) else layer.capacity
        filled = tokens if layer.window is None else min(tokens, layer.window - 1 + layer.slack)
        held = []
        for part in parts:
            shape = (*part.shape[:2], capacity, part.shape[3])
            held.append(without_storage(Spec(shape, part.dtype)))
        mx.eval(held)
        layer.offset, layer.parts = tokens, held
        if layer.window is not None:
            layer.filled = filled
    return caches


def weight_bytes(model: Gemma3) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))

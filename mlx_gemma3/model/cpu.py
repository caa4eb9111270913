"""What is fastest on MLX's CPU backend, a matrix at a time. Only there: a GPU's path never comes here.

Measured on Linux x86-64, MLX 0.32, float32, reference BLAS (docs/performance.md): a plain matrix stored input by input
is multiplied 1.6 to 1.9 times as fast as one stored output by output. Packed matrices are multiplied number by number:
right for one token, but from a few rows on it is cheaper to unpack the matrix, multiply, and drop it again.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path

from .attention import attend_all

UNPACK_FROM = 8  # rows
BLOCK = 64  # rows


def multiplier(module: nn.Module) -> Callable[[mx.array], mx.array]:
    """(…, in) → (…, out). A plain matrix is stored anew; its module then holds a view of that."""
    if isinstance(module, nn.QuantizedLinear):
        mx.eval(module.parameters())
        return lambda x: unpacking_matmul(x, module)
    turn(module)
    turned = module.weight.T
    mx.eval(turned)
    return lambda x: x @ turned


def arrange(model: nn.Module) -> None:
    """The same for every matrix of modules that call them themselves: the tower's."""

    def changed(_: str, module: nn.Module) -> nn.Module:
        if isinstance(module, nn.QuantizedLinear):
            return UnpackingLinear(module)
        if isinstance(module, nn.Linear):
            turn(module)
        return module

    model.update_modules(tree_map_with_path(changed, model.leaf_modules(), is_leaf=nn.Module.is_module))


def attend_by_head(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """attention.attend_all, one head after another: the scores of a picture's 4,096 patches are 64 MiB a head."""
    out = []
    for head in range(q.shape[1]):
        one = slice(head, head + 1)
        out.append(attend_all(q[:, one], k[:, one], v[:, one], scale))
        mx.eval(out[-1])
    return mx.concatenate(out, axis=1)


def turn(module: nn.Module) -> None:
    """Store a float32 matrix (out, in) input by input; it stays (out, in) for whoever looks at it.

    By numpy and some rows at a time, as the cache likes it: six times as fast as mx.contiguous.
    """
    mx.eval(module.weight)
    if module.weight.dtype != mx.float32:
        return
    rows = np.array(module.weight, copy=False)
    stored = mx.zeros(rows.shape[::-1])
    mx.eval(stored)
    turned = np.array(stored, copy=False)
    for start in range(0, len(rows), BLOCK):
        turned[:, start : start + BLOCK] = rows[start : start + BLOCK].T
    module.weight = stored.T
    mx.eval(module.weight)


class UnpackingLinear(nn.QuantizedLinear):
    """A packed matrix that is unpacked for each call of more than a few rows."""

    def __init__(self, packed: nn.QuantizedLinear) -> None:
        nn.Module.__init__(self)
        for name, array in packed.items():
            self[name] = array
        self.group_size, self.bits, self.mode = packed.group_size, packed.bits, packed.mode
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        out = unpacking_matmul(x, self)
        return out + self.bias if "bias" in self else out


def unpacking_matmul(x: mx.array, packed: nn.QuantizedLinear) -> mx.array:
    """x @ Wᵀ without the bias."""
    weight, scales, biases = packed["weight"], packed["scales"], packed.get("biases")
    group, bits, mode = packed.group_size, packed.bits, packed.mode
    if x.size < UNPACK_FROM * x.shape[-1]:
        return mx.quantized_matmul(x, weight, scales, biases, True, group, bits, mode)
    plain = mx.dequantize(weight, scales, biases, group, bits, mode).astype(x.dtype)
    return x @ mx.contiguous(plain.T)

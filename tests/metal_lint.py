"""What Metal lacks or does badly, found in a graph that is built on the CPU.

MLX's fast operations are one kernel each on a GPU and many primitives on the CPU, so each is recorded and stands in the
graph as one primitive. The rest of the graph is walked twice: traced (`mx.export_function`), which says shapes and
dtypes, and drawn (`mx.export_to_dot`), which says what was compiled into one kernel.

Refused are: float64 anywhere, and 8-byte integers but as indices; packed products for which the wheel has no kernel
(metal_kernels.txt, from bench/metal_table.py), or whose scales and rows differ in dtype; attention with a mask that is
neither bool nor of the queries' dtype, with a head size for which there is no kernel, with a padded head of the tower,
or with scores over a gibibyte; positions that are not 4-byte integers, wavelengths that are not float32, gains of
another dtype; float32 products in a model of 16 bits; more than one kernel for a GELU; more kernels a layer than
allowed; and reading on the host what is not computed yet.

Not checked: how an array lies in memory, which MLX decides when it computes; how long a command buffer gets; arrays of
2³¹ elements, which these small models do not have.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx

TABLE = Path(__file__).parent / "metal_kernels.txt"
SCORE_BYTES = 1 << 30
SHORT = 8  # queries; up to as many go through the vector kernel
# What no kernel stands behind: other views of the same numbers.
VIEWS = {"Transpose", "ExpandDims", "Squeeze", "Reshape", "Flatten", "Unflatten", "Broadcast", "Split", "Slice", "Full"}
INDEXED = {"Gather", "GatherAxis", "Scatter", "ScatterAxis", "Arange", "ArgReduce", "ArgSort", "ArgPartition", "AsType"}


@dataclass
class Kernels:
    """The wheel's, by (kernel, dtype, group) the bits, by (kernel, dtype) the head sizes."""

    version: str
    packed: dict[tuple[str, str, int], set[int]] = field(default_factory=dict)
    heads: dict[tuple[str, str], set[int]] = field(default_factory=dict)

    @classmethod
    def read(cls) -> Kernels:
        first, *lines = TABLE.read_text(encoding="utf-8").splitlines()
        found = cls(first.split()[1])
        for kernel, dtype, *rest in map(str.split, lines):
            numbers = {int(number) for number in rest[-1].split(",")}
            if len(rest) == 2:
                found.packed[kernel, dtype, int(rest[0])] = numbers
            else:
                found.heads[kernel, dtype] = numbers
        return found


def lint(
    work: Callable[[mx.array], Any], argument: mx.array, *, dtype: mx.Dtype, gelus: int = 0, kernels: int | None = None
) -> list[str]:
    """What is wrong with the graph that `work` makes of `argument`: sentences, none when all is well.

    Args:
        dtype: of the activations.
        gelus: GELUs (of GeGLU or alone) in it.
        kernels: at most.
    """
    found: list[str] = []
    with watched(found, dtype):
        try:
            _walk(work, argument, found, dtype)
        except (RuntimeError, ValueError) as error:
            if "eval" not in str(error):
                raise
            return [*found, f"read on the host while the graph is built: {error}"]
        drawn = _drawn(work(argument))
    compiled = sum(number for name, number in drawn.items() if name.startswith("Compiled") and "Sigmoid" in name)
    if gelus and compiled != gelus:
        found.append(f"{compiled} compiled kernels with a sigmoid, want {gelus}: one for each GELU")
    if any(name in drawn for name in ("Tanh", "Sigmoid", "Erf")):
        found.append("a GELU that is not one kernel")
    if kernels is not None and (count := sum(drawn.values())) > kernels:
        found.append(f"{count} kernels, at most {kernels}")
    return sorted(set(found))


@contextmanager
def watched(found: list[str], dtype: mx.Dtype) -> Iterator[None]:
    """MLX's fast operations look at what they are given, and stand as one primitive each."""
    table = Kernels.read()

    def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
        if weight is not None and weight.dtype != x.dtype:
            found.append(f"rms_norm: a gain of {weight.dtype}, rows of {x.dtype}")
        return mx.softmax(x, axis=-1)

    def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
        return rms_norm(x, weight, eps)

    def rope(x: mx.array, dims: int, *, offset: Any, freqs: mx.array, **_: Any) -> mx.array:
        if isinstance(offset, mx.array) and offset.dtype not in (mx.int32, mx.uint32):
            found.append(f"rope: positions of {offset.dtype}, want 4-byte integers")
        if freqs.dtype != mx.float32 or freqs.shape != (dims // 2,):
            found.append(f"rope: wavelengths {freqs.shape} of {freqs.dtype}, want ({dims // 2},) of float32")
        return mx.cumsum(x, axis=-1)

    def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None) -> mx.array:
        (batch, heads, length, size), (groups, keys) = q.shape, k.shape[1:3]
        if isinstance(mask, mx.array) and mask.dtype not in (mx.bool_, q.dtype):
            found.append(f"attention: a mask of {mask.dtype}, queries of {q.dtype}")
        name = str(q.dtype).removeprefix("mlx.core.")
        if length <= SHORT and size not in table.heads.get(("sdpa_vector", name), ()):
            found.append(f"attention: no vector kernel for heads of {size} in {name}")
        if length <= SHORT and length * heads // groups > 32:
            found.append(f"attention: {length} queries x {heads // groups} heads a group, at most 32")
        if length > SHORT and size not in table.heads.get(("steel_attention", name), ()):
            found.append(f"attention: no kernel for heads of {size} in {name}")
        if size == 80:
            found.append("attention: heads of 80: SigLIP's 72 has a kernel of its own")
        if size == 256 and length > SHORT and (scores := batch * heads * length * keys * q.dtype.size) > SCORE_BYTES:
            found.append(f"attention: {scores:,} bytes of scores")
        one = (mx.broadcast_to(x[:, :1, :1], (batch, heads, 1, size)) for x in (k, v))
        return mx.concatenate([q, *one], axis=2)[:, :, :length]

    multiply = mx.quantized_matmul

    def quantized_matmul(
        x: mx.array, w: mx.array, scales: mx.array, biases: mx.array | None = None, transpose: bool = True,
        group_size: int = 64, bits: int = 4, mode: str = "affine", **options: Any,
    ) -> mx.array:  # fmt: skip
        if mode == "affine" and x.dtype != scales.dtype:
            found.append(f"packed product: scales of {scales.dtype}, rows of {x.dtype}")
        name = str(x.dtype).removeprefix("mlx.core.")
        for kernel in ("qmv", "qmm_t") if transpose else ("qvm", "qmm_n"):
            if bits not in table.packed.get((f"{mode}_{kernel}", name, group_size), ()):
                found.append(f"packed product: no kernel {mode}_{kernel} for {bits} bits in groups of {group_size}")
        return multiply(x, w, scales, biases, transpose, group_size, bits, mode, **options)

    def dequantize(w: mx.array, scales: mx.array, *_: Any, group_size: int = 64, **__: Any) -> mx.array:
        return mx.concatenate([scales] * (_[1] if len(_) > 1 else group_size), axis=-1)

    fast = {"rms_norm": rms_norm, "layer_norm": layer_norm, "rope": rope, "scaled_dot_product_attention": attention}
    with patch.multiple(mx.fast, **fast), patch.multiple(mx, quantized_matmul=quantized_matmul, dequantize=dequantize):
        yield


def _walk(work: Callable[[mx.array], Any], argument: mx.array, found: list[str], dtype: mx.Dtype) -> None:
    """Look at the dtypes of every primitive."""

    def step(seen: dict[str, Any]) -> None:
        if seen.get("type") != "primitive":
            return
        name = seen["name"]
        arrays: Sequence[tuple[str, tuple[int, ...], mx.Dtype]] = [*seen["inputs"], *seen["outputs"]]
        kinds = {kind for _, _, kind in arrays}
        if kinds & {mx.float64, mx.complex64}:
            found.append(f"{name}: float64 or complex numbers")
        if kinds & {mx.int64, mx.uint64} and name not in INDEXED | VIEWS:
            found.append(f"{name}: 8-byte integers")
        if name in ("Matmul", "QuantizedMatmul", "AddMM") and dtype != mx.float32 and mx.float32 in kinds:
            found.append(f"{name}: float32 in a model of {dtype}")

    mx.export_function(step, work, argument)


def _drawn(outputs: Any) -> Counter[str]:
    """The kernels of a graph by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), outputs)
        names = Counter(re.findall(r'label ="([^"]+)"', path.read_text(encoding="utf-8")))
    return Counter({name: number for name, number in names.items() if name not in VIEWS})

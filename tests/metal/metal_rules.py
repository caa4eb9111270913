"""What Metal lacks or does badly, as nine rules over a trace (metal_trace.py). `check` returns one sentence a fault.

1. float64 and complex anywhere; 64-bit integers but as indices; a scatter into 8-byte types; linear algebra.
2. (function, mode, bits, group, type) without a kernel in kernels.txt; rows and scales of different types; packed
   arrays whose last two axes do not lie one after the other.
3. Attention that is expected to be one kernel and is not; scores in memory above 1 GiB; padded heads; few queries with
   too many heads a key; a mask of another type.
4. RoPE's offset no 4-byte integer, its wavelengths not (D / 2,) float32; a norm's weight of another type than its rows.
5. In a bfloat16 model a float32 array larger than a row of logits for each sequence.
6. GELU and GeGLU as anything but one compiled kernel a layer; a kernel with more than 24 inputs or 31 buffers; more
   than 17 dispatches a layer in a step of one sequence.
7. A step in fewer than 12 command buffers (`command_buffers`): a warning.
8. An array of 2**31 entries or more, or above 3.5 GiB; a sort of more than 2,048 entries while decoding; more than 20
   arrays of indices.
9. A host that waits for the device between the begin of a step and its `async_eval` (metal_trace.py raises HostRead).

Only partly checked, and why:

- 1: a graph as exported does not say on which stream an operation runs. `mx.load` must not be given one; linear
  algebra, which has no GPU form, must not occur at all.
- 2: strides are known once an array is computed, and here nothing is: what is checked is the way by which a view came
  to be (turned, or cut on its last axis). A weight that comes out of a file transposed would not be seen.
- 3: MLX has no function that says which path attention takes. `attention_path` is its rule, transcribed from
  scaled_dot_product_attention.cpp (commit 846d176); that 0.32.4 fuses heads of 256 for more masks (#3842, #4416) was
  found in its library, whose source was not at hand.
- 5: what a compiled kernel holds in float32 inside is no array, and not counted.
- 6: compiled functions are seen as `mx.compile` fuses them on this machine, by the same code as on a Mac. The buffers
  are counted as inputs, outputs and three for shapes and strides; inputs of irregular strides would need one more each.
- 7: which buffers are still in flight depends on the times of a GPU. Counted are 40 operations or 40 Mi entries a
  buffer (50 and 50 on Max and Ultra), by CommandEncoder::needs_commit; one operation is taken as one dispatch.
- 9: numpy functions other than asarray, array and ascontiguousarray read through the buffer protocol and are not seen.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from metal_trace import Graph, Node, Spec

TABLE = Path(__file__).with_name("kernels.txt")
SCORES, LARGEST, ENTRIES = 1 << 30, 7 << 29, 1 << 31  # bytes, bytes (3.5 GiB: what a Mac of 8 GB allows), entries
SORTED, INDICES = 2048, 20
COMPILED_INPUTS, BUFFERS, ARGUMENT_BUFFERS = 24, 31, 3
DISPATCHES, DISPATCHES_MORE = 17, 3  # a layer of a step; for each further sequence
FEWEST_BUFFERS = 12
INDEX_READERS = {"Gather", "GatherAxis", "Scatter", "ScatterAxis"}
LINEAR_ALGEBRA = {"Cholesky", "Eig", "Eigh", "Inverse", "LUF", "QRF", "SVD"}
SORTS = {"ArgSort", "Sort", "ArgPartition", "Partition"}
WIDE = {mx.int64, mx.uint64}
# What Metal calls the types of rows, and which functions a product may come to: with few rows, and with many.
METAL_TYPES = {mx.float32: "float", mx.bfloat16: "bfloat16_t", mx.float16: "float16_t"}
PRODUCTS = {True: ("qmv", "qmv_fast", "qmv_wide", "qmm_t"), False: ("qvm", "qvm_split_k", "qmm_n")}


@dataclass(frozen=True)
class Stage:
    """What is traced, and what it may do."""

    name: str
    row: int  # entries of a row of logits
    sequences: int = 1
    dtype: mx.Dtype = mx.bfloat16
    decoding: bool = False
    fused: str = "no"  # attention is one kernel: "always", "m5" (with neural accelerators), "no"
    gelus: int | None = None  # GELU and GeGLU that must be there; None: not counted
    wide: frozenset[tuple[int, ...]] = frozenset()  # shapes that may be float32 although they are large
    sorted: int = SORTED


@dataclass(frozen=True)
class Table:
    """kernels.txt."""

    version: tuple[int, ...]
    names: frozenset[str]

    @classmethod
    def read(cls, path: Path = TABLE) -> Table:
        lines = path.read_text(encoding="utf-8").splitlines()
        version = next(line.split()[-1] for line in lines if line.startswith("# mlx-metal "))
        names: set[str] = set()
        for line in lines:
            if line and not line.startswith("#"):
                stem, _, endings = line.partition(": ")
                names |= {f"{stem} {ending}" for ending in endings.split()}
        return cls(numbers(version), frozenset(names))


def outdated(table: Table, installed: str) -> str | None:
    """One sentence where the table is older than MLX."""
    if table.version >= numbers(installed):
        return None
    had = ".".join(map(str, table.version))
    return f"tests/metal/kernels.txt is of MLX {had}, and {installed} is installed: run bench/metal_table.py"


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3])


def check(graph: Graph, stage: Stage, table: Table) -> list[str]:
    """Every fault, once, with how often it occurs."""
    found = Counter(_faults(graph, stage, table))
    return [f"{stage.name}: {fault}" + (f" ({count} times)" if count > 1 else "") for fault, count in found.items()]


def _faults(graph: Graph, stage: Stage, table: Table) -> Iterator[str]:
    yield from _types(graph)
    for node in graph.nodes:
        call = node.call
        if call is None:
            continue
        if call.name in ("quantized_matmul", "quantize", "dequantize"):
            yield from _packed(graph, node, table, stage)
        elif call.name == "scaled_dot_product_attention":
            yield from _attention(graph, node, stage, table)
        elif call.name in ("rope", "rms_norm", "layer_norm"):
            yield from _rope_and_norms(node, table)
    yield from _widened(graph, stage)
    yield from _gelus(graph, stage)
    yield from _sizes(graph, stage)


def _types(graph: Graph) -> Iterator[str]:
    for spec in graph.arrays.values():
        if spec.dtype in (mx.float64, mx.complex64):
            yield f"rule 1: an array of {spec.dtype}, which Metal lacks or computes slowly"
    for node in graph.nodes:
        if node.name in LINEAR_ALGEBRA:
            yield f"rule 1: {node.name} has no form for a GPU"
        if node.name.startswith("Scatter") and graph.arrays[node.outputs[0]].dtype.size == 8:
            yield f"rule 1: {node.name} into {graph.arrays[node.outputs[0]].dtype}"
        wide = [name for name in node.inputs if graph.arrays[name].dtype in WIDE]
        as_index = node.name == "AsType" or (node.name in INDEX_READERS and node.inputs[0] not in wide)
        if wide and not node.is_view and not as_index:
            yield f"rule 1: {node.name} of {graph.arrays[wide[0]].dtype}: 64-bit integers are for indices alone"


def _packed(graph: Graph, node: Node, table: Table, stage: Stage) -> Iterator[str]:
    assert node.call is not None
    call, values = node.call, node.call.values
    mode, bits, group = values.get("mode") or "affine", values.get("bits") or 4, values.get("group_size") or 64
    rows: Spec = values["x"] if call.name == "quantized_matmul" else values["w"]
    dtype = call.outputs[0].dtype if call.name == "dequantize" else rows.dtype
    functions = PRODUCTS[values.get("transpose", True)] if call.name == "quantized_matmul" else (call.name,)
    for function in functions:
        name = f"{mode} {function} {METAL_TYPES.get(dtype, dtype)} {bits}/{group}"
        if name not in table.names:
            yield f"rule 2: no kernel for {name} (kernels.txt)"
    scales = values.get("scales")
    want = rows.dtype if call.name == "quantized_matmul" else stage.dtype
    if scales is not None and mode == "affine":
        for part, spec in (("scales", scales), ("biases", values.get("biases"))):
            if spec is not None and spec.dtype != want:
                yield f"rule 2: {call.name} of {part} in {spec.dtype} with rows of {want}"
    arrays = [name for name, value in values.items() if isinstance(value, Spec)]
    for argument, name in zip(arrays, node.inputs, strict=True):
        if argument in ("w", "scales", "biases") and not _in_order(graph, name):
            yield f"rule 2: {call.name} of {argument} whose last two axes are not in order"


def _in_order(graph: Graph, name: str) -> bool:
    """The last two axes lie one after the other, as far as the way the view came to be tells."""
    while (node := graph.makers.get(name)) is not None and node.is_view and node.inputs:
        before, after = graph.arrays[node.inputs[0]].shape, graph.arrays[name].shape
        if node.name == "Transpose" and list(node.arguments[0])[-2:] != [len(before) - 2, len(before) - 1]:
            return False
        if node.name in ("Slice", "Split") and before[-1] != after[-1]:
            return False
        if node.name == "Slice" and any(step != 1 for step in node.arguments[2][-2:]):
            return False
        if node.name == "Broadcast" and len(before) > 1 and before[-2:] != after[-2:]:
            return False
        name = node.inputs[0]
    return True


def attention_path(q: Spec, k: Spec, v: Spec, mask: Any, *, m5: bool) -> str:
    """ "vector", "full" or "unfused", as MLX 0.32.4 chooses; see the module."""
    length, size, count = q.shape[2], q.shape[-1], k.shape[2]
    causal, array = mask == "causal", isinstance(mask, Spec)
    if length <= 8:
        known = size == v.shape[-1] and size in (64, 96, 128, 192, 256)
        fits = length <= count and length * (q.shape[1] // k.shape[1]) <= 32
        return "vector" if known and fits and size != 192 else "unfused"
    if size != v.shape[-1] or size not in (64, 72, 80, 96, 128, 192, 256) or (causal and length > count):
        return "unfused"
    if size == 256 and m5 and length >= 1024 and (causal or array):
        return "full"
    if size == 256 and not m5 and causal and length == count >= 2048:
        return "full"
    return "unfused" if size in (192, 256) else "full"


def _attention(graph: Graph, node: Node, stage: Stage, table: Table) -> Iterator[str]:
    assert node.call is not None
    values = node.call.values
    q, k, v, mask = values["q"], values["k"], values["v"], values.get("mask")
    paths = {chip: attention_path(q, k, v, mask, m5=chip == "m5") for chip in ("m1", "m5")}
    need = {"always": ("m1", "m5"), "m5": ("m5",), "no": ()}[stage.fused]
    about = f"{q.shape[2]} queries, {k.shape[2]} keys, heads of {q.shape[-1]}"
    for chip in need:
        if paths[chip] == "unfused":
            yield f"rule 3: attention is not one kernel on {chip} ({about})"
    for path in set(paths.values()) - {"unfused"}:
        kernel = (
            f"sdpa_vector {METAL_TYPES[q.dtype]} {q.shape[-1]}_{v.shape[-1]}"
            if path == "vector"
            else f"steel_attention {_plain(q.dtype)} {q.shape[-1]}"
        )
        if kernel not in table.names:
            yield f"rule 3: no kernel {kernel} (kernels.txt)"
    if "unfused" in paths.values() and (scores := q.shape[1] * q.shape[2] * k.shape[2] * q.dtype.size) > SCORES:
        yield f"rule 3: {scores / 2**30:.1f} GiB of scores ({about})"
    if q.shape[2] <= 8 and q.shape[2] * (q.shape[1] // k.shape[1]) > 32:
        yield f"rule 3: {q.shape[1] // k.shape[1]} query heads a key head ({about})"
    if isinstance(mask, str) and mask != "causal":
        yield f"rule 3: a mask called {mask}"
    if isinstance(mask, Spec) and mask.dtype not in (mx.bool_, q.dtype):
        yield f"rule 3: a mask of {mask.dtype} for queries of {q.dtype}"
    for name in node.inputs[:3]:
        maker = graph.makers.get(graph.root(name))
        if maker is not None and maker.name == "Pad" and graph.arrays[maker.inputs[0]].shape[-1] < q.shape[-1]:
            yield f"rule 3: heads of {graph.arrays[maker.inputs[0]].shape[-1]} padded to {q.shape[-1]}"


def _rope_and_norms(node: Node, table: Table) -> Iterator[str]:
    assert node.call is not None
    call, values = node.call, node.call.values
    x: Spec = values["x"]
    kernel = {"rope": "rope_freqs", "rms_norm": "rms"}.get(call.name, call.name)
    if f"{kernel} {_plain(x.dtype)}" not in table.names:
        yield f"rule 4: no kernel {kernel} for {x.dtype} (kernels.txt)"
    if call.name != "rope":
        for part in ("weight", "bias"):
            spec = values.get(part)
            if isinstance(spec, Spec) and spec.dtype != x.dtype:
                yield f"rule 4: {call.name} with {part} of {spec.dtype} and rows of {x.dtype}"
        return
    offset, freqs = values.get("offset"), values.get("freqs")
    if isinstance(offset, Spec) and (offset.dtype not in (mx.int32, mx.uint32) or len(offset.shape) > 1):
        yield f"rule 4: rope with an offset of {offset.dtype} {offset.shape}"
    if isinstance(freqs, Spec) and (freqs.dtype != mx.float32 or freqs.shape != (x.shape[-1] // 2,)):
        yield f"rule 4: rope with wavelengths of {freqs.dtype} {freqs.shape} for heads of {x.shape[-1]}"


def _plain(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _widened(graph: Graph, stage: Stage) -> Iterator[str]:
    if stage.dtype != mx.bfloat16:
        return
    inputs = [(name, "an array") for name in graph.constants]
    made = [(name, node.name) for node in graph.dispatches for name in node.outputs]
    for name, maker in (*inputs, *made):
        spec = graph.arrays[name]
        if spec.dtype == mx.float32 and spec.size > stage.row * stage.sequences and spec.shape not in stage.wide:
            yield f"rule 5: {maker} of {spec.shape} in float32"


def _gelus(graph: Graph, stage: Stage) -> Iterator[str]:
    kernels = [node for node in graph.nodes if node.name == "Compiled" and node.call is not None]
    for node in kernels:
        assert node.call is not None
        inputs = sum(isinstance(value, Spec) for value in node.call.values.values())
        buffers = inputs + len(node.outputs) + ARGUMENT_BUFFERS
        if inputs > COMPILED_INPUTS or buffers > BUFFERS:
            yield f"rule 6: a compiled kernel with {inputs} inputs and {buffers} buffers"
    gelus = sum("Sigmoid" in _kernel(node) or "Tanh" in _kernel(node) for node in kernels)
    if stage.gelus is not None and gelus != stage.gelus:
        yield f"rule 6: {gelus} GELUs of one compiled kernel, not {stage.gelus}"
    if stage.gelus is not None and any(node.name in ("Sigmoid", "Tanh", "Erf") for node in graph.nodes):
        yield "rule 6: an eager GELU"


def _kernel(node: Node) -> str:
    assert node.call is not None
    return str(node.call.values["kernel"])


def _sizes(graph: Graph, stage: Stage) -> Iterator[str]:
    views = {name for node in graph.nodes if node.is_view for name in node.outputs}
    for name, spec in graph.arrays.items():
        if name not in views and (spec.size >= ENTRIES or spec.nbytes > LARGEST):
            yield f"rule 8: an array of {spec.shape} {spec.dtype}"
    for node in graph.nodes:
        spec = graph.arrays[node.inputs[0]] if node.inputs else None
        if stage.decoding and node.name in SORTS and spec is not None:
            axis = node.arguments[-1] if node.arguments and isinstance(node.arguments[-1], int) else -1
            if spec.shape[axis] > stage.sorted:
                yield f"rule 8: {node.name} of {spec.shape[axis]} entries while decoding"
        if node.name in ("Gather", "Scatter") and len(node.inputs) - 1 > INDICES:
            yield f"rule 8: {node.name} with {len(node.inputs) - 1} arrays of indices"


class FewBuffers(UserWarning):
    """Rule 7."""


def command_buffers(graph: Graph, *, operations: int = 40, mebi: int = 40) -> int:
    """How many command buffers MLX cuts a graph into, in the order of the graph (CommandEncoder::needs_commit).

    A buffer is closed by more than so many operations, or when the arrays that it touches, each once and whole, have
    more than so many Mi entries.
    """
    buffers, count, entries, touched = 1, 0, 0, set[str]()
    for node in graph.dispatches:
        count += 1
        for name in (*node.inputs, *node.outputs):
            root = _buffer(graph, name)
            if root not in touched:
                touched.add(root)
                entries += graph.arrays[root].size
        if count > operations or entries >> 20 > mebi:
            buffers, count, entries, touched = buffers + 1, 0, 0, set()
    return buffers


def _buffer(graph: Graph, name: str) -> str:
    """The array whose memory this one lies in: views share, and a write goes into what it was given."""
    name = graph.root(name)
    while (node := graph.makers.get(name)) is not None and node.name == "SliceUpdate":
        name = graph.root(node.inputs[0])
    return name


def warn_of_few_buffers(name: str, buffers: int) -> None:
    if buffers < FEWEST_BUFFERS:
        warnings.warn(
            f"rule 7: {name}: {buffers} command buffers a step: the host may run ahead of its caches, which then are "
            "copied for each token",
            FewBuffers,
            stacklevel=2,
        )


def too_many_dispatches(kernels: Counter[str], *, layers: int, sequences: int, outside: int) -> str | None:
    """Rule 6, for a step.

    Args:
        kernels: from `metal_trace.kernels_of`.
        outside: dispatches of no layer.
    """
    most = (DISPATCHES + DISPATCHES_MORE * (sequences - 1)) * layers + outside
    got = sum(kernels.values())
    return (
        None if got <= most else f"rule 6: {got} dispatches a step, not {most} ({(got - outside) / layers:.1f} a layer)"
    )

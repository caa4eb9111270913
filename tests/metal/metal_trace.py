"""What a piece of the package asks of the device: every operation with shapes and types, and nothing computed.

    with Trace() as trace:
        runner = metal_models.gpu_runner(…)         # made inside: it takes MLX's functions as they are now
        with trace.lazily():
            logits = runner.step(tokens, [caches])
        graph, kernels = trace.graph(logits), kernels_of(logits)

MLX's CPU backend takes its fast operations apart into small ones, which Metal does not. So inside a Trace each of them
is recorded with its arguments, and one opaque operation (`mx.depends`) stands for it in the graph. A compiled function
that becomes one kernel is such an operation too; others are taken as their parts.

Two views of one graph: `Trace.graph` has shapes and types, read with `mx.export_function`, which knows no compiled
parts; `kernels_of` has names alone, read with `mx.export_to_dot`, of what `mx.compile` really made
(`Trace(compiled=True)`).
"""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

# What no kernel stands behind: other views of the same numbers.
VIEWS = {
    *("Transpose", "ExpandDims", "Squeeze", "Reshape", "Flatten", "Unflatten"),
    *("Broadcast", "BroadcastAxes", "Split", "Slice", "Full", "StopGradient"),
}
ARGUMENTS = {
    "rms_norm": ("x", "weight", "eps"),
    "layer_norm": ("x", "weight", "bias", "eps"),
    "rope": ("x", "dims"),
    "scaled_dot_product_attention": ("q", "k", "v"),
    "quantized_matmul": ("x", "w", "scales", "biases", "transpose", "group_size", "bits", "mode"),
    "quantize": ("w", "group_size", "bits", "mode"),
    "dequantize": ("w", "scales", "biases", "group_size", "bits", "mode", "global_scale", "dtype"),
    "contiguous": ("x",),  # which export_function cannot show
}
FAST = ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention")
OTHERS = ("quantized_matmul", "quantize", "dequantize", "contiguous")
READS = ("item", "tolist", "__array__", "__int__", "__float__", "__bool__", "__index__", "__dlpack__")


class HostRead(Exception):
    """The host waited for the device where it must not."""


class Issued(Exception):
    """`mx.async_eval` was reached; args[0] is what it was given."""


@dataclass(frozen=True)
class Spec:
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.size


@dataclass(frozen=True)
class Call:
    """A fast operation, or a compiled function that is one kernel."""

    name: str
    values: dict[str, Any]  # by argument; arrays as their Spec
    outputs: tuple[Spec, ...]


@dataclass(frozen=True)
class Node:
    name: str  # of the primitive, or of the call
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arguments: tuple[Any, ...] = ()
    call: Call | None = None

    @property
    def is_view(self) -> bool:
        return self.name in VIEWS


@dataclass
class Graph:
    nodes: list[Node] = field(default_factory=list)
    arrays: dict[str, Spec] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)  # what was there before: weights, caches, numbers
    makers: dict[str, Node] = field(default_factory=dict)  # by output
    outputs: tuple[str, ...] = ()  # as they were asked for

    @property
    def dispatches(self) -> list[Node]:
        return [node for node in self.nodes if not node.is_view]

    def root(self, name: str) -> str:
        """The array that this one is a view of."""
        while (node := self.makers.get(name)) is not None and node.is_view and node.inputs:
            name = node.inputs[0]
        return name


class Trace:
    """Inside, MLX records instead of computing. See the module."""

    def __init__(self, *, compiled: bool = False) -> None:
        """
        Args:
            compiled: compiled functions stay what `mx.compile` makes of them, for `kernels_of`.
        """
        self.compiled = compiled
        self.calls: list[Call] = []
        self.loads: list[dict[str, Any]] = []  # keyword arguments of each `mx.load`
        self.evaluated: list[Callable[[list[mx.array]], None]] = []  # told of what is evaluated outside `lazily`
        self._lazy = False
        self._single: dict[int, str | None] = {}
        self._kept: list[object] = []  # functions whose id is a key above
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Trace:
        for name in FAST:
            self._put(mx.fast, name, self._recorded(name, getattr(mx.fast, name)))
        for name in OTHERS:
            self._put(mx, name, self._recorded(name, getattr(mx, name)))
        self._put(mx, "compile", self._compile(mx.compile))
        self._put(mx, "load", self._load(mx.load, mx.eval))
        self._put(mx, "eval", self._eval(mx.eval))
        self._put(mx, "async_eval", self._async_eval(mx.async_eval))
        for name in ("asarray", "array", "ascontiguousarray"):
            self._put(np, name, self._of_numpy(name, getattr(np, name)))
        for name in READS:
            self._put(mx.array, name, self._read(name, getattr(mx.array, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def lazily(self) -> Iterator[None]:
        """Inside, whoever waits for the device is refused (HostRead), and `async_eval` ends it (Issued)."""
        self._lazy = True
        try:
            yield
        finally:
            self._lazy = False

    def graph(self, *outputs: Any) -> Graph:
        """All that these arrays are computed from."""
        arrays = [array for _, array in tree_flatten(list(outputs)) if isinstance(array, mx.array)]
        graph, markers = Graph(), dict[str, int]()

        def take(message: dict[str, Any]) -> None:
            kind = message["type"]
            if kind == "constants":
                for name, array in message["constants"]:
                    graph.arrays[name] = Spec(tuple(array.shape), array.dtype)
                    graph.constants.add(name)
                    if array.dtype == mx.uint32 and not array.shape:
                        markers[name] = int(array.item())
            elif kind == "outputs":
                graph.outputs = tuple(name for name, *_ in message["outputs"])
            elif kind == "primitive":
                graph.nodes.append(_node(message, graph, markers, self.calls))

        with self._allowed():
            try:
                mx.export_function(take, lambda: arrays)
            except ValueError as error:  # "Unable to get state for primitive …"
                raise AssertionError(
                    f"{error}: what is compiled must be compiled inside the Trace (by `on_device`, not by an import), "
                    "and what MLX cannot show must be recorded as a call (metal_trace.py: ARGUMENTS)"
                ) from error
        graph.makers = {name: node for node in graph.nodes for name in node.outputs}
        return graph

    def _put(self, where: Any, name: str, value: object) -> None:
        self._stack.callback(setattr, where, name, getattr(where, name))
        setattr(where, name, value)

    @contextlib.contextmanager
    def _allowed(self) -> Iterator[None]:
        lazy, self._lazy = self._lazy, False
        try:
            yield
        finally:
            self._lazy = lazy

    def _recorded(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*positional: Any, **named: Any) -> Any:
            values = dict(zip(ARGUMENTS[name], positional, strict=False)) | named
            return self._stand_in(name, values, original(*positional, **named))

        return call

    def _stand_in(self, name: str, values: dict[str, Any], result: Any) -> Any:
        """An opaque operation with the same inputs, and outputs of the same shapes and types."""
        whole = [result] if isinstance(result, mx.array) else list(result)
        specs = tuple(Spec(tuple(array.shape), array.dtype) for array in whole)
        shown = tree_map(lambda x: Spec(tuple(x.shape), x.dtype) if isinstance(x, mx.array) else x, values)
        number = mx.array(len(self.calls), dtype=mx.uint32)
        self.calls.append(Call(name, shown, specs))
        inputs = [array for _, array in tree_flatten(list(values.values())) if isinstance(array, mx.array)]
        out = mx.depends([without_storage(spec) for spec in specs], [number, *inputs])
        return out[0] if isinstance(result, mx.array) else tuple(out)

    def _compile(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def compile_(function: Callable[..., Any], *args: Any, **settings: Any) -> Callable[..., Any]:
            real = original(function, *args, **settings)

            def run(*arguments: Any) -> Any:
                if self.compiled:
                    return real(*arguments)
                if (kernel := self._one_kernel(function, real, arguments)) is None:
                    return function(*arguments)
                values = {"kernel": kernel} | {str(number): value for number, value in enumerate(arguments)}
                return self._stand_in("Compiled", values, function(*arguments))

            return run

        return compile_

    def _one_kernel(self, function: object, real: Callable[..., Any], arguments: Any) -> str | None:
        """The name of the kernel that a compiled function is, where it is a single one."""
        if id(function) not in self._single:
            self._kept.append(function)
            calls = list(self.calls)
            fresh = tree_map(
                lambda x: without_storage(Spec(tuple(x.shape), x.dtype)) if isinstance(x, mx.array) else x, arguments
            )
            kernels = kernels_of(real(*fresh))
            self.calls[:] = calls
            single = sum(kernels.values()) == 1 and next(iter(kernels)).startswith("Compiled")
            self._single[id(function)] = next(iter(kernels)) if single else None
        return self._single[id(function)]

    def _eval(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate(*what: Any) -> None:
            if self._lazy:
                raise HostRead("mx.eval")
            for told in self.evaluated:
                told([array for _, array in tree_flatten(list(what)) if isinstance(array, mx.array)])
            original(*what)

        return evaluate

    def _load(self, original: Callable[..., Any], evaluate: Callable[..., None]) -> Callable[..., Any]:
        def load(*args: Any, **named: Any) -> Any:
            self.loads.append(named)
            arrays = original(*args, **named)
            evaluate(arrays)  # export_function cannot show a Load
            return arrays

        return load

    def _async_eval(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate(*what: Any) -> None:
            if self._lazy:
                raise Issued(what)
            original(*what)

        return evaluate

    def _of_numpy(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def convert(*args: Any, **named: Any) -> Any:
            if self._lazy and args and isinstance(args[0], mx.array):
                raise HostRead(f"np.{name}")
            return original(*args, **named)

        return convert

    def _read(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def read(array: mx.array, *args: Any, **named: Any) -> Any:
            if self._lazy:
                raise HostRead(name)
            return original(array, *args, **named)

        return read


def _node(message: dict[str, Any], graph: Graph, markers: dict[str, int], calls: list[Call]) -> Node:
    for name, shape, dtype in (*message["inputs"], *message["outputs"]):
        graph.arrays[name] = Spec(tuple(shape), dtype)
    inputs = tuple(name for name, *_ in message["inputs"])
    outputs = tuple(name for name, *_ in message["outputs"])
    if message["name"] != "Depends":
        return Node(message["name"], inputs, outputs, tuple(message["arguments"]))
    # Its outputs pass through (nothing but shapes), then comes the number of the call, then what the call was given.
    call = calls[markers[inputs[len(outputs)]]]
    return Node(call.name, inputs[len(outputs) + 1 :], outputs, (), call)


def kernels_of(*outputs: Any) -> Counter[str]:
    """The names of all dispatches that these arrays need; a fast operation is called Depends."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), *[array for _, array in tree_flatten(list(outputs))])
        found = Counter(re.findall(r'label ="([^"]+)"', path.read_text(encoding="utf-8")))
    return Counter({name: number for name, number in found.items() if name not in VIEWS})


def without_storage(spec: Spec) -> mx.array:
    """An array of any size that takes no memory: one zero, seen from everywhere."""
    zero = _ZEROS.setdefault(spec.dtype, mx.zeros((), dtype=spec.dtype))
    return mx.broadcast_to(zero, spec.shape)


_ZEROS: dict[Any, mx.array] = {}

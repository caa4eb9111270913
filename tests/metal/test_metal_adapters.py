"""A step and a prompt with adapters, by Metal's rules: a few kernels more, and none where nobody has one."""

from __future__ import annotations

import shutil

import mlx.core as mx
import pytest
from metal_models import caches_after, empty_model, gpu_runner
from metal_rules import check, too_many_dispatches
from metal_trace import Trace, kernels_of
from test_metal_lint import OUTSIDE, TABLE, stage

from mlx_gemma3.checkpoint.published import SIZES
from mlx_gemma3.model.adapter import LowRank
from mlx_gemma3.model.runner import Runner

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="without it MLX compiles nothing on a CPU")


def with_adapters(runner: Runner, *names: str) -> None:
    """Adapters of all of the decoder's matrices, of ranks 8, 9 and so on."""
    modules = dict(runner.model.named_modules())
    parts = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    for number, name in enumerate(names):
        adapter = {}
        for layer in range(runner.config.text.num_hidden_layers):
            for part in parts:
                path = f"language_model.layers.{layer}.{part}"
                out, width = modules[path].weight.shape
                width = width * 32 // modules[path].bits if "scales" in modules[path] else width
                adapter[path] = LowRank(mx.zeros((8 + number, width)), mx.zeros((out, 8 + number)))
        runner.add_adapter(name, adapter)


@pytest.mark.parametrize(
    ("adapters", "more"),
    [
        ([None], 0),
        ([None, None], 0),
        (["a"], 2),  # of each joined matrix: A, and B with the sum
        (["a", "a"], 2),
        (["a", None], 3),  # and the choice of each sequence's own
        (["a", "b", None], 3),
    ],
)
def test_a_step_with_adapters_is_a_few_dispatches_more(adapters: list[str | None], more: int) -> None:
    """Those of sequences without any are 17 a layer, whatever is loaded."""
    with Trace(compiled=True) as trace:
        runner = gpu_runner(empty_model(SIZES["270M"]))
        with_adapters(runner, "a", "b")
        rows = [caches_after(runner, 700) for _ in adapters]
        for caches, name in zip(rows, adapters, strict=True):
            caches.adapter = name
        runner._adapters.of(adapters)  # type: ignore[union-attr]  # a new set of adapters is waited for once
        with trace.lazily():
            logits = runner.step(mx.array([3] * len(rows)), rows)
        kernels = kernels_of(logits, [caches.arrays for caches in rows])
    layers = runner.config.text.num_hidden_layers
    outside = OUTSIDE + 4 * more * layers
    assert too_many_dispatches(kernels, layers=layers, sequences=len(rows), outside=outside) is None, kernels
    if more:
        assert too_many_dispatches(kernels, layers=layers, sequences=len(rows), outside=OUTSIDE) is not None


@pytest.mark.parametrize("adapters", [["a"], ["a", "b", None]])
def test_prompts_and_steps_with_adapters(adapters: list[str | None]) -> None:
    with Trace() as trace:
        runner = gpu_runner(empty_model(SIZES["270M"]))
        with_adapters(runner, "a", "b")
        rows = [caches_after(runner, 700) for _ in adapters]
        for caches, name in zip(rows, adapters, strict=True):
            caches.adapter = name
        runner._adapters.of(adapters)  # type: ignore[union-attr]  # a new set of adapters is waited for once
        with trace.lazily():
            logits = runner.step(mx.array([3] * len(rows)), rows)
        graph = trace.graph(logits, [caches.arrays for caches in rows])
        step = stage(runner, "step", sequences=len(rows), decoding=True, fused="always")
        assert check(graph, step, TABLE) == []
        caches = runner.make_caches(adapter="a")
        with trace.lazily():
            hidden = runner.read([[5] * 512], None, caches, last_only=True)
        prompt = stage(runner, "prompt", fused="no")
        assert check(trace.graph(hidden, caches.arrays), prompt, TABLE) == []

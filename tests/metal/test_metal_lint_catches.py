"""The lint finds what it is there for: each fault, put in on purpose."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import mlx.core as mx
import numpy as np
import pytest
from memory_held import start_measuring
from metal_models import caches_after, empty_model, gpu_runner
from metal_rules import Stage, Table, attention_path, check, outdated, too_many_dispatches
from metal_trace import HostRead, Spec, Trace, kernels_of, without_storage

from bench import metal_table
from mlx_gemma3.checkpoint.published import SIZES
from mlx_gemma3.model.attention import attend, attend_all
from mlx_gemma3.model.fused import Kernels, gelu_times, gpu_kernels
from mlx_gemma3.model.layers import gelu_tanh
from mlx_gemma3.model.runner import Runner
from mlx_gemma3.model.vision import TowerKernels

TABLE = Table.read()
LAYERS = 18  # of 270M
BF16 = mx.bfloat16
Change = Callable[[Kernels], Kernels]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="without it MLX compiles nothing on a CPU")


def step_faults(change: Change, *, scales: mx.Dtype = BF16, length: int = 1) -> list[str]:
    """Of a step of 270M, or of a prompt, on changed kernels."""
    with Trace() as trace:
        model = empty_model(SIZES["270M"])
        if scales != BF16:
            layer = model.language_model.layers[0].mlp.down_proj
            for name in ("scales", "biases"):
                layer[name] = without_storage(Spec(tuple(layer[name].shape), scales))
        runner = gpu_runner(model, change(gpu_kernels()))
        caches = caches_after(runner, 700)
        with trace.lazily():
            out = runner.step(mx.array([3]), [caches]) if length == 1 else runner.read([[3] * length], None, caches)
        graph = trace.graph(out, caches.arrays)
    return check(graph, Stage("step", 262_144, decoding=True, fused="always", gelus=LAYERS), TABLE)


def tower_faults(tower: Callable[[], TowerKernels]) -> list[str]:
    with Trace() as trace:
        runner = gpu_runner(empty_model(SIZES["4B"]), tower=tower())
        pixels = without_storage(Spec((1, 896, 896, 3), mx.float32))
        with trace.lazily():
            features = runner.model.vision_tower(pixels, runner._tower)
        graph = trace.graph(features)
    pictures = frozenset({(1, 896, 896, 3)})
    return check(graph, Stage("tower", 262_208, fused="always", gelus=27, wide=pictures), TABLE)


def sigmoid_gelu(x: mx.array) -> mx.array:
    y = x.astype(mx.float32)
    return (y * mx.sigmoid(y * (1.595769 + 0.0713548 * mx.square(y)))).astype(x.dtype)


def padded(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    wide = [mx.pad(x, [(0, 0), (0, 0), (0, 0), (0, 80 - x.shape[-1])]) for x in (q, k, v)]
    return attend_all(*wide, scale)[..., : q.shape[-1]]


def test_a_step_and_a_tower_without_a_fault() -> None:
    assert step_faults(lambda kernels: kernels) == []
    assert tower_faults(lambda: TowerKernels(gelu=mx.compile(sigmoid_gelu, shapeless=True))) == []


def test_float64() -> None:
    def norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
        return mx.fast.rms_norm(x.astype(mx.float64), None, eps).astype(x.dtype)

    faults = step_faults(lambda kernels: replace(kernels, norm=norm))
    assert any("rule 1: an array of mlx.core.float64" in fault for fault in faults)


def test_a_head_of_72_padded_to_80() -> None:
    faults = tower_faults(lambda: TowerKernels(attend=padded, gelu=mx.compile(sigmoid_gelu, shapeless=True)))
    assert faults == ["tower: rule 3: heads of 72 padded to 80 (81 times)"]


@pytest.mark.parametrize("compiled", [False, True])
def test_an_eager_gelu_and_one_that_is_three_kernels(compiled: bool) -> None:
    faults = tower_faults(lambda: TowerKernels(gelu=mx.compile(gelu_tanh, shapeless=True) if compiled else gelu_tanh))
    assert "tower: rule 6: 0 GELUs of one compiled kernel, not 27" in faults
    assert any("rule 5: Tanh of (1, 4096, 4304) in float32" in fault for fault in faults)


def test_an_eager_geglu() -> None:
    assert step_faults(lambda kernels: replace(kernels, geglu=gelu_times)) == [
        f"step: rule 6: 0 GELUs of one compiled kernel, not {LAYERS}",
        "step: rule 6: an eager GELU",
    ]


def test_float32_scales_with_bfloat16_rows() -> None:
    faults = step_faults(lambda kernels: kernels, scales=mx.float32)
    for part in ("scales", "biases"):
        assert f"step: rule 2: quantized_matmul of {part} in mlx.core.float32 with rows of mlx.core.bfloat16" in faults


def test_a_third_kernel_between_norm_and_matrix() -> None:
    def got(change: Change) -> str | None:
        with Trace(compiled=True) as trace:
            runner = gpu_runner(empty_model(SIZES["270M"]), change(gpu_kernels()))
            caches = caches_after(runner, 700)
            with trace.lazily():
                kernels = kernels_of(runner.step(mx.array([3]), [caches]), caches.arrays)
        return too_many_dispatches(kernels, layers=LAYERS, sequences=1, outside=8)

    def one_more(kernels: Kernels) -> Kernels:
        def multiply(x: mx.array, matrix: Any) -> mx.array:
            joined = matrix[0].shape[0] == 2 * 2048  # gate and up, right after their norm
            return kernels.multiply(mx.sort(x, axis=-1) if joined else x, matrix)

        return replace(kernels, multiply=multiply)

    assert got(lambda kernels: kernels) is None
    sentence = got(one_more)
    assert sentence is not None and "(18.0 a layer)" in sentence


READS: dict[str, Callable[[mx.array], object]] = {
    "eval": lambda x: mx.eval(x),
    "item": lambda x: x.sum().item(),
    "asarray": lambda x: np.asarray(x),
    "array": lambda x: np.array(x),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool((x > 0).all()),
    "int": lambda x: int(x.sum()),
}


@pytest.mark.parametrize("kind", READS)
def test_a_host_that_reads_inside_a_step(kind: str) -> None:
    def reading(q: mx.array, *rest: Any, **named: Any) -> mx.array:
        READS[kind](q)
        return attend(q, *rest, **named)

    with pytest.raises(HostRead):
        step_faults(lambda kernels: replace(kernels, attend=reading))


def test_what_is_read_outside_is_read() -> None:
    with Trace():
        x = mx.array([1.0, 2.0]) + 1
        mx.eval(x)
        assert x.tolist() == [2.0, 3.0] and np.asarray(x).tolist() == [2.0, 3.0] and bool((x > 1).all())


def array(*shape: int, dtype: mx.Dtype = BF16) -> mx.array:
    return without_storage(Spec(shape, dtype))


def product(*, group: int = 64, bits: int = 4, turned: bool = False) -> mx.array:
    weight, scales, biases = (
        array(64, n, dtype=t) for n, t in ((128 * bits // 32, mx.uint32), *[(128 // group, BF16)] * 2)
    )
    if turned:
        weight = array(128 * bits // 32, 64, dtype=mx.uint32).T
    return mx.quantized_matmul(array(1, 128), weight, scales, biases, group_size=group, bits=bits)


def attention(q: tuple[int, ...], k: tuple[int, ...], mask: Any = None) -> mx.array:
    return mx.fast.scaled_dot_product_attention(array(*q), array(*k), array(*k), scale=1.0, mask=mask)


FAULTS: dict[str, tuple[str, Callable[[], mx.array]]] = {
    "arithmetic on 64 bits": ("rule 1: Add of mlx.core.int64", lambda: array(4, dtype=mx.int64) + 1),
    "a scatter into 64 bits": ("rule 1: Scatter into mlx.core.int64", lambda: scattered(mx.int64)),
    "linear algebra": ("rule 1: Inverse", lambda: mx.linalg.inv(array(4, 4, dtype=mx.float32), stream=mx.cpu)),
    "turned weights": ("rule 2: quantized_matmul of w whose last two axes", lambda: product(turned=True)),
    "attention in parts": (
        "rule 3: attention is not one kernel on m1",
        lambda: attention((1, 4, 9, 256), (1, 1, 9, 256), "causal"),
    ),
    "large scores": (
        "rule 3: 2.0 GiB of scores",
        lambda: attention((1, 8, 1024, 256), (1, 4, 1 << 17, 256), "causal"),
    ),
    "many query heads": ("rule 3: 16 query heads a key head", lambda: attention((1, 16, 4, 128), (1, 1, 9, 128))),
    "a mask of whole numbers": (
        "rule 3: a mask of mlx.core.int32",
        lambda: attention((1, 4, 9, 128), (1, 4, 9, 128), array(1, 1, 9, 9, dtype=mx.int32)),
    ),
    "a wide offset": ("rule 4: rope with an offset", lambda: rotated(mx.int64, 32, mx.float32)),
    "short wavelengths": ("rule 4: rope with wavelengths", lambda: rotated(mx.int32, 32, BF16)),
    "a float32 gain": (
        "rule 4: rms_norm with weight",
        lambda: mx.fast.rms_norm(array(1, 64), array(64, dtype=mx.float32), 1e-6),
    ),
    "a wide array": ("rule 5: AsType of (2048, 1024)", lambda: array(2048, 1024).astype(mx.float32) + 1),
    "too many entries": ("rule 8: an array of (65536, 32768)", lambda: mx.abs(array(1 << 16, 1 << 15))),
    "a long sort": ("rule 8: ArgSort of 4096", lambda: mx.argsort(array(1, 4096), axis=-1)),
    "many indices": (
        "rule 8: Gather with 21 arrays of indices",
        lambda: array(*[1] * 21)[tuple(mx.array([0]) for _ in range(21))],
    ),
}


def scattered(dtype: mx.Dtype) -> mx.array:
    return array(8, dtype=dtype).at[mx.array([1, 2])].add(mx.array([1, 1]).astype(dtype))


def rotated(offset: mx.Dtype, half: int, wavelengths: mx.Dtype) -> mx.array:
    return mx.fast.rope(
        array(1, 4, 2, 64),
        64,
        traditional=False,
        base=None,
        scale=1.0,
        offset=array(dtype=offset),
        freqs=array(half, dtype=wavelengths),
    )


@pytest.mark.parametrize("name", FAULTS)
def test_each_rule(name: str) -> None:
    want, build = FAULTS[name]
    with Trace() as trace:
        graph = trace.graph(build())
    faults = check(graph, Stage("here", 262_144, decoding=True, fused="always"), TABLE)
    assert any(want in fault for fault in faults), faults


def test_a_packing_without_a_kernel() -> None:
    """As 1 bit was before MLX 0.32.4."""
    without = replace(TABLE, names=frozenset(name for name in TABLE.names if not name.endswith(" 4/64")))
    with Trace() as trace:
        graph = trace.graph(product())
    assert check(graph, Stage("here", 1000), TABLE) == []
    assert "here: rule 2: no kernel for affine qmv bfloat16_t 4/64 (kernels.txt)" in check(
        graph, Stage("here", 1000), without
    )


def test_a_kernel_with_many_inputs() -> None:
    def total(*parts: mx.array) -> mx.array:
        out = parts[0]
        for part in parts[1:]:
            out = mx.maximum(out, part)
        return out

    with Trace() as trace:
        graph = trace.graph(mx.compile(lambda *parts: total(*parts[:9]) * 2)(*[array(4) for _ in range(9)]))
        assert [node.name for node in graph.dispatches] == ["Compiled"]
        call = graph.dispatches[0].call
        assert call is not None
        call.values.update({f"more {number}": Spec((4,), BF16) for number in range(20)})
    assert any("rule 6: a compiled kernel with 29 inputs" in fault for fault in check(graph, Stage("x", 9), TABLE))


def test_the_paths_of_attention() -> None:
    """What layers of each kind take with one query, and with 512, 1,024 and 2,048."""

    def path(length: int, count: int, size: int, mask: Any, *, m5: bool) -> str:
        q, k = Spec((1, 8, length, size), BF16), Spec((1, 4, count, size), BF16)
        return attention_path(q, k, k, mask, m5=m5)

    boolean = Spec((1, 1, 1024, 2048), mx.bool_)
    assert path(1, 9000, 256, None, m5=False) == "vector"
    assert path(512, 9000, 256, "causal", m5=True) == "unfused"
    assert path(1024, 9000, 256, "causal", m5=True) == path(1024, 2048, 256, boolean, m5=True) == "full"
    assert path(1024, 9000, 256, "causal", m5=False) == path(2048, 4096, 256, "causal", m5=False) == "unfused"
    assert path(2048, 2048, 256, "causal", m5=False) == "full"
    assert path(512, 9000, 128, boolean, m5=False) == path(4096, 4096, 72, None, m5=False) == "full"


def test_an_old_table_is_told() -> None:
    old = replace(TABLE, version=(0, 32, 1))
    assert outdated(old, "0.32.1") is None and outdated(TABLE, "0.32.1") is None
    assert outdated(old, "0.33.0.dev1") == (
        "tests/metal/kernels.txt is of MLX 0.32.1, and 0.33.0.dev1 is installed: run bench/metal_table.py"
    )


def test_the_table_is_made_of_the_names_in_a_library(tmp_path: Path) -> None:
    names = [
        *(f"affine_qmv_fast_bfloat16_t_gs_64_b_{bits}_batch_0_pr_1_hgs_0_r_4" for bits in (8, 4)),
        "affine_qmv_fast_float16_t_gs_64_b_4_batch_0_pr_1_hgs_0_r_4",
        "steel_attention_bfloat16_bq32_bk16_bd128_bv128_wm4_wn1_maskbool_",
        "steel_attention_bfloat16_bq32_bk16_bd72_bv72_wm4_wn1_maskbool_",
        "rmsbfloat16",
        "vjp_rmsbfloat16",
    ]
    fields = b"".join(b"NAME" + (len(name) + 1).to_bytes(2, "little") + name.encode() + b"\0TYPE" for name in names)
    wheel = tmp_path / "mlx_metal-0.32.4-py3-none-macosx_14_0_arm64.whl"
    with ZipFile(wheel, "w") as files:
        files.writestr("mlx/lib/mlx.metallib", b"MTLB" + fields)
    assert metal_table.tabulated(metal_table.kernel_names(wheel)) == [
        "affine qmv_fast bfloat16_t: 4/64 8/64",
        "rms: bfloat16",
        "steel_attention bfloat16: 72 128",
    ]


def test_kernels_that_came_and_went_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    old = ["# mlx-metal 0.32.4", "rms: bfloat16 float32", "steel_attention bfloat16: 64 72"]
    assert metal_table.compared(old, [old[1], "steel_attention bfloat16: 72 80"], "1.0") == 1
    out = capsys.readouterr().out.split("\n")
    assert out[:4] == [
        "mlx-metal 1.0: 1 gone",
        "  steel_attention bfloat16 64",
        "mlx-metal 1.0: 1 new",
        "  steel_attention bfloat16 80",
    ]
    assert metal_table.compared(old, old[1:], "1.0") == 0


def test_weights_without_storage_take_none() -> None:
    before = start_measuring()
    with Trace():
        runner = gpu_runner(empty_model(SIZES["27B"], bits=None))
    assert isinstance(runner, Runner) and mx.get_active_memory() - before < 50 << 20

"""The fused decoder against the plain one: the same logits, fewer kernels, nothing held twice, nothing copied."""

from __future__ import annotations

import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from memory_held import start_measuring
from mlx.utils import tree_flatten
from random_model import WINDOW, random_model, random_pictures, tiny_config, tokens_with_pictures

from mlx_gemma3.model import cpu, unpacking
from mlx_gemma3.model.attention import attend, attend_all
from mlx_gemma3.model.fused import Kernels, gelu_times, gpu_kernels, gpu_tower
from mlx_gemma3.model.gemma3 import Gemma3
from mlx_gemma3.model.layers import PatchConv, gelu_tanh
from mlx_gemma3.model.runner import Runner, on_device

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}  # widths that pack in groups of 32
# What no kernel stands behind: other views of the same numbers.
VIEWS = {"Transpose", "ExpandDims", "Squeeze", "Reshape", "Flatten", "Unflatten", "Broadcast", "Split", "Slice", "Full"}


def packed(kind: str) -> Gemma3:
    """A random text model with matrices packed as `kind` says."""
    model = random_model(tiny_config(vision=False, **WIDE))

    def choose(path: str, module: nn.Module) -> Any:
        if not isinstance(module, nn.Linear | nn.Embedding) or kind == "plain":
            return False
        if kind == "matrices" and path.endswith("embed_tokens"):
            return False
        if kind == "mixed" and path.endswith("v_proj"):  # as in the Q4_K_M files of llama.cpp
            return {"group_size": 32, "bits": 8}
        if kind == "partly" and path.endswith(("k_proj", "up_proj")):
            return False
        return {"group_size": 32, "bits": 4, **({"mode": "mxfp4"} if kind == "mxfp4" else {})}

    nn.quantize(model, class_predicate=choose)
    return model


def logits_of(runner: Runner) -> list[mx.array]:
    """Two prompts, one over two windows, then single tokens of both together, then some more of each."""
    ids = np.random.default_rng(1).integers(0, 50, (2, 2 * WINDOW + 3))
    out, rows = [], [runner.make_caches(), runner.make_caches()]
    for one, caches, length in zip(ids, rows, (2 * WINDOW + 3, 5), strict=True):
        out.append(runner.head(runner.read(one[None, :length], None, caches)))
    for token in range(2 * WINDOW):
        out.append(runner.step(mx.array([token, token + 1]), rows))
        out.append(runner.step(mx.array([token]), rows[1:]))
    out += [runner.head(runner.read(ids[:1, :WINDOW], None, caches, last_only=True)) for caches in rows]
    mx.eval(out)
    return out


def kernels_of(form: str) -> Kernels:
    if form in ("cpu", "unpacked"):
        return cpu.kernels(unpack=form == "unpacked")
    return gpu_kernels(compiled=form == "compiled")


@pytest.mark.parametrize("form", ["gpu", "compiled", "cpu", "unpacked"])  # without g++, MLX compiles nothing on a CPU
@pytest.mark.parametrize("kind", ["plain", "four bits", "mixed", "partly", "mxfp4"])
def test_the_fused_model_is_the_plain_one(kind: str, form: str) -> None:
    model = packed(kind)
    want = logits_of(Runner(model))
    got = logits_of(Runner(model, kernels_of(form)))
    assert max(mx.abs(a - b).max().item() for a, b in zip(want, got, strict=True)) < 1e-4
    assert not mx.array_equal(want[0], got[0]) or kind == "four bits"  # the other path was taken


def test_a_packed_matrix_is_unpacked_with_a_prompt_or_the_second_token(monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[int] = []
    fill = cpu.unpack_all

    def counted(out: Any, *rest: Any) -> Any:
        filled.append(len(out))
        return fill(out, *rest)

    monkeypatch.setattr(cpu, "unpack_all", counted)
    module = nn.QuantizedLinear(64, 48, bias=False, group_size=32, bits=4)
    one, many = mx.random.normal((1, 64)), mx.random.normal((5, 64))
    by_one, by_many = cpu.matrix(module, unpack=True), cpu.matrix(module, unpack=True)
    for turn in range(3):
        assert mx.allclose(by_one(one), module(one), atol=1e-5)
        assert len(filled) == (turn > 0)
    filled.clear()
    for x in (many, one, many):
        assert mx.allclose(by_many(x), module(x), atol=1e-5)
    assert filled == [48]


def test_only_a_packed_model_that_is_small_beside_the_memory_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed("four bits")
    numbers = sum(m.weight.size * 8 for _, m in model.named_modules() if "scales" in m)
    for memory, unpacked in ((16 * numbers, True), (16 * numbers - 1, False)):
        monkeypatch.setattr("os.sysconf", lambda name, memory=memory: memory if name == "SC_PHYS_PAGES" else 1)
        want = 4 * numbers if unpacked else 0
        assert unpacking.unpacked_bytes(model) == on_device(model).unpacked_bytes == want
        assert unpacking.unpacked_bytes(packed("plain")) == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles with it on a CPU")
def test_one_graph_is_compiled_for_all_layers_and_holds_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    norms, norm = 0, mx.fast.rms_norm

    def counted(*args: Any) -> mx.array:
        nonlocal norms
        norms += 1
        return norm(*args)

    monkeypatch.setattr(mx.fast, "rms_norm", counted)
    before = start_measuring()
    model = packed("plain")
    runner = Runner(model, gpu_kernels())
    caches = runner.make_caches()
    found = []
    for token in (3, 4, 5):
        mx.eval(runner.step(mx.array([token]), [caches]))
        found.append(norms)
    traced, last = 5, 1
    assert found == [traced + last, traced + 2 * last, traced + 3 * last]
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    del model, runner, caches
    mx.synchronize()
    assert mx.get_active_memory() - before < 0.1 * weights


def test_pictures_go_the_same_way() -> None:
    model, pixels = random_model(tiny_config()), random_pictures(2)
    ids = np.array([tokens_with_pictures("tItttIt")[0]])
    want = [model(ids, pixels), model(ids, pixels, last_only=True)]
    for runner in (on_device(model), Runner(model, gpu_kernels(compiled=False))):
        features = runner.encode_images(pixels)
        got = [runner.head(runner.read(ids, features, last_only=last)) for last in (False, True)]
        assert all(mx.allclose(a, b, atol=1e-4) for a, b in zip(want, got, strict=True))


def test_what_between_raises_leaves_the_plain_model() -> None:
    model, calls = packed("plain"), 0
    want = model([[1, 2, 3]])

    def between() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        on_device(model, between)
    assert calls == 3 and mx.allclose(model([[1, 2, 3]]), want, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "four bits"])
def test_nothing_is_held_twice(kind: str) -> None:
    model = packed(kind)
    mx.eval(model.parameters())
    before = start_measuring()
    runner = on_device(model)
    mx.synchronize()
    mx.clear_cache()
    assert runner.model is model
    norms = sum(array.nbytes for name, array in tree_flatten(model.parameters()) if "norm" in name)
    rounding = 20_000  # of buffers to whole pages
    assert (
        mx.get_active_memory() - before
        < 16 * norms + rounding
        < 0.3 * sum(array.nbytes for _, array in tree_flatten(model.parameters())) + (1 << 20)
    )


def test_a_step_takes_17_kernels_a_layer_and_at_most_3_for_each_other_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Counted in the graph. MLX's fast operations are one kernel each on a GPU: here one primitive stands for each,
    which is not fused with its neighbours either.
    """
    model = packed("matrices")
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, weight, eps: mx.softmax(x, axis=-1))
    monkeypatch.setattr(mx.fast, "rope", lambda x, *_, **__: mx.cumsum(x, axis=-1))
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention_stand_in)
    runner = Runner(model, gpu_kernels())
    layers = model.config.text.num_hidden_layers
    outside = 4  # the embedding and its scale, the last norm, the head
    for rows in (1, 2, 8):
        kernels = count(runner, rows, tmp_path / "graph.dot")
        assert sum(kernels.values()) - outside <= (17 + 3 * (rows - 1)) * layers, (rows, kernels)
        compiled = [name for name in kernels if name.startswith("Compiled")]  # GeGLU; the gains of several rows
        assert len(compiled) == min(rows, 2), kernels
        assert kernels["QuantizedMatmul"] == 4 * layers and kernels["SliceUpdate"] == rows * layers
    assert sum(count(runner, 1, tmp_path / "graph.dot").values()) - outside == 17 * layers


def attention_stand_in(q: mx.array, k: mx.array, v: mx.array, **_: object) -> mx.array:
    """One primitive with these three inputs."""
    return mx.concatenate([q, k[:, :, :1], v[:, :, :1]], axis=1)[:, : q.shape[1]]


def count(runner: Runner, rows: int, path: Path) -> Counter[str]:
    mx.export_to_dot(str(path), runner.step(mx.array([3] * rows), [runner.make_caches() for _ in range(rows)]))
    found = Counter(re.findall(r'label ="([^"]+)"', path.read_text(encoding="utf-8")))
    return Counter({name: number for name, number in found.items() if name not in VIEWS})


def test_gelu_by_a_sigmoid_is_the_rule_in_one_kernel(tmp_path: Path) -> None:
    x = mx.linspace(-12, 12, 4001).astype(mx.bfloat16)
    for compiled in (True, False):
        got = gpu_tower(compiled=compiled).gelu
        assert mx.allclose(got(x.astype(mx.float32)), gelu_tanh(x.astype(mx.float32)), atol=2e-6)
        assert mx.allclose(got(x), gelu_tanh(x), rtol=2**-7, atol=1e-5)
    mx.export_to_dot(str(tmp_path / "gelu.dot"), gpu_tower().gelu(x))
    (kernel,) = re.findall(r'label ="(Compiled[^"]+)"', (tmp_path / "gelu.dot").read_text(encoding="utf-8"))
    assert kernel


def test_the_tower_attends_the_same_by_head() -> None:
    q, k, v = (mx.random.normal((2, 3, 10, 72), key=mx.random.key(n)) for n in range(3))
    want = attend_all(q, k, v, 0.1)
    assert mx.allclose(cpu.attend_all(q, k, v, 0.1), want, atol=1e-6)


def test_on_the_cpu_a_picture_holds_no_scores_but_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (mx.random.normal((1, 8, 512, 16), key=mx.random.key(n)) for n in range(3))
    mx.eval(q, k, v)
    scores = 512 * 512 * 4  # bytes, of one head

    def peak(attend: Callable[..., mx.array]) -> int:
        before = start_measuring()
        mx.eval(attend(q, k, v, 0.25))
        return mx.get_peak_memory() - before

    monkeypatch.setattr(cpu, "BLOCK", 4096)
    monkeypatch.setattr(cpu, "MANY", 1)
    assert peak(cpu.attend_all) < 2 * scores < 8 * scores <= peak(attend_all)


def test_geglu_is_gelu_times_up() -> None:
    gate, up = mx.random.normal((50, 40), key=mx.random.key(1)) * 4, mx.random.normal((50, 40), key=mx.random.key(2))
    assert mx.allclose(gelu_times(gate, up), gelu_tanh(gate) * up, atol=2e-6)
    assert mx.allclose(cpu.geglu(gate, up), gelu_tanh(gate) * up, atol=2e-6)
    assert mx.allclose(cpu.gelu_tanh(gate), gelu_tanh(gate), atol=2e-6)
    half = gelu_times(gate.astype(mx.bfloat16), up.astype(mx.bfloat16))
    assert half.dtype == mx.bfloat16 and mx.allclose(half.astype(mx.float32), gelu_tanh(gate) * up, atol=0.1, rtol=0.05)


def test_decoding_copies_no_cache() -> None:
    """Peak memory over 100 steps is flat; with somebody holding the caches' buffers it is not."""
    model = random_model(tiny_config(vision=False, max_position_embeddings=65536, sliding_window=16))
    runner = on_device(model)

    def growth(*, hold: bool) -> int:
        caches = runner.make_caches()
        for layer in caches:  # as after 20,000 tokens: large buffers with room in them
            layer.append(mx.zeros((1, 4, 20_000, 16)))
        mx.eval(caches.arrays)
        mx.eval(runner.step(mx.array([1]), [caches]))
        before, held = start_measuring(), []
        for token in range(100):
            if hold:
                held = [part[...] for part in caches.arrays]
                mx.eval(held)
            mx.eval(runner.step(mx.array([token % 50]), [caches]))
        assert not hold or held
        return mx.get_peak_memory() - before

    one_buffer = 20_480 * 2 * 16 * 4
    assert growth(hold=False) < one_buffer < growth(hold=True)


@pytest.mark.parametrize("blocks", ["small", "large"])
@pytest.mark.parametrize(
    "kind", ["float32", "float16", "bfloat16", "2", "3", "4", "5", "6", "8", "mxfp4", "mxfp8", "nvfp4"]
)
def test_on_the_cpu_every_kind_of_matrix_is_multiplied_with(
    kind: str, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks == "small":
        for module in (cpu, unpacking):
            monkeypatch.setattr(module, "BLOCK", 200)
        monkeypatch.setattr(cpu, "SMALL", 0)
        monkeypatch.setattr(cpu, "WORTH_SHARING", 1)
        monkeypatch.setattr(cpu, "all_cores", lambda: 3)
    layer = nn.Linear(64, 50, bias=False)
    layer.weight = mx.random.normal((50, 64), key=mx.random.key(5))
    if "float" in kind:
        layer.weight = layer.weight.astype(getattr(mx, kind))
        rows = layer.weight
    else:
        mode = kind if not kind.isdigit() else "affine"
        bits = {"mxfp4": 4, "nvfp4": 4, "mxfp8": 8}.get(kind) or int(kind)
        group = 16 if kind == "nvfp4" else 32
        layer = nn.QuantizedLinear.from_linear(layer, group, bits, mode)
        rows = mx.dequantize(layer.weight, layer.scales, layer.get("biases"), group, bits, mode)
    multiply = cpu.matrix(layer)
    for shape in ((1, 1), (1, cpu.UNPACK_FROM - 1), (2, cpu.UNPACK_FROM)):
        x = mx.random.normal((*shape, 64), key=mx.random.key(shape[1]))
        want = x @ rows.astype(mx.float32).T
        assert mx.allclose(multiply(x), want, atol=1e-4, rtol=1e-4)
        half = multiply(x.astype(mx.bfloat16))
        assert half.dtype == mx.bfloat16 and mx.allclose(half.astype(mx.float32), want, atol=0.3, rtol=0.05)


def test_on_the_cpu_packed_matrices_are_unpacked_for_many_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.QuantizedLinear.from_linear(nn.Linear(64, 48), 32, 4)
    fast, calls = cpu.with_bias(layer), 0
    product = cpu.matmul

    def counted(*args: Any) -> mx.array:
        nonlocal calls
        calls += 1
        return product(*args)

    monkeypatch.setattr(cpu, "matmul", counted)
    for rows in (1, cpu.UNPACK_FROM - 1, cpu.UNPACK_FROM, 40):
        x = mx.random.normal((rows, 64), key=mx.random.key(rows))
        assert mx.allclose(fast(x), layer(x), atol=1e-5)
    assert calls == 2


@pytest.mark.parametrize("mask", [None, "causal", "window", "rows"])
@pytest.mark.parametrize(("length", "count"), [(1, 40), (7, 7), (9, 40)])
def test_on_the_cpu_attention_is_attention(
    mask: str | None, length: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "BLOCK", 300)
    monkeypatch.setattr(cpu, "MANY", 1)
    monkeypatch.setattr(cpu, "VECTOR_NUMBERS", 100)
    shapes = ((2, 6, length, 8), (2, 3, count, 8), (2, 3, count, 8))
    q, k, v = (mx.random.normal(shape, key=mx.random.key(n)) * 3 for n, shape in enumerate(shapes))
    ages = mx.arange(count - length, count)[:, None] - mx.arange(count)[None]
    window = mx.logical_and(ages >= 0, ages < 5)
    rows = mx.stack([window, ages >= 0])[:, None]
    how: Any = {"window": window[None, None], "rows": rows}.get(mask or "", mask)
    if mask == "causal" and length == 1:
        how = None
    want = attend(q, (k,), (v,), scale=0.4, mask=how)
    assert mx.allclose(cpu.attend(q, (k,), (v,), scale=0.4, mask=how), want, atol=1e-5)


def test_on_the_cpu_norms_are_norms() -> None:
    x, gain = mx.random.normal((2, 5, 33), key=mx.random.key(1)) * 4, mx.random.normal((33,), key=mx.random.key(2))
    assert mx.allclose(cpu.norm(x, gain, 1e-6), mx.fast.rms_norm(x, gain, 1e-6), atol=1e-5)
    assert mx.allclose(cpu.norm(x, None, 1e-6), mx.fast.rms_norm(x, None, 1e-6), atol=1e-5)
    assert cpu.norm(x.astype(mx.bfloat16), gain.astype(mx.bfloat16), 1e-6).dtype == mx.bfloat16


def test_on_the_cpu_patches_are_the_convolution() -> None:
    conv = PatchConv(6, 4)
    conv.weight, conv.bias = mx.random.normal((6, 4, 4, 3)), mx.random.normal((6,))
    pixels = mx.random.normal((2, 12, 12, 3))
    assert mx.allclose(cpu.with_bias(conv)(pixels), conv(pixels), atol=1e-4)


def test_each_thread_has_streams_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "all_cores", lambda: 2)
    monkeypatch.setattr(cpu, "WORTH_SHARING", 1)
    layer = nn.QuantizedLinear.from_linear(nn.Linear(64, 48, bias=False), 32, 4)
    multiply, x = cpu.matrix(layer), mx.ones((1, 64))
    want = layer(x)
    mx.eval(want)
    found: list[bool] = []

    def work() -> None:
        found.append(bool(mx.allclose(multiply(mx.ones((1, 64))), want, atol=1e-5)))

    work()
    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [True] * 4


def test_on_the_cpu_infinities_pass_in_silence() -> None:
    x = mx.array([[mx.inf, 1.0], [-mx.inf, 2.0]])
    assert mx.isnan(cpu.norm(x, None, 1e-6)).any().item()
    assert mx.isnan(cpu.attend_all(x[None, None], x[None, None], x[None, None], 1.0)).any().item()

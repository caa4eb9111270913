"""What training computes: PEFT's gradients in transformers, with pictures; and numpy's derivatives are MLX's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from examples.demo_model.accuracy import causal_pictures
from mlx_gemma3.checkpoint.load import load_model
from mlx_gemma3.model.layers import gelu_tanh
from mlx_gemma3.tune import forward, host, layers

pytest.importorskip("mlx_lm")
TESTS = Path(__file__).parent
FOLDER = TESTS / "goldens" / "model" / "image"
STORED = TESTS / "goldens" / "gradients" / "adapters.npz"
BATCH = ("image_middle", "three_interleaved", "text_only")  # as make_gradient_goldens.py has it
SHAPE = {"rank": 3, "alpha": 6.0, "tower": True}  # of LoRA the projector too
SAMPLES = 16


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """As make_gradient_goldens.py draws it."""
    import zlib

    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    return (values / shape[0] ** 0.5 if name.endswith("lora_a") else values * 0.1).astype(np.float32)


def gradients(kind: str, *, plain: bool = False, checkpointing: bool = False) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of the batch, and each parameter's gradient."""
    model = load_model(FOLDER, dtype="float32")
    layers.insert(model, layers.Shape(kind=kind, projector=kind == "lora", **SHAPE), seed=0)
    values = {name: mx.array(drawn(name, value.shape)) for name, value in layers.parameters(model).items()}
    lengths = {name: value for name, value in layers.parameters(model).items() if name.endswith(".m")}
    layers.put(model, values | {name: value * (1 + values[name]) for name, value in lengths.items()})
    trainee = forward.Trainee(model, plain=plain, checkpointing=checkpointing)
    samples, pixels = [], []
    for case in BATCH:
        with np.load(FOLDER / "cases" / f"{case}.npz") as golden, np.load(FOLDER / "pictures.npz") as pictures:
            tokens = golden["tokens"].astype(np.int32)
            if "pictures" in golden:
                pixels += list(pictures["levels"][golden["pictures"]].astype(np.float32) / 127.5 - 1)
        image, places = tokens == model.config.image_token_id, np.arange(len(tokens))
        starts = np.flatnonzero(image & ~np.roll(image, 1))
        spans = tuple((int(start), int(start) + model.config.mm_tokens_per_image) for start in starts)
        samples.append(forward.Sample(tokens, (places % 3 > 0) & ~image, spans))
    everything = np.stack(pixels)

    def loss(_: nn.Module) -> mx.array:
        return trainee.costs(samples, trainee.see(everything)).mean()

    value, slopes = nn.value_and_grad(model, loss)(model)
    return value.item(), {name: np.array(slope) for name, slope in tree_flatten(slopes)}


def furthest(kind: str, found: dict[str, np.ndarray]) -> float:
    """How far gradients are from those stored, as a share of each one's largest number."""
    most = 0.0
    with np.load(STORED) as stored:
        assert sorted(found) == stored[f"{kind} names"].tolist()
        for name, numbers, norm in zip(sorted(found), stored[f"{kind} numbers"], stored[f"{kind} norms"], strict=True):
            flat = np.ascontiguousarray(found[name]).reshape(-1)
            some = flat[np.unique(np.linspace(0, flat.size - 1, SAMPLES).astype(int))]
            largest = max(float(np.abs(flat).max()), 1e-4)
            most = max(most, float(np.abs(some - numbers[: len(some)]).max()) / largest)
            most = max(most, abs(float(np.linalg.norm(flat.astype(np.float64))) - norm) / max(norm, 1e-4))
    return most


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("plain", [False, True])
def test_gradients_are_pefts_with_pictures_in_the_batch(kind: str, plain: bool) -> None:
    loss, found = gradients(kind, plain=plain)
    with np.load(STORED) as stored:
        assert loss == pytest.approx(float(stored[f"{kind} loss"]), rel=1e-5)
    assert furthest(kind, found) <= 1e-4


@pytest.mark.parametrize("plain", [False, True])
def test_they_are_not_with_causal_attention_in_a_picture(plain: bool) -> None:
    """What others train with: the test above sees it."""
    with causal_pictures():
        _, found = gradients("lora", plain=plain)
    assert furthest("lora", found) > 0.05


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_they_are_those_that_peft_computes_here(kind: str) -> None:
    """Every number, where the reference is installed."""
    pytest.importorskip("peft")
    sys.path.insert(0, str(TESTS / "reference"))
    from make_gradient_goldens import adapter_gradients

    wanted = adapter_gradients(kind)
    loss, found = gradients(kind)
    assert loss == pytest.approx(float(wanted.pop("loss")), rel=1e-5)
    for name, slope in wanted.items():
        assert np.abs(found[name] - slope).max() <= 1e-4 * max(np.abs(slope).max(), 1e-4), name


def test_checkpointing_changes_nothing() -> None:
    loss, found = gradients("lora")
    again, others = gradients("lora", checkpointing=True)
    assert loss == again and all(np.array_equal(found[name], others[name]) for name in found)


def test_losses_do_not_depend_on_what_stands_beside_or_on_slices_of_the_head() -> None:
    loss, found = gradients("lora")
    with patch.object(forward, "SLICE", 288 * 7):  # seven rows at once
        again, others = gradients("lora")
    assert loss == pytest.approx(again, rel=1e-6)
    for name, slope in found.items():
        assert np.abs(slope - others[name]).max() <= 1e-5 * np.abs(slope).max(), name


def slopes(function: Callable[..., mx.array], *inputs: mx.array) -> list[np.ndarray]:
    """A function's value and its derivatives, along random slopes."""
    weights = mx.array(np.random.default_rng(7).standard_normal(function(*inputs).shape).astype(np.float32))
    value, found = mx.value_and_grad(lambda *x: (function(*x) * weights).sum(), list(range(len(inputs))))(*inputs)
    return [np.array(value), *map(np.array, found)]


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("mask", [None, "causal", "array"])
def test_numpys_attention_has_mlxs_derivative(mask: str | None) -> None:
    q, k, v = random(2, 4, 9, 16), random(2, 2, 9, 16, seed=1), random(2, 2, 9, 16, seed=2)
    shown = mx.array(np.random.default_rng(3).random((2, 1, 9, 9)) < 0.5) | mx.eye(9, dtype=mx.bool_)
    given = shown if mask == "array" else mask

    def plain(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=given)

    def ours(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return host.attend(q, (k,), (v,), scale=0.3, mask=given)

    for one, other in zip(slopes(ours, q, k, v), slopes(plain, q, k, v), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 700])  # small ones are copied, large ones written in place
def test_numpys_functions_have_mlxs_derivatives(rows: int) -> None:
    x, y, gain = random(rows, 1, 128), random(rows, 1, 128, seed=1), random(128, seed=2)
    pairs: list[tuple[Callable[..., mx.array], Callable[..., mx.array], tuple[mx.array, ...]]] = [
        (host.geglu, lambda gate, up: gelu_tanh(gate) * up, (x, y)),
        (host.gelu, gelu_tanh, (x,)),
        (lambda x: host.rms_norm(x, gain, 1e-6), lambda x: mx.fast.rms_norm(x, gain, 1e-6), (x,)),
        (host.multiply, lambda x, w: x @ w, (x, random(128, 5, seed=3))),
    ]
    for ours, plain, inputs in pairs:
        for one, other in zip(slopes(ours, *inputs), slopes(plain, *inputs), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("unpack", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_matrix_is_multiplied_both_ways(bits: int, unpack: bool) -> None:
    base = nn.QuantizedLinear(128, 96, bias=False, group_size=64, bits=bits)
    x = random(5, 1, 128)
    with patch.object(host.cpu, "BLOCK", 128 * 40):  # 40 rows at a time
        ours = slopes(host.Matrix(base, unpack=unpack), x)
    for one, other in zip(ours, slopes(base, x), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)

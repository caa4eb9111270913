"""Our model classes have the gradients of transformers', on a tiny checkpoint with a picture: they can be trained."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_gemma3.checkpoint.load import load_model
from mlx_gemma3.checkpoint.safetensors import PATCH_WEIGHT, canonical_name
from mlx_gemma3.model.gemma3 import Gemma3

TESTS = Path(__file__).parent
FOLDER = TESTS / "goldens" / "model" / "image"
CASE = "image_middle"  # text on both sides of the picture, longer than the window
SAMPLES = 64  # of each gradient in the golden file


@pytest.fixture(scope="module")
def ours() -> tuple[float, dict[str, np.ndarray]]:
    """Loss of the next token over all positions, and its gradients in the Hub's shapes."""
    with np.load(FOLDER / "cases" / f"{CASE}.npz") as case, np.load(FOLDER / "pictures.npz") as pictures:
        tokens = case["tokens"].astype(np.int32)[None]  # (1, L)
        pixels = pictures["levels"][case["pictures"]].astype(np.float32) / 127.5 - 1  # (1, S, S, 3)
    model = load_model(FOLDER, dtype="float32")
    model.unfreeze()

    def loss(model: Gemma3) -> mx.array:
        logits = model(tokens[:, :-1], pixels)
        return nn.losses.cross_entropy(logits, mx.array(tokens[:, 1:]), reduction="mean")

    value, slopes = nn.value_and_grad(model, loss)(model)
    arrays = {name: np.array(slope) for name, slope in tree_flatten(slopes)}
    arrays[PATCH_WEIGHT] = arrays[PATCH_WEIGHT].transpose(0, 3, 1, 2)  # ours is channels last
    return value.item(), arrays


def spread(array: np.ndarray) -> np.ndarray:
    """As make_gradient_goldens.py takes them."""
    flat = array.reshape(-1)
    return flat[np.unique(np.linspace(0, flat.size - 1, SAMPLES).astype(int))]


def close(found: np.ndarray, wanted: np.ndarray, largest: float, name: str) -> None:
    """float32 sums in another order: measured, under 1e-5 of the tensor's largest slope."""
    assert np.abs(found - wanted).max() <= 1e-4 * max(largest, 1e-3), name


def test_gradients_are_those_stored_from_transformers(ours: tuple[float, dict[str, np.ndarray]]) -> None:
    loss, found = ours
    with np.load(TESTS / "goldens" / "gradients" / "gradients.npz") as stored:
        assert loss == pytest.approx(float(stored["loss"]), abs=1e-5)
        names = {name for name in stored if name != "loss" and not name.endswith(" norm")}
        assert {canonical_name(name) for name in names} == found.keys()
        for name in names:
            slope, norm = found[canonical_name(name)], float(stored[f"{name} norm"])
            close(spread(slope), stored[name], np.abs(slope).max(), name)
            assert np.linalg.norm(slope) == pytest.approx(norm, rel=1e-4, abs=1e-6), name


def test_gradients_are_those_of_transformers(ours: tuple[float, dict[str, np.ndarray]]) -> None:
    """Every number, where the reference is installed."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    sys.path.insert(0, str(TESTS / "reference"))
    from make_gradient_goldens import gradients

    wanted = gradients()
    loss, found = ours
    assert loss == pytest.approx(float(wanted.pop("loss")), abs=1e-5)
    assert {canonical_name(name) for name in wanted} == found.keys()
    for name, slope in wanted.items():
        close(found[canonical_name(name)], slope, np.abs(slope).max(), name)


def test_every_parameter_has_a_gradient(ours: tuple[float, dict[str, np.ndarray]]) -> None:
    still = [name for name, slope in ours[1].items() if not np.abs(slope).max() > 0]
    # a key's bias shifts all scores of a query alike, so nothing follows from it but rounding
    assert [name for name in still if "k_proj.bias" not in name] == []

"""Our model classes have the gradients of transformers', on a tiny checkpoint with a picture: they can be trained."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_gemma3.checkpoint.load import load_model
from mlx_gemma3.checkpoint.tensors import PATCH_WEIGHT, canonical_name
from mlx_gemma3.model.gemma3 import Gemma3

FOLDER = Path(__file__).parent / "goldens" / "model" / "image"
CASE = "image_middle"  # text on both sides of the picture, longer than the window


def prompt() -> tuple[np.ndarray, np.ndarray]:
    """(1, L) ids and (1, S, S, 3) pixels of the golden case."""
    with np.load(FOLDER / "cases" / f"{CASE}.npz") as case, np.load(FOLDER / "pictures.npz") as pictures:
        tokens = case["tokens"].astype(np.int32)[None]
        levels = pictures["levels"][case["pictures"]]
    return tokens, levels.astype(np.float32) / 127.5 - 1


def our_gradients(tokens: np.ndarray, pixels: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """Loss of the next token over all positions, and its gradients by the Hub's shapes."""
    model = load_model(FOLDER, dtype="float32")
    model.unfreeze()

    def loss(model: Gemma3) -> mx.array:
        logits = model(tokens[:, :-1], pixels)
        return nn.losses.cross_entropy(logits, mx.array(tokens[:, 1:]), reduction="mean")

    value, slopes = nn.value_and_grad(model, loss)(model)
    arrays = {name: np.array(slope) for name, slope in tree_flatten(slopes)}
    arrays[PATCH_WEIGHT] = arrays[PATCH_WEIGHT].transpose(0, 3, 1, 2)  # ours is channels last
    return value.item(), arrays


def test_gradients_are_those_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokens, pixels = prompt()
    reference = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        FOLDER, attn_implementation="eager", dtype=torch.float32
    )
    ids = torch.from_numpy(tokens[:, :-1].astype(np.int64))
    logits = reference(
        input_ids=ids,
        pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
        token_type_ids=(ids == reference.config.image_token_id).long(),
    ).logits
    wanted_loss = torch.nn.functional.cross_entropy(logits[0], torch.from_numpy(tokens[0, 1:].astype(np.int64)))
    wanted_loss.backward()
    wanted = {canonical_name(name): p.grad.numpy() for name, p in reference.named_parameters() if p.grad is not None}
    loss, found = our_gradients(tokens, pixels)
    assert loss == pytest.approx(wanted_loss.item(), abs=1e-5)
    assert found.keys() == wanted.keys()
    for name, slope in wanted.items():
        # float32 sums in another order: measured, under 1e-5 of the tensor's largest slope
        assert np.abs(found[name] - slope).max() <= 1e-4 * max(np.abs(slope).max(), 1e-3), name


def test_every_parameter_has_a_gradient() -> None:
    _, found = our_gradients(*prompt())
    still = [name for name, slope in found.items() if not np.abs(slope).max() > 0]
    # a key's bias shifts all scores of a query alike, so nothing follows from it but rounding
    assert [name for name in still if "k_proj.bias" not in name] == []

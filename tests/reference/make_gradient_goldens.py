"""Write tests/goldens/gradients/: what transformers' backward pass gives on the tiny image checkpoint.

    python tests/reference/make_gradient_goldens.py [--out FOLDER]

    gradients.npz   loss (); for each parameter, under its name in the Hub's files, SAMPLES of its gradient's numbers,
                    evenly spread over the flat array (float32), and "NAME norm", its Euclidean length

The loss is the mean cross entropy of the next token over one golden case. Needs the `reference` extra.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from manifest import GOLDENS, write_manifest
from numpy.typing import NDArray
from transformers import Gemma3ForConditionalGeneration

MODEL = GOLDENS / "model" / "image"
CASE = "image_middle"  # text on both sides of the picture, longer than the window
SAMPLES = 64  # of each gradient


def spread(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """SAMPLES numbers of an array, or all when it has fewer."""
    flat = array.reshape(-1)
    return flat[np.unique(np.linspace(0, flat.size - 1, SAMPLES).astype(int))]


def gradients() -> dict[str, NDArray[np.float32]]:
    """ "loss" and every parameter's whole gradient, in the Hub's shapes."""
    model = Gemma3ForConditionalGeneration.from_pretrained(MODEL, attn_implementation="eager", dtype=torch.float32)
    with np.load(MODEL / "cases" / f"{CASE}.npz") as case, np.load(MODEL / "pictures.npz") as pictures:
        tokens = torch.from_numpy(case["tokens"].astype(np.int64))[None]
        levels = pictures["levels"][case["pictures"]]
    pixels = torch.from_numpy(levels.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    ids = tokens[:, :-1]
    types = (ids == model.config.image_token_id).long()
    logits = model(input_ids=ids, pixel_values=pixels, token_type_ids=types).logits
    loss = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:])
    loss.backward()
    found = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().numpy(), **found}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--out", type=Path, default=GOLDENS / "gradients", help="folder to write")
    out = options.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, slope in gradients().items():
        arrays[name] = spread(slope) if slope.ndim else slope
        if slope.ndim:
            arrays[f"{name} norm"] = np.linalg.norm(slope.astype(np.float64)).astype(np.float32)
    np.savez_compressed(out / "gradients.npz", **arrays)
    write_manifest(
        out,
        script="tests/reference/make_gradient_goldens.py",
        source="transformers, eager attention, float32, CPU; backward pass on goldens/model/image",
        packages=("torch", "transformers", "numpy"),
    )


if __name__ == "__main__":
    main()

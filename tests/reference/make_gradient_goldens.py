"""Write tests/goldens/gradients/: what transformers' backward pass gives on the tiny image checkpoint.

    python tests/reference/make_gradient_goldens.py [--out FOLDER]

    gradients.npz   loss (); for each parameter, under its name in the Hub's files, SAMPLES of its gradient's numbers,
                    evenly spread over the flat array (float32), and "NAME norm", its Euclidean length

The loss is the mean cross entropy of the next token over one golden case.

    adapters.npz    of PEFT's adapters of all matrices, the tower's too, of LoRA also the projector's, for each KIND
                    ("lora", "dora"): "KIND loss" ();
                    "KIND names", of the gradients in the alphabet's order, as mlx-lm calls the parameters;
                    "KIND numbers" (names, ADAPTER_SAMPLES), evenly spread over each; "KIND norms"

Their loss is the mean over the words that `counted` names, of several golden cases together. Needs the `reference`
extra.
"""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path

import numpy as np
import torch
from manifest import GOLDENS, write_manifest
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from transformers import Gemma3ForConditionalGeneration

MODEL = GOLDENS / "model" / "image"
CASE = "image_middle"  # text on both sides of the picture, longer than the window
SAMPLES = 64  # of each gradient
BATCH = ("image_middle", "three_interleaved", "text_only")  # cases of several lengths, with four pictures
RANK, ALPHA = 3, 6
MODULES = "q_proj k_proj v_proj o_proj out_proj gate_proj up_proj down_proj fc1 fc2".split()
ADAPTER_SAMPLES = 16


def spread(array: NDArray[np.float32], samples: int = SAMPLES) -> NDArray[np.float32]:
    """So many numbers of an array, or all when it has fewer."""
    flat = array.reshape(-1)
    return flat[np.unique(np.linspace(0, flat.size - 1, samples).astype(int))]


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


def drawn(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A parameter of an adapter, by its name in mlx-lm's layout: "….lora_a" (in, r), "….lora_b" (r, out), "….m"."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    values = values / shape[0] ** 0.5 if name.endswith("lora_a") else values * 0.1
    return values.astype(np.float32)


def counted(tokens: NDArray[np.int64], image_id: int) -> NDArray[np.int64]:
    """The places whose tokens are to be predicted: two of three words, never a picture's row."""
    places = np.arange(1, len(tokens))
    return places[(places % 3 > 0) & (tokens[1:] != image_id)]


def layout(name: str) -> str:
    """PEFT's name of a parameter → mlx-lm's, in this project's names of modules.

    The projector's matrix stands the other way round in the Hub's files, and so does its pair.
    """
    name = name.removeprefix("base_model.model.model.").replace(".default", "")
    for part, called in ((".lora_A.weight", ".lora_a"), (".lora_B.weight", ".lora_b"),
                         (".lora_magnitude_vector.weight", ".m")):  # fmt: skip
        name = name.replace(part, called)
    if name.startswith("multi_modal_projector."):
        name = f"multi_modal_projector.matrix.{'lora_b' if name.endswith('a') else 'lora_a'}"
    return name


def is_turned(name: str) -> bool:
    """Whether PEFT holds a parameter the other way round than mlx-lm."""
    return not name.endswith(".m") and not name.startswith("multi_modal_projector.")


def adapter_gradients(kind: str) -> dict[str, NDArray[np.float32]]:
    """ "loss" and the gradient of each parameter of an adapter, in mlx-lm's names and shapes."""
    base = Gemma3ForConditionalGeneration.from_pretrained(MODEL, attn_implementation="eager", dtype=torch.float32)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=MODULES, use_dora=kind == "dora",
        target_parameters=None if kind == "dora" else ["multi_modal_projector.mm_input_projection_weight"],
    )  # fmt: skip
    model = get_peft_model(base, config).eval()
    learns = {layout(name): p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in learns.items():
            values = torch.from_numpy(drawn(name, tuple(p.shape[::-1] if is_turned(name) else p.shape)))
            if name.endswith(".m"):
                p.mul_(1 + values)
            else:
                p.copy_(values.T if is_turned(name) else values)
    costs, count = torch.zeros(()), 0
    for case in BATCH:
        with np.load(MODEL / "cases" / f"{case}.npz") as golden, np.load(MODEL / "pictures.npz") as pictures:
            tokens = golden["tokens"].astype(np.int64)
            levels = pictures["levels"][golden["pictures"]] if "pictures" in golden else []
        ids, given = torch.from_numpy(tokens)[None], {}
        if len(levels):
            pixels = torch.from_numpy(levels.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
            given = {"pixel_values": pixels, "token_type_ids": (ids == base.config.image_token_id).long()}
        places = counted(tokens, base.config.image_token_id)
        logits = model(input_ids=ids, **given).logits[0, places - 1]
        costs = costs + torch.nn.functional.cross_entropy(logits, ids[0, places], reduction="sum")
        count += len(places)
    loss = costs / count
    loss.backward()
    found = {name: p.grad.numpy().T if is_turned(name) else p.grad.numpy() for name, p in learns.items()}
    return {"loss": loss.detach().numpy(), **found}


def packed_adapters() -> dict[str, NDArray[np.generic]]:
    """What adapters.npz holds."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for kind in ("lora", "dora"):
        slopes = adapter_gradients(kind)
        arrays[f"{kind} loss"] = slopes.pop("loss")
        names = sorted(slopes)
        numbers = np.full((len(names), ADAPTER_SAMPLES), np.nan, np.float32)
        for row, name in zip(numbers, names, strict=True):
            some = spread(np.ascontiguousarray(slopes[name]), ADAPTER_SAMPLES)
            row[: len(some)] = some
        arrays[f"{kind} names"], arrays[f"{kind} numbers"] = np.array(names), numbers
        arrays[f"{kind} norms"] = np.array([np.linalg.norm(slopes[name].astype(np.float64)) for name in names])
    return arrays


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
    np.savez_compressed(out / "adapters.npz", **packed_adapters())
    write_manifest(
        out,
        script="tests/reference/make_gradient_goldens.py",
        source="transformers, eager attention, float32, CPU; backward pass on goldens/model/image; PEFT's adapters",
        packages=("torch", "transformers", "peft", "numpy"),
    )


if __name__ == "__main__":
    main()

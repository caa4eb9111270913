"""Write tests/goldens/model/: two tiny checkpoints and what the reference computes with them.

    python tests/reference/make_model_goldens.py [--out FOLDER]

    model/text, model/image
        config.json            as the Hub writes it (2025-03), the image one sparse
        config_v5/config.json  the same model as transformers 5 writes it
        model.safetensors      float32 / bfloat16, under the Hub's names
        cases/NAME.npz         tokens (S), pictures (n, into pictures.npz), generated (32), positions (P) into
                               tokens + generated, logits (P, V); bfloat16_logits (P, V) for a few;
                               batch_*: rows, joined and their lengths, generated (B, 32), last (B, V)
        pictures.npz           levels (N, H, W, 3) uint8, vision (N, patches, hidden), features (N, T, hidden)

Every greedy step of every case has a top-1/top-2 margin of MARGIN or more, so float32 tokens must come out equal.
If a change of sizes breaks that, `--search` looks for seeds that hold it.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tiny_reference as tiny
from manifest import GOLDENS, write_manifest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

STEPS = 32
MARGIN = 5e-3
MODEL_SEED = {"text": 20, "image": 12}
BOI, EOI = tiny.IMAGE_CONFIG["boi_token_index"], tiny.IMAGE_CONFIG["eoi_token_index"]
SOFT, PER_IMAGE = tiny.IMAGE_CONFIG["image_token_index"], tiny.IMAGE_CONFIG["mm_tokens_per_image"]
SPECIAL = (0, 1, 2, 106, BOI, EOI, SOFT)

# name: (layout, seed). A number is that many random words, a letter is a picture in its <start> and <end>;
# "abc" puts three pictures' rows side by side in one block. Every prompt begins with <bos>. The window is 8.
TEXT_CASES = {
    "bos_only": ("0", 0),
    "short": ("4", 5),
    "window_minus_1": ("6", 3),
    "window": ("7", 9),
    "window_plus_1": ("8", 3),
    "five_windows": ("42", 0),
}
IMAGE_CASES = {
    "text_only": ("11", 1),
    "image_first": ("a 5", 15),
    "image_middle": ("5 b 4", 16),
    "image_last": ("7 c", 0),
    "image_straddles_window": ("3 a 6", 0),
    "image_leaves_window": ("2 d 33", 1),
    "two_adjacent": ("2 a c 3", 1),
    "three_interleaved": ("1 b 4 d 3 a 2", 6),
    "edge_block_longer_than_window": ("3 abd 5", 2),
}
BATCHES = {
    "text": {"batch_left_padded": ("short", "five_windows", "window_plus_1")},
    "image": {"batch_left_padded": ("image_middle", "text_only", "three_interleaved", "image_first")},
}
BFLOAT16 = {"text": ("window_plus_1", "five_windows"), "image": ("text_only", "three_interleaved")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=GOLDENS / "model", help="folder to write (default: the goldens)")
    parser.add_argument("--search", action="store_true", help="write nothing; print seeds that hold the margin")
    options = parser.parse_args()
    for kind, build, cases in (("text", tiny.build_text, TEXT_CASES), ("image", tiny.build_image, IMAGE_CASES)):
        model = build(MODEL_SEED[kind])
        if options.search:
            search(model, kind, cases)
        else:
            write(model, kind, cases, options.out / kind)
    if not options.search:
        write_manifest(
            options.out,
            script="tests/reference/make_model_goldens.py",
            source="transformers, eager attention, float32, CPU; tiny random weights",
            packages=("torch", "transformers", "safetensors", "numpy"),
        )


def prompt_of(layout: str, seed: int) -> tuple[tiny.Ints, list[int]]:
    """The ids of a layout and the pictures in it, as indices."""
    rng = np.random.default_rng(seed)
    words = [token for token in range(256) if token not in SPECIAL]
    ids, pictures = [2], []
    for part in layout.split():
        if part.isdigit():
            ids += rng.choice(words, int(part)).tolist()
        else:
            pictures += ["abcd".index(letter) for letter in part]
            ids += [BOI, *[SOFT] * (PER_IMAGE * len(part)), EOI]
    return np.array(ids, np.int32), pictures


def make_pictures() -> Any:
    """Four pictures of noise (4, 56, 56, 3) uint8, each of another brightness and contrast."""
    rng = np.random.default_rng(3)
    noise = rng.integers(0, 16, (4, 28, 28, 3)).repeat(2, axis=1).repeat(2, axis=2)  # coarse: it compresses
    low, step = np.array([0, 60, 0, 120]), np.array([17, 8, 6, 9])
    return (low[:, None, None, None] + noise * step[:, None, None, None]).astype(np.uint8)


def positions_of(prompt: int) -> tiny.Ints:
    """Where logits are kept: a short prompt wholly, a long one at every fifth token, then every eighth new token."""
    whole = prompt <= 20
    kept = [n for n in range(prompt) if whole or n % 5 == 0 or n == prompt - 1]
    return np.array(kept + list(range(prompt + 5, prompt + STEPS - 1, 8)), np.int32)


def write(model: PreTrainedModel, kind: str, cases: dict[str, tuple[str, int]], out: Path) -> None:
    """Write one checkpoint and its cases under `out`."""
    (out / "cases").mkdir(parents=True, exist_ok=True)
    config = tiny.TEXT_CONFIG if kind == "text" else tiny.IMAGE_CONFIG
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save(model, kind, out)
    # Read back as a user would: a model built or cast by hand in bfloat16 also has its buffers rounded (embedding
    # scale, rotary frequencies), a loaded one has not.
    model, half = (
        type(model).from_pretrained(out, dtype=dtype, attn_implementation="eager").eval()
        for dtype in ("float32", "bfloat16")
    )
    (model if kind == "text" else half).config.save_pretrained(out / "config_v5")
    levels = make_pictures()
    image_id = SOFT if kind == "image" else None
    if kind == "image":
        vision, features = tiny.vision_of(model, levels)
        np.savez_compressed(out / "pictures.npz", levels=levels, vision=vision, features=features)

    prompts = {name: prompt_of(layout, seed) for name, (layout, seed) in cases.items()}
    for name, (tokens, pictures) in prompts.items():
        shown = levels[pictures] if pictures else None
        generated, margins, logits = tiny.greedy(model, [tokens], STEPS, levels=shown, image_id=image_id)
        check(f"{kind}/{name}", generated, margins)
        positions = positions_of(len(tokens))
        arrays = {"tokens": tokens, "generated": generated[0], "positions": positions, "logits": logits[0, positions]}
        if kind == "image":
            arrays["pictures"] = np.array(pictures, np.int32)
        if name in BFLOAT16[kind]:
            sequence = np.concatenate([tokens, generated[0]])
            rounded = tiny.logits_of(half, [sequence], levels=shown, image_id=image_id)
            arrays["bfloat16_logits"] = rounded[0, positions]
        np.savez_compressed(out / "cases" / f"{name}.npz", **arrays)

    for name, members in BATCHES[kind].items():
        rows = [prompts[member][0] for member in members]
        pictures = [index for member in members for index in prompts[member][1]]
        shown = levels[pictures] if pictures else None
        last = tiny.logits_of(model, rows, levels=shown, image_id=image_id)[:, -1]
        generated, margins, _ = tiny.greedy(model, rows, STEPS, levels=shown, image_id=image_id)
        check(f"{kind}/{name}", generated, margins)
        np.savez_compressed(
            out / "cases" / f"{name}.npz",
            tokens=np.concatenate(rows),
            lengths=np.array([len(row) for row in rows], np.int32),
            pictures=np.array(pictures, np.int32),
            generated=np.stack(generated),
            last=last,
        )


def check(name: str, generated: list[tiny.Ints], margins: list[float]) -> None:
    if min(margins) < MARGIN or any(SOFT in row for row in generated):
        sys.exit(
            f"{name}: margin {min(margins):.1e}, need >= {MARGIN} and no image token; choose another seed (--search)"
        )


def save(model: PreTrainedModel, kind: str, out: Path) -> None:
    """Write model.safetensors under the names of the Hub's files, which save_pretrained restores but for one word."""
    if kind == "image":
        model = copy.deepcopy(model).bfloat16()  # exact: build_image rounded the weights
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
    hub = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors.items()}
    save_file(hub, out / "model.safetensors", metadata={"format": "pt"})


def search(model: PreTrainedModel, kind: str, cases: dict[str, tuple[str, int]]) -> None:
    """Print, for each case, the first seed whose margin is twice the needed one and whose tokens vary."""
    levels = make_pictures()
    for name, (layout, _) in cases.items():
        for seed in range(200):
            tokens, pictures = prompt_of(layout, seed)
            shown = levels[pictures] if pictures else None
            generated, margins, logits = tiny.greedy(
                model, [tokens], STEPS, levels=shown, image_id=SOFT if kind == "image" else None
            )
            distinct = len(set(generated[0].tolist()))
            if min(margins) >= 2 * MARGIN and SOFT not in generated[0] and distinct >= 8:
                print(
                    f"{name}: seed {seed}, margin {min(margins):.1e}, {distinct} ids, std {logits.std():.2f}",
                    flush=True,
                )
                break
        else:
            sys.exit(f"{kind}/{name}: no seed found")


if __name__ == "__main__":
    main()

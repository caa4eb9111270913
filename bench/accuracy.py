"""How far are the logits from transformers? This project and mlx-vlm on one tiny checkpoint, words and pictures.

    python bench/accuracy.py --transformers-python PYTHON --mlx-vlm-python PYTHON [--fresh SEED]

Each peer runs in its own interpreter (bench/peers/), everything in float32 on the CPU. Prints the report and writes it
to docs/accuracy.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np

import mlx_gemma3
from mlx_gemma3.model import text as text_module
from mlx_gemma3.model.gemma3 import Gemma3
from mlx_gemma3.model.masks import attention_mask

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "bench" / "peers"
GOLDEN = ROOT / "tests" / "goldens" / "model" / "image"
DOC = ROOT / "docs" / "accuracy.md"

# A number is that many random words, "i" a picture between its <start_of_image> and <end_of_image>.
PROMPTS = {
    "text, shorter than the window": "6",
    "text, five windows long": "40",
    "one picture": "5 i 8",
    "two pictures, side by side": "3 i i 8",
    "two pictures, apart": "3 i 6 i 8",
    "three pictures": "3 i 4 i 12 i 8",
}
# What mlx-vlm is seen to do otherwise, in the order in which the second table adds it to this project.
MISTAKES = (
    "embedding scale rounded to bfloat16",
    "picture rows scaled: divided by √(top-level hidden_size), multiplied by √(real hidden size)",
    "plain causal attention inside pictures",
)

Logits = dict[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--transformers-python", required=True, help="interpreter with torch and transformers")
    parser.add_argument("--mlx-vlm-python", required=True, help="interpreter with mlx-vlm")
    parser.add_argument("--fresh", type=int, metavar="SEED", help="another random checkpoint instead of the golden one")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as name:
            report = compare(options.transformers_python, options.mlx_vlm_python, options.fresh, Path(name))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{Path(error.cmd[1]).name} failed: {error.stderr.strip().splitlines()[-1]}")
    DOC.write_text(report, encoding="utf-8")
    print(report)


def compare(transformers_python: str, mlx_vlm_python: str, seed: int | None, work: Path) -> str:
    """Run everybody on the same prompts; returns the report."""
    folder = work / "checkpoint"
    folder.mkdir()
    if seed is None:
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(GOLDEN / file, folder / file)
    else:
        run(transformers_python, "fresh_checkpoint.py", str(folder), str(seed))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    prompts = make_prompts(config)
    np.savez(work / "prompts.npz", **prompts)

    reference, facts = peer(transformers_python, "transformers_logits.py", folder, work)
    model = mlx_gemma3.load_model(folder, dtype="float32")
    ours = own_logits(model, prompts)

    refusal = ""
    try:
        peer(mlx_vlm_python, "mlx_vlm_logits.py", folder, work)
    except subprocess.CalledProcessError as error:
        refusal = error.stderr.strip().splitlines()[-1]
    config["text_config"]["mm_tokens_per_image"] = config["mm_tokens_per_image"]
    vlm, vlm_facts = peer(mlx_vlm_python, "mlx_vlm_logits.py", adapted(folder, config, work / "adapted"), work)
    config["hidden_size"] = config["text_config"]["hidden_size"]
    told, _ = peer(mlx_vlm_python, "mlx_vlm_logits.py", adapted(folder, config, work / "told"), work)

    table = [
        f"| {name} | {len(reference[name])} | {distance(ours, reference, name):.1e} "
        f"| {distance(vlm, reference, name):.2g} | {distance(told, reference, name):.2g} "
        f"| {changed(ours, reference, name)} | {changed(vlm, reference, name)} | {changed(told, reference, name)} |"
        for name in PROMPTS
    ]
    causes = []
    for count in range(len(MISTAKES) + 1):
        with imitation(model, count, vlm_facts["hidden_size"]):
            made = own_logits(model, prompts)
        what = "as it is" if count == 0 else f"and {MISTAKES[count - 1]}"
        causes.append(f"| {what} | {max(distance(made, vlm, name) for name in PROMPTS):.1e} |")
    spread = float(np.std(np.concatenate([reference[name] for name in PROMPTS])))
    source = "tests/goldens/model/image" if seed is None else f"a fresh one (seed {seed})"
    size = config["text_config"]["hidden_size"]
    return REPORT.format(
        command="python bench/accuracy.py --transformers-python PYTHON --mlx-vlm-python PYTHON"
        + ("" if seed is None else f" --fresh {seed}"),
        source=source,
        spread=spread,
        transformers=facts["transformers"],
        torch=facts["torch"],
        vlm=vlm_facts["mlx-vlm"],
        vlm_mlx=vlm_facts["mlx"],
        own=mlx_gemma3.__version__,
        mlx=version("mlx"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        table="\n".join(table),
        causes="\n".join(causes),
        adaptation=ADAPTATION.format(refusal=refusal) if refusal else "",
        default=vlm_facts["hidden_size"],
        size=size,
        factor=(size / vlm_facts["hidden_size"]) ** 0.5,
    )


def make_prompts(config: dict[str, Any]) -> dict[str, Any]:
    """NAME.ids (L) int32 and NAME.pixels (n, S, S, 3) float32 of every prompt: random words, noisy pictures."""
    rng = np.random.default_rng(7)
    size = config["vision_config"]["image_size"]
    image = [
        config["boi_token_index"],
        *[config["image_token_index"]] * config["mm_tokens_per_image"],
        config["eoi_token_index"],
    ]
    words = [token for token in range(3, 256) if token != 106]  # no control token
    prompts: dict[str, Any] = {}
    for name, layout in PROMPTS.items():
        ids = [2]
        for part in layout.split():
            ids += image if part == "i" else rng.choice(words, int(part)).tolist()
        levels = rng.integers(0, 256, (layout.count("i"), size, size, 3))
        contrast = rng.uniform(0.3, 1.0, (layout.count("i"), 1, 1, 3))
        prompts[f"{name}.ids"] = np.array(ids, np.int32)
        prompts[f"{name}.pixels"] = ((levels / 127.5 - 1.0) * contrast).astype(np.float32)
    return prompts


def peer(python: str, script: str, folder: Path, work: Path) -> tuple[Logits, dict[str, Any]]:
    """Run a peer on the prompts: its logits (L, V) by prompt, and its versions."""
    out = work / "logits.npz"
    run(python, script, str(folder), str(work / "prompts.npz"), str(out))
    with np.load(out) as data:
        return {name: data[f"{name}.logits"] for name in PROMPTS}, json.loads(str(data["facts"]))


def run(python: str, script: str, *arguments: str) -> None:
    command = [python, str(PEERS / script), *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)


def adapted(folder: Path, config: dict[str, Any], out: Path) -> Path:
    """The same weights beside another config.json."""
    out.mkdir()
    shutil.copyfile(folder / "model.safetensors", out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


def own_logits(model: Gemma3, prompts: dict[str, Any]) -> Logits:
    """This project's logits (L, V) by prompt."""
    logits = {}
    for name in PROMPTS:
        pixels = prompts[f"{name}.pixels"]
        tokens = mx.array(prompts[f"{name}.ids"])[None]
        logits[name] = np.array(model(tokens, pixels=mx.array(pixels) if len(pixels) else None)[0])
    return logits


def distance(one: Logits, other: Logits, name: str) -> float:
    return float(np.abs(one[name] - other[name]).max())


def changed(one: Logits, other: Logits, name: str) -> int:
    """Positions whose most likely next token is another."""
    return int((one[name].argmax(axis=-1) != other[name].argmax(axis=-1)).sum())


@contextmanager
def imitation(model: Gemma3, count: int, assumed_size: int) -> Iterator[None]:
    """This project with the first `count` of MISTAKES, to see how much of the difference they are."""
    right_rows = type(model).encode_images
    rounded = float(mx.array(model.language_model.embed_scale, dtype=mx.bfloat16))

    def scaled_rows(self: Gemma3, pixels: mx.array) -> mx.array:
        rows: mx.array = right_rows(self, pixels) * (rounded / assumed_size**0.5)
        return rows

    def causal_mask(*sizes: int, **options: Any) -> mx.array | str | None:
        return attention_mask(*sizes, **{**options, "blocks": None})

    patches = (
        patch.object(model.language_model, "embed_scale", rounded),
        patch.object(type(model), "encode_images", scaled_rows),
        patch.object(text_module, "attention_mask", causal_mask),
    )
    with ExitStack() as stack:
        for change in patches[:count]:
            stack.enter_context(change)
        yield


ADAPTATION = """\
As the folder is, mlx-vlm does not load it: it reads `mm_tokens_per_image` from `text_config` only, misses it there and
takes 256, for which this picture is too small (`{refusal}`).
Its copy of config.json, in A and in B, has the value in both places.
"""

REPORT = """\
# Accuracy

Written by `bench/accuracy.py`; do not edit. The command:

    {command}

The checkpoint: {source}, tiny and random, with a vision tower, its norms and scales chosen so that
each mistake shows. Its logits spread by {spread:.1f} (standard deviation). Same ids and pixel values for everybody,
float32 on the CPU.

The reference is transformers {transformers} (torch {torch}, eager attention). Compared: this project {own} (MLX {mlx})
and mlx-vlm {vlm} (MLX {vlm_mlx}). Python {python}, {system}.

## Largest difference of a logit from transformers, at any position

mlx-vlm A: without a top-level `hidden_size` in config.json, as in the checkpoint; mlx-vlm then assumes {default}.
mlx-vlm B: with a top-level `hidden_size` of {size}, the real one, added.

| prompt | tokens | this project | mlx-vlm A | mlx-vlm B | other top token: this project | A | B |
|---|---|---|---|---|---|---|---|
{table}

mlx-vlm is called as its own `generate_step` calls the model; the script stops if `generate_step` gives other logits.
{adaptation}
## What mlx-vlm's difference is made of

This project, given mlx-vlm's deviations one on top of another, compared with mlx-vlm A: the largest difference over all
prompts. A last row near zero says that these prompts show no other deviation.

| this project | largest difference from mlx-vlm A |
|---|---|
{causes}

The second deviation multiplies the picture rows by √({size} / {default}) = {factor:.2f} here. The factor depends on the
model's size, so A does not carry over to another one; B is without it.
"""


if __name__ == "__main__":
    main()

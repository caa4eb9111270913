"""Do mlx-lm and mlx-vlm read our folders as we do, and do we read theirs? Logits of one folder in all three programs.

    python bench/peers/same_folder.py --peer-python PYTHON [--source gemma-3-270m]

PYTHON is an interpreter with mlx-lm and mlx-vlm. Everything in float32 on words alone. Prints the table and writes
docs/compatibility.md. The peers' side is this file too, run by their interpreter (`--as`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
DOC = ROOT / "docs" / "compatibility.md"
TEXT = ROOT / "bench" / "text" / "public.txt"
PEERS = ("mlx-lm", "mlx-vlm")
TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter with mlx-lm and mlx-vlm")
    parser.add_argument("--source", default="gemma-3-270m", help="real weights, as a .gguf file")
    parser.add_argument("--as", dest="peer", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        answer(options.peer, *options.files)
        return
    if options.peer_python is None:
        parser.error("--peer-python is needed")
    with tempfile.TemporaryDirectory() as name:
        DOC.write_text(report(options.peer_python, options.source, Path(name)), encoding="utf-8")
    print(DOC.read_text(encoding="utf-8"))


# The peers' side


def answer(peer: str, folder: Path, ids: Path, out: Path) -> None:
    """Write the logits of a peer: `plain`, and `corrected` with the embeddings' scale not rounded to bfloat16."""
    from importlib.metadata import version

    tokens = mx.array(np.load(ids))[None]
    model = peer_model(peer, folder)
    decoder = getattr(model, "language_model", model).model
    rows = decoder.embed_tokens(tokens)
    width = rows.shape[-1]
    rounded = mx.array(width**0.5, mx.bfloat16).astype(mx.float32)
    found = {}
    for name, factor in (("plain", 1.0), ("corrected", width**0.5 / rounded)):
        if peer == "mlx-lm":
            logits = model(tokens, input_embeddings=rows * factor)
        else:
            logits = model.language_model(tokens, inputs_embeds=rows * factor).logits
        found[name] = np.array(logits[0].astype(mx.float32))
    np.savez(out, facts=json.dumps([version(peer), version("mlx")]), **found)


def peer_model(peer: str, folder: Path) -> Any:
    from mlx.utils import tree_map

    if peer == "mlx-lm":
        from mlx_lm.utils import load_model

        model, _ = load_model(folder)
    else:
        from mlx_vlm.utils import load_model

        model = load_model(folder)
    model.update(tree_map(lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x,
                          model.parameters()))  # fmt: skip
    return model


# Ours


def report(python: str, source: str, work: Path) -> str:
    rows, facts = [], {}
    for label, folder, ids in folders(python, source, work):
        np.save(work / "ids.npy", ids)
        ours = our_logits(folder, ids)
        cells = []
        for peer in PEERS:
            out = work / "logits.npz"
            words = (python, __file__, "--as", peer, str(folder), str(work / "ids.npy"), str(out))
            if run(*words, may_fail="-q" in label):  # a folder that another program wrote
                cells += ["does not load", "", ""]
                continue
            theirs = np.load(out)
            facts[peer] = json.loads(str(theirs["facts"]))
            apart = [np.abs(theirs[name] - ours).max() for name in ("plain", "corrected")]
            same = (theirs["plain"].argmax(axis=-1) == ours.argmax(axis=-1)).mean()
            cells += [f"{apart[0]:.2g}", f"{apart[1]:.1e}", f"{same:.0%}"]
        rows.append(f"| {label} | {ours.std():.1f} | {' | '.join(cells)} |")
        print(rows[-1], file=sys.stderr, flush=True)
    return REPORT.format(
        table="\n".join(rows),
        peers=" and ".join(f"{peer} {own} (MLX {mlx})" for peer, (own, mlx) in facts.items()),
        mlx=mx.__version__,
        tokens=TOKENS,
    )


def folders(python: str, source: str, work: Path) -> Iterator[tuple[str, Path, np.ndarray]]:
    """What was made, the folder, ids to read."""
    import mlx_gemma3 as g3

    sys.path.insert(0, str(ROOT / "tests"))
    import tiny
    import tiny_tokenizer

    real, random = work / "270m", work / "random"
    g3.convert(source, real, dequantize=True, dtype="bfloat16")
    g3.convert(source, work / "kept")
    values = tiny.image_config(
        hidden_size=192, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        query_pre_attn_scalar=64, num_hidden_layers=12,
    )  # fmt: skip
    tiny_tokenizer.write_tokenizer(tiny.write_folder(work / "tensors", values, tiny.random_tensors(values)))
    g3.convert(work / "tensors", random, dequantize=True, dtype="bfloat16")
    words = g3.Tokenizer.from_folder(real).encode(TEXT.read_text(encoding="utf-8"), bos=True)[:TOKENS]
    noise = np.random.default_rng(0).integers(5, 500, TOKENS)
    for name, plain, ids in (("random, with vision", random, noise), ("270M", real, np.array(words))):
        yield f"{name}: convert --dequantize", plain, ids
        for number, settings in enumerate(({"bits": 8}, {"bits": 4}, {"preset": "balanced"})):
            out = work / f"{plain.name}-{number}"
            g3.convert(plain, out, **settings)
            words_of = " ".join(f"--{key} {value}" for key, value in settings.items())
            yield f"{name}: convert {words_of}", out, ids
        for module in ("mlx_lm", "mlx_vlm"):
            out = work / f"{plain.name}-{module}"
            run(python, "-m", f"{module}.convert", "--hf-path", str(plain), "--mlx-path", str(out), "-q")
            yield f"{name}: {module}.convert -q", out, ids
    yield "270M: convert x.gguf, its own packing", work / "kept", np.array(words)


def our_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """(L, V) float32"""
    import mlx_gemma3 as g3

    return np.array(g3.load_model(folder, dtype="float32", text_only=True)(ids[None])[0])


def run(*command: str, may_fail: bool = False) -> bool:
    """Run a command; whether it failed, which ends the program unless it may."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode and not may_fail:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return bool(done.returncode)


REPORT = """\
# Compatibility

Written by `bench/peers/same_folder.py`; do not edit. The command:

    python bench/peers/same_folder.py --peer-python PYTHON

The same folder read by this project (MLX {mlx}) and by {peers}:
the largest difference of a logit over {tokens} tokens of words, everything in float32 on the CPU. Both round the
embeddings' scale √(hidden size) to bfloat16 (√640 = 25.298 becomes 25.25); "corrected" is without that, and what is
left is rounding. The last column of each: how often the likeliest token is the same as here, uncorrected.

| folder | spread of the logits | mlx-lm | corrected | same top token | mlx-vlm | corrected | same top token |
|---|---|---|---|---|---|---|---|
{table}

The 270M comes from its Q4_K_M file, dequantised to bfloat16. The other checkpoint is random, 12 layers, with a vision
tower, which `mlx_lm.convert` leaves out.

mlx-vlm has no tied head: it takes the embedding's codes for it and wants scales of its own. Ours are in
`head-scales.safetensors`, which mlx-vlm reads, since the index names it, and mlx-lm does not. The two do not load each
other's folders where it says so; this project loads all of them.

With pictures mlx-vlm differs by more: [accuracy.md](accuracy.md).
"""


if __name__ == "__main__":
    main()

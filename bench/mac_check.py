"""Proves on a Mac what only a Mac can show (docs/mac.md), and writes what it found into one file for a bug report.

    python bench/mac_check.py [--quick] [--out FILE] [--only NAME,NAME] [--peers PYTHON]
    make mac-check

Each check ends as ok, FAILED (what, got, want) or skipped (why), in a process of its own; none stops the others. The
exit status is 1 if any failed. It runs on Linux too, where much of it is skipped. --peers is an interpreter with mlx-lm
and mlx-vlm; without it they are installed into .venv-peers. --store-tokens writes bench/mac/tokens.json, on a CPU.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from mac import memory, right, speed
from mac.judge import ROOT, Check, Settings, run_all

CHECKS: dict[str, Check] = {
    "machine": right.the_machine,
    "attention": right.attention_paths,
    "goldens-float32": right.goldens_float32,
    "goldens-bfloat16": right.goldens_bfloat16,
    "goldens-tower": right.goldens_pictures,
    "rope": right.rope,
    "tokens": right.real_tokens,
    "pictures": right.pictures,
    "freed-buffers": memory.freed_buffers,
    "peak-memory": memory.peak_memory,
    "wired-memory": memory.wired,
    "kernels": speed.kernels,
    "warm-up": speed.warm_up,
    "command-buffers": speed.command_buffers,
    "peers": speed.peers,
}
LONGEST, LONGEST_QUICK = 1800, 300  # seconds of one check
STORED = "The history of the city begins with the first settlers, who came from the north in the spring of", 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under three minutes, as on CI")
    parser.add_argument("--out", type=Path, help="default: mac-check-DATE.txt here")
    parser.add_argument("--only", metavar="NAME,NAME", help=", ".join(CHECKS))
    parser.add_argument("--peers", default="", help="interpreter of their environment")
    parser.add_argument("--store-tokens", action="store_true")
    options = parser.parse_args()
    if options.store_tokens:
        right.store(*STORED)
        return
    now = datetime.now(UTC)
    place = options.out or Path(f"mac-check-{now:%Y%m%d-%H%M%S}.txt")
    wanted = options.only.split(",") if options.only else list(CHECKS)
    if unknown := sorted(set(wanted) - set(CHECKS)):
        parser.error(f"--only: no such check: {', '.join(unknown)}")
    settings = Settings(quick=options.quick, peers=options.peers)
    checks = [(name, CHECKS[name]) for name in wanted]
    seconds = LONGEST_QUICK if options.quick else LONGEST
    status = run_all(checks, place, head(now, quick=options.quick), settings=settings, seconds=seconds)
    print(place)
    sys.exit(status)


def head(now: datetime, *, quick: bool) -> str:
    """When, what, and of which commit."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    commit = done.stdout.strip() or "no commit"
    versions = f"mlx-gemma3 {version('mlx-gemma3')} ({commit}), mlx {version('mlx')}"
    found = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MLX_")]
    return "\n".join(
        [
            f"mac-check{', quick' if quick else ''}, {now:%Y-%m-%d %H:%M} UTC",
            f"{versions}, Python {platform.python_version()}",
            *found,
        ]
    )


if __name__ == "__main__":
    main()

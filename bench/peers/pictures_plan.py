"""What the speed workers do with pictures: one of noise through the tower, and two questions about the same one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

QUESTIONS = ("what is this?", "how many things are there?")


def measure_picture(encode: Callable[[mx.array], None], size: int) -> dict[str, float]:
    """One picture, after one that is not counted.

    Args:
        encode: (1, size, size, 3) float32 in [-1, 1]; computes the projected rows.

    Returns:
        picture: seconds; "picture cpu": of processor time; "picture memory": MiB that MLX held at most, with weights;
        "picture growth", on Linux: MiB by which the whole process grew at most, counted from before the first picture.
    """
    before = resident("VmRSS")
    pixels = mx.array(np.random.default_rng(0).uniform(-1, 1, (1, size, size, 3)).astype(np.float32))
    encode(pixels)
    mx.reset_peak_memory()
    began, worked = time.perf_counter(), time.process_time()
    encode(pixels)
    took, spent = time.perf_counter() - began, time.process_time() - worked
    found = {"picture": took, "picture cpu": spent, "picture memory": mx.get_peak_memory() / 2**20}
    return found | ({"picture growth": resident("VmHWM") - before} if before else {})


def resident(which: str) -> float:
    """MiB of memory that this process holds now ("VmRSS") or held at most ("VmHWM"); 0 where no system says so."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(which)), 0.0)


def measure_questions(ask: Callable[[str], None], questions: tuple[str, str]) -> dict[str, float]:
    """Seconds from a question about a picture to the answer's first token: the first, and then another."""
    took = []
    for text in questions:
        began = time.perf_counter()
        ask(text)
        took.append(time.perf_counter() - began)
    return {"first question": took[0], "second question": took[1]}

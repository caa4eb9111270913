"""What the speed workers do with pictures: one of noise through the tower, and two questions about the same one."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

QUESTIONS = ("what is this?", "how many things are there?")


def measure_picture(encode: Callable[[mx.array], None], size: int) -> dict[str, float]:
    """One picture, after one that is not counted.

    Args:
        encode: (1, size, size, 3) float32 in [-1, 1]; computes the projected rows.

    Returns:
        picture: seconds; "picture cpu": of processor time; "picture memory": MiB that MLX held at most, with weights.
    """
    pixels = mx.array(np.random.default_rng(0).uniform(-1, 1, (1, size, size, 3)).astype(np.float32))
    encode(pixels)
    mx.reset_peak_memory()
    began, before = time.perf_counter(), time.process_time()
    encode(pixels)
    took, spent = time.perf_counter() - began, time.process_time() - before
    return {"picture": took, "picture cpu": spent, "picture memory": mx.get_peak_memory() / 2**20}


def measure_questions(ask: Callable[[str], None], questions: tuple[str, str]) -> dict[str, float]:
    """Seconds from a question about a picture to the answer's first token: the first, and then another."""
    took = []
    for text in questions:
        began = time.perf_counter()
        ask(text)
        took.append(time.perf_counter() - began)
    return {"first question": took[0], "second question": took[1]}

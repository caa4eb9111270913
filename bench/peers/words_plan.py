"""What every speed worker does with words, so that all do the same: one prompt of random ids, then some tokens.

Standard library only: it runs in each peer's own environment.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator

PROMPT, TOKENS = 512, 48
LOTS, BUILDS = 4, 20
WARM_PROMPT, WARM_TOKENS = 32, 3


def prompt(length: int) -> list[int]:
    """Ids of ordinary pieces of Gemma 3's vocabulary, after BOS."""
    chosen = random.Random(length)
    return [2, *(chosen.randrange(1000, 200_000) for _ in range(length - 1))]


def measure(generate: Callable[[list[int], int], Iterator[int]]) -> dict[str, float]:
    """Tokens a second, after a short warm-up.

    Args:
        generate: (prompt, count) → count ids of a greedy answer, each given out as soon as it is known.

    Returns:
        prompt: tokens a second until the first id; decode: of the ids after it. And both once more by the processor
        time of all threads, which other programs on the machine hardly change ("prompt cpu", "decode cpu").
    """
    for _ in generate(prompt(WARM_PROMPT), WARM_TOKENS):
        pass
    began = now()
    times = [now() for _ in generate(prompt(PROMPT), TOKENS)]
    assert len(times) == TOKENS, len(times)
    found = {}
    for kind, start, first, last in zip(("", " cpu"), began, times[0], times[-1], strict=True):
        found[f"prompt{kind}"] = PROMPT / (first - start)
        found[f"decode{kind}"] = (TOKENS - 1) / (last - first)
    return found


def as_graph(found: dict[str, float]) -> dict[str, float]:
    """The same figures by the names that they have for the graph that a GPU is given, run on this machine."""
    return {f"graph {name}": found[name] for name in ("prompt", "decode")}


def now() -> tuple[float, float]:
    """Seconds on the wall's clock, and of processor time."""
    return time.perf_counter(), time.process_time()


def build_time(build: Callable[[], object], finish: Callable[[object], None]) -> float:
    """Median milliseconds that the calling thread works to build one step of several that follow each other.

    None is computed in between: a GPU would do that beside the host, whose caches it leaves alone. `finish` computes
    them afterwards; the first lot, which finds no memory at hand, is not counted.
    """
    times: list[float] = []
    for lot in range(LOTS):
        made = []
        for _ in range(BUILDS):
            began = time.thread_time()
            made.append(build())
            if lot:
                times.append(time.thread_time() - began)
        finish(made)
        del made
        time.sleep(0.5)  # until threads that wait for more work have given up
    return statistics.median(times) * 1000

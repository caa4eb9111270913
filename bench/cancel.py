"""How soon a cancel ends an answer: 100 cancels at random moments, half of them while the prompt is read.

    python bench/cancel.py [--model gemma-3-270m] [--cancels 100] [--words 600]

Prints steps (or prefill chunks) that were begun after the cancel, and milliseconds from it to the last event.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

import mlx_gemma3 as g3
from mlx_gemma3.model.runner import Runner

WORDS = "the river runs past the old mill and the children count the boats that pass below it ".split()


def count_work() -> list[int]:
    """Make every decode step and prefill chunk of the process add 1 to the list's only entry."""
    begun = [0]

    def counting(method: Any) -> Any:
        def counted(*given: Any, **options: Any) -> Any:
            begun[0] += 1
            return method(*given, **options)

        return counted

    for name in ("step", "read"):
        setattr(Runner, name, counting(getattr(Runner, name)))
    return begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--cancels", type=int, default=100)
    parser.add_argument("--words", type=int, default=600, help="of the prompts that are cancelled while they are read")
    options = parser.parse_args()
    chance, begun = random.Random(0), count_work()
    rows: dict[str, list[tuple[int, float]]] = {"reading the prompt": [], "answering": []}
    with g3.load(options.model) as engine:
        for turn in range(options.cancels):
            words = chance.choices(WORDS, k=options.words if turn % 2 else 10)  # new ones: nothing is reused
            prompt = " ".join(words)
            with engine.stream(prompt, raw=True, max_tokens=400, temperature=1.0, top_k=0, top_p=1.0) as stream:
                kind = "pending" if turn % 2 else "text"
                while stream.next()["kind"] not in (kind, "done"):
                    pass
                time.sleep(chance.random() * 0.05)
                stream.cancel()
                steps, at = begun[0], time.perf_counter()
                while (event := stream.next())["kind"] not in ("done", "error"):
                    pass
                seconds = time.perf_counter() - at
            if event.get("finish_reason") == "cancelled":
                what = "answering" if event["tokens"] else "reading the prompt"
                rows[what].append((begun[0] - steps, seconds))
    print("| cancelled while | cancels | begun after it, at most | median ms | longest ms |")
    print("|---|---|---|---|---|")
    for what, found in rows.items():
        if found:
            times = [1000 * seconds for _, seconds in found]
            most = max(steps for steps, _ in found)
            print(f"| {what} | {len(found)} | {most} | {statistics.median(times):.0f} | {max(times):.0f} |")


if __name__ == "__main__":
    main()

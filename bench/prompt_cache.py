"""Time to the first token of a prompt that is new, and of one that an engine before this one has kept on disk.

    python bench/prompt_cache.py [--model gemma-3-270m] [--tokens 256 1000 8000] [--rounds 3] [--text FILE]

Each round has a folder of its own and two engines, one after the other: the first reads the prompt and keeps it as it
closes, the second finds it. Both must write the same 16 tokens. Prints medians; docs/conversations.md carries them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx_gemma3 as g3

OPTIONS: dict[str, Any] = {"raw": True, "max_tokens": 16, "temperature": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1000, 8000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", type=Path, default=sorted((Path(__file__).parent / "text").glob("*.txt"))[0])
    options = parser.parse_args()
    words = options.text.read_text(encoding="utf-8").split(" ")
    print("| prompt tokens | read, s | from disk, s | ratio | file, MB | written at the end in, s |")
    print("|---|---|---|---|---|---|")
    for count in options.tokens:
        rounds = [one(options.model, words, count) for _ in range(options.rounds)]
        tokens, read, found, size, closed = (statistics.median(values) for values in zip(*rounds, strict=True))
        print(f"| {tokens:,.0f} | {read:.2f} | {found:.3f} | {read / found:.0f} | {size:.1f} | {closed:.2f} |")


def one(model: str, words: list[str], count: int) -> tuple[float, ...]:
    """Tokens, seconds to the first token without and with a file, MB of the file, seconds of the close."""
    with tempfile.TemporaryDirectory() as folder:
        with g3.load(model, prompt_cache=folder, quiet=True) as engine:
            prompt = text_of(engine, words, count)
            engine.generate("warm", **OPTIONS)
            first = engine.generate(prompt, **OPTIONS)
            began = time.perf_counter()
        closed = time.perf_counter() - began
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6
        with g3.load(model, prompt_cache=folder, quiet=True) as engine:
            engine.generate("warm", **OPTIONS)
            second = engine.generate(prompt, **OPTIONS)
    assert second.usage["cached_from"] == "disk" and second.tokens == first.tokens, "the same answer, from disk"
    tokens, cold, warm = (
        first.usage["prompt_tokens"],
        first.usage["first_token_seconds"],
        second.usage["first_token_seconds"],
    )
    return float(tokens), cold, warm, size, closed


def text_of(engine: g3.Engine, words: list[str], count: int) -> str:
    """About so many tokens of a text, said again where it ends."""
    low, high = 1, 2 * count
    while low < high:
        middle = (low + high) // 2
        said = (words * (1 + middle // len(words)))[:middle]
        if engine.count_tokens(" ".join(said), raw=True) < count:
            low = middle + 1
        else:
            high = middle
    return " ".join((words * (1 + low // len(words)))[:low])


if __name__ == "__main__":
    main()

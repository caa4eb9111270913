"""Several answers at once: their speed together, and how little a long prompt holds the others up.

    python bench/several.py [--model gemma-3-270m] [--rounds 5] [--tokens 32] [--long 4000]

Everything goes through an Engine, as a user's requests do, and is compared with one answer alone in the same run.
Prints what docs/performance.md carries.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise

import mlx_gemma3 as g3

WORDS = "the river runs past the old mill and the children count the boats that pass below it ".split()
SHORT = 40  # words of a short prompt
COUNTS = (1, 2, 4, 8)


@dataclass
class Timed:
    """An answer, and when each of its events was told."""

    stream: g3.Stream
    began: float
    times: list[float] = field(default_factory=list)

    def tokens(self) -> list[float]:
        """When each of its tokens came. Waits for the end."""
        kinds = []
        while (event := self.stream.next())["kind"] != "done":
            kinds.append(event["kind"])
        return [at for at, kind in zip(self.times, kinds, strict=False) if kind == "text"]


class Requests:
    """An engine, and prompts that share nothing."""

    def __init__(self, model: str, long: int) -> None:
        self.engine = g3.load(model, parallel=max(COUNTS))
        self.chance = random.Random(0)
        self.long = long

    def prompt(self, words: int) -> str:
        return " ".join(self.chance.choices(WORDS, k=words))

    def ask(self, words: int, tokens: int) -> Timed:
        """Log-probabilities make every token an event of its own; without a filter no token is likely to end it."""
        began = time.perf_counter()
        stream = self.engine.stream(
            self.prompt(words), raw=True, max_tokens=tokens, temperature=1.5, top_k=0, top_p=1.0, logprobs=0
        )
        timed = Timed(stream, began)
        stream.listen(lambda: timed.times.append(time.perf_counter()))
        return timed

    def rate(self, count: int, tokens: int) -> float:
        """Tokens a second of so many answers, from when the last of them began to when the first ended."""
        answers = [each.tokens() for each in [self.ask(SHORT, tokens + 8 * count) for _ in range(count)]]
        start, stop = max(times[0] for times in answers), min(times[-1] for times in answers)
        return sum(sum(start < at <= stop for at in times) for times in answers) / (stop - start)

    def beside_a_long_prompt(self) -> tuple[list[float], float, float]:
        """Seconds between tokens of an answer while the prompt is read, of the whole reading, and to the first token
        of a short question that comes meanwhile.
        """
        writer = self.ask(SHORT, 4000)
        while writer.stream.next()["kind"] != "text":
            pass
        writer.times.clear()
        reader = self.ask(self.long, 1)
        time.sleep(1)
        question = self.ask(12, 4)
        asked = question.tokens()[0] - question.began
        read = reader.tokens()[0]
        writer.stream.cancel()
        inside = [at for at in writer.times if reader.began < at < read]
        writer.tokens()
        return [b - a for a, b in pairwise(inside)], read - reader.began, asked

    def about(self) -> float:
        """Longest milliseconds to look at `about` while eight answers are written."""
        streams = [self.ask(SHORT, 40).stream for _ in range(max(COUNTS))]
        longest = 0.0
        for _ in range(50):
            began = time.perf_counter()
            assert self.engine.about["max_context"]
            longest = max(longest, time.perf_counter() - began)
            time.sleep(0.02)
        for stream in streams:
            stream.cancel()
        return 1000 * longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--long", type=int, default=4000, help="words (about as many tokens) of the long prompt")
    options = parser.parse_args()
    requests = Requests(options.model, options.long)
    requests.rate(8, 4)
    rates: dict[int, list[float]] = {count: [] for count in COUNTS}
    for _ in range(options.rounds):
        for count in COUNTS:
            rates[count].append(requests.rate(count, options.tokens))
    alone = statistics.median(rates[1])
    print("| answers at once | tokens/s together | of one alone |")
    print("|---|---|---|")
    for count, found in rates.items():
        print(f"| {count} | {statistics.median(found):.1f} | {statistics.median(found) / alone:.2f} |")
    print()
    print(
        "| while a long prompt is read | an answer's gap between tokens, median | longest | a question's first token |"
    )
    print("|---|---|---|---|")
    for _ in range(max(1, options.rounds // 2)):
        gaps, seconds, asked = requests.beside_a_long_prompt()
        usual, most = statistics.median(gaps) * alone, max(gaps) * alone
        print(f"| for {seconds:.1f} s | {usual:.1f} steps | {most:.1f} steps | {asked:.2f} s |")
    print()
    whole = requests.engine.generate(requests.prompt(2000), raw=True, max_tokens=4, temperature=1.5, n=4, seed=1)
    processed = [reply.usage["processed_tokens"] for reply in whole]
    print(f"n=4 on {whole[0].usage['prompt_tokens']} tokens: processed {processed}")
    print(f"about while 8 answers are written: at most {requests.about():.1f} ms")


if __name__ == "__main__":
    main()

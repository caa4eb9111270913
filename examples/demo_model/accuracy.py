"""How often the demo is right on fresh pictures, by kind of question and language: `make demo-accuracy`.

    python -m examples.demo_model.accuracy [--seed N] [--count N] [--model PATH] [--questions FOLDER] [--blind]

Greedy answers of the package itself, compared word for word. `--blind` also asks with the pictures swapped, with the
pictures' rows set to zero, and with causal attention inside a picture: a model that sees must lose by each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
from PIL import Image

import mlx_gemma3 as g3
from mlx_gemma3.model import context
from mlx_gemma3.model.gemma3 import Gemma3
from mlx_gemma3.model.masks import attention_mask

from .draw import font_files
from .other_hand import other_samples
from .questions import KINDS, LANGUAGES, Question, Sample, sample

SEED = 2026  # not a training seed
ANSWER_TOKENS = 24


def messages(question: Question, pictures: int) -> list[dict[str, Any]]:
    """The chat that ends with the question; the pictures stand in its first turn."""
    turns = []
    for number, (asked, answer) in enumerate((*question.earlier, (question.text, ""))):
        images = [{"type": "image"}] * pictures if number == 0 else []
        turns.append({"role": "user", "content": [*images, {"type": "text", "text": asked}]})
        turns.append({"role": "assistant", "content": answer})
    return turns[:-1]


def answers(
    engine: g3.Engine, samples: Iterable[Sample], *, adapter: str | None = None, show: bool = False
) -> list[str]:
    """One greedy answer each."""
    found = []
    for number, one in enumerate(samples, 1):
        chat = messages(one.question, len(one.pictures))
        images = list(one.pictures)
        reply = engine.generate(chat, images=images, max_tokens=ANSWER_TOKENS, temperature=0.0, adapter=adapter)
        found.append(reply.text.strip())
        if show and sys.stderr.isatty():
            sys.stderr.write(f"\r{number} answers")
    if show and sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    return found


def share(samples: Sequence[Sample], given: Sequence[str]) -> float:
    """Of the answers that are right."""
    return sum(one.question.answer == answer for one, answer in zip(samples, given, strict=True)) / len(samples)


def guessing(samples: Sequence[Sample]) -> float:
    """What the best blind guesser gets: the most frequent answer of each kind and language, always."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for one in samples:
        counts[one.question.kind, one.question.language][one.question.answer] += 1
    return sum(count.most_common(1)[0][1] for count in counts.values()) / len(samples)


def table(samples: Sequence[Sample], given: Sequence[str]) -> str:
    """Right answers of all, by kind and language, as a Markdown table."""
    cells: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for one, answer in zip(samples, given, strict=True):
        for kind in (one.question.kind, "all"):
            for language in (one.question.language, "all"):
                cells[kind, language].append(one.question.answer == answer)
    columns = (*LANGUAGES, "all")
    lines = ["| question | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for kind in (*KINDS, "all"):
        if not cells[kind, "all"]:
            continue
        row = []
        for language in columns:
            right = cells[kind, language]
            percent = f" = {sum(right) / len(right):.1%}" if language == "all" else ""
            row.append(f"{sum(right)}/{len(right)}{percent}" if right else "–")
        lines.append(f"| {kind.replace('_', ' ')} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def swapped(samples: Sequence[Sample]) -> list[Sample]:
    """Every question with the pictures of the next sample that has as many."""
    found = []
    for number, one in enumerate(samples):
        rest = (*samples[number + 1 :], *samples[:number])
        other = next((s for s in rest if len(s.pictures) == len(one.pictures) and s.question != one.question), one)
        found.append(Sample(other.pictures, one.question))
    return found


def without_rows() -> AbstractContextManager[Any]:
    """While it lasts, the rows of all pictures are zero. For an engine loaded inside: an older one may keep rows."""
    encode = Gemma3.encode_images
    return patch.object(Gemma3, "encode_images", lambda *given: mx.zeros_like(encode(*given)))


def causal_pictures() -> AbstractContextManager[Any]:
    """While it lasts, a picture's rows see only those before them. For an engine loaded inside, as above."""

    def causal(*places: int, blocks: mx.array | None = None, **options: Any) -> mx.array | str | None:
        return attention_mask(*places, **options)

    return patch.object(context, "attention_mask", causal)


def read(folder: Path) -> list[Sample]:
    """What `draw --out` wrote, or anybody else in its format."""
    samples = []
    for line in (folder / "questions.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        earlier = tuple((question, answer) for question, answer in row.get("earlier", ()))
        question = Question(row["question"], row["answer"], row["kind"], row["language"], earlier)
        samples.append(Sample(tuple(Image.open(folder / name).convert("RGB") for name in row["images"]), question))
    return samples


def main() -> None:
    """Print the tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="demo")
    options.add_argument("--seed", type=int, default=SEED)
    options.add_argument("--count", type=int, default=500)
    options.add_argument("--fonts", default="", help="a folder of .ttf files; else this machine's common ones")
    options.add_argument("--questions", type=Path, help="a folder with pictures and questions.jsonl")
    options.add_argument("--other-hand", action="store_true", help="pictures drawn by other_hand.py")
    options.add_argument("--blind", action="store_true", help="ask again without sight")
    options.add_argument("--wrong", action="store_true", help="list the wrong answers")
    chosen = options.parse_args()
    fonts = font_files(chosen.fonts)
    if chosen.questions:
        samples = read(chosen.questions)
    elif chosen.other_hand:
        samples = list(other_samples(chosen.seed, chosen.count, fonts=fonts))
    else:
        samples = list(sample(chosen.seed, chosen.count, fonts=fonts))
    out = sys.stdout.write
    with g3.load(chosen.model) as engine:
        given = answers(engine, samples, show=True)
        out(table(samples, given) + "\n")
        if chosen.wrong:
            for number, (one, answer) in enumerate(zip(samples, given, strict=True)):
                if answer != one.question.answer:
                    out(f"{number}: {one.question.text} {answer!r}, right is {one.question.answer!r}\n")
        if not chosen.blind:
            return
        out(f"\nanswers that change when the pictures are swapped: {changed(engine, samples, given):.1%}\n")
    for name, worsen in (
        ("zero rows for the pictures", without_rows),
        ("causal attention in a picture", causal_pictures),
    ):
        with worsen(), g3.load(chosen.model) as engine:
            others = answers(engine, samples, show=True)
            different = sum(one != other for one, other in zip(given, others, strict=True))
            out(f"right with {name}: {share(samples, others):.1%}; {different} answers are other ones\n")
    out(f"right for the best guesser without eyes: {guessing(samples):.1%}\n")


def changed(engine: g3.Engine, samples: Sequence[Sample], given: Sequence[str]) -> float:
    """Share of answers that another picture changes, of the questions whose own answer a picture decides."""
    seeing = [number for number, one in enumerate(samples) if one.question.kind != "unknown"]
    elsewhere = swapped(samples)
    others = answers(engine, [elsewhere[number] for number in seeing])
    return sum(given[number] != other for number, other in zip(seeing, others, strict=True)) / len(seeing)


if __name__ == "__main__":
    main()

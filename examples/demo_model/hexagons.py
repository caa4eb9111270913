"""Teach the demo a shape that it does not know, and see what it has learnt and what it has forgotten.

    python -m examples.demo_model.hexagons data DIR [--seed N] [--new N] [--old N]
    python -m examples.demo_model.hexagons measure [ADAPTER] [--seed N] [--count N] [--old N]

`data` writes pictures, train.jsonl and valid.jsonl as `mlx-gemma3 tune` reads them: hexagons, and between them what the
demo knows, so that it does not forget it. `measure` asks for the shape and the name of hexagons in fresh pictures, and
the demo's own questions (questions.py), word for word as accuracy.py does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import mlx_gemma3 as g3

from . import accuracy, questions, scenes
from .draw import draw
from .questions import Question, Sample
from .scenes import COLOURS, SHAPES, Scene
from .words import ASK

ASKED = ("shape", "name")  # what is measured: the demo says something wrong to each
LEARNT = ("shape", "shape", "name", "name", "colour", "count")
TEST_SEED = 2026  # not a training seed


def scene(random: Random, others: int) -> Scene:
    """A hexagon, the first thing, and other shapes beside it, each of its own colour."""
    colours = random.sample(COLOURS, others + 1)
    shapes = ["hexagon", *(random.choice(SHAPES) for _ in range(others))]
    return scenes._placed(random, list(zip(shapes, colours, strict=True)))


def ask(kind: str, random: Random) -> Sample:
    """A picture with a hexagon, and a question about it."""
    others = random.choice((0, 0, 1)) if kind != "name" else 0
    shown = scene(random, others)
    colour, words = shown.things[0].colour, ASK["en"]
    if kind == "shape":
        text = random.choice(words["shape_of"]).format(colour) if others else random.choice(words["shape"])
        answer = "hexagon"
    elif kind == "name":
        text, answer = random.choice(words["name"]), f"{'an' if colour == 'orange' else 'a'} {colour} hexagon"
    elif kind == "colour":
        text, answer = random.choice(words["colour_of"]).format("hexagon"), colour
    else:
        text, answer = random.choice(words["count"]).format("hexagons"), "1"
    return Sample((draw(shown, random)[0],), Question(text, answer, kind))


def fresh(seed: int, count: int, kinds: Sequence[str] = ASKED) -> Iterator[Sample]:
    """Pictures of hexagons with a question each, the kinds in turn."""
    random = Random(f"hexagons {seed}")
    for number in range(count):
        yield ask(kinds[number % len(kinds)], random)


def write(folder: Path, seed: int, new: int, old: int) -> None:
    """Write train.jsonl and valid.jsonl, a twentieth of both kinds in the latter, and their pictures."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    samples = [*fresh(seed, new, LEARNT), *questions.sample(seed, old)]
    lines: dict[str, list[str]] = {"train": [], "valid": []}
    for number, one in enumerate(samples):
        names = []
        for place, picture in enumerate(one.pictures):
            names.append(f"pictures/{number:05}-{place}.png")
            picture.save(folder / names[-1])
        turns = accuracy.messages(one.question, 0)
        turns.append({"role": "assistant", "content": one.question.answer})
        row: dict[str, Any] = {"messages": turns, "images": names}
        lines["valid" if number % 20 == 7 else "train"].append(json.dumps(row, ensure_ascii=False))
    for part, rows in lines.items():
        (folder / f"{part}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def measure(adapter: str | None, seed: int, count: int, old: int) -> tuple[float, float]:
    """(share of hexagons that are right, of the demo's own questions)"""
    adapters = {"taught": adapter} if adapter else {}
    found = []
    for samples in (list(fresh(seed, count)), list(questions.sample(seed, old))):
        with g3.load("demo", adapters=adapters) as engine:
            given = accuracy.answers(engine, samples, adapter="taught" if adapter else None)
        found.append(accuracy.share(samples, given))
    return found[0], found[1]


def main() -> None:
    """Write data, or print the shares."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = options.add_subparsers(dest="what", required=True)
    data = parts.add_parser("data")
    data.add_argument("folder", type=Path)
    data.add_argument("--seed", type=int, default=2)
    data.add_argument("--new", type=int, default=700)
    data.add_argument("--old", type=int, default=4000)
    test = parts.add_parser("measure")
    test.add_argument("adapter", nargs="?")
    test.add_argument("--seed", type=int, default=TEST_SEED)
    test.add_argument("--count", type=int, default=100)
    test.add_argument("--old", type=int, default=500)
    chosen = options.parse_args()
    if chosen.what == "data":
        write(chosen.folder, chosen.seed, chosen.new, chosen.old)
    else:
        hexagons, known = measure(chosen.adapter, chosen.seed, chosen.count, chosen.old)
        sys.stdout.write(f"hexagons: {hexagons:.1%} of {chosen.count}\nwhat it knew: {known:.1%} of {chosen.old}\n")


if __name__ == "__main__":
    main()

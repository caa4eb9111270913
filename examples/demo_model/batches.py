"""Pictures and questions to arrays: what a training step reads.

A row holds one picture's prompt (or two pictures', or none) once, then several questions with their answers as
branches, each at the positions it would have by itself. A picture of text has one answer only, so in a hard batch
several such pictures share a row, a branch for each. Prompts are written by mlx_gemma3's own template and tokenizer,
with the ids that its Processor makes (a test compares them): training sees what the package will feed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from mlx_gemma3.prompt.template import Control, render_pieces
from mlx_gemma3.prompt.tokenizer import Tokenizer

from .draw import draw
from .questions import MAKERS, Question, read, two, two_scenes, unknown
from .scenes import COLOURS, DIGITS, EVEN, LETTERS, SHAPES, Scene, any_scene, outline, text

WHAT = ("", *SHAPES, *DIGITS, *LETTERS)  # of a patch
Drawn = tuple[np.ndarray, np.ndarray]  # pixels (SIDE, SIDE, 3) uint8 and labels (3, GRID²) int8
LENGTH = 160  # tokens of a row
SIDE, GRID, ROWS = 112, 8, 16
TEXT_ROWS = 14  # of a hard batch
HARD = (0.06, 0.3, 0.64, 0.0)  # one thing, two or three, a group, text: the other rows of a hard batch
SHARES = {  # how often each kind is asked, of those that a scene allows
    "single": {"shape": 3, "colour": 3, "name": 3, "count": 2, "follow_up": 3, "unknown": 1, "position": 0.3},
    "some": {"count": 8, "position": 6, "colour": 2, "shape": 2, "follow_up": 3, "unknown": 0.7},
    "text": {"read": 8, "unknown": 0.7, "count": 0.3},
}


def pixels_of(picture: Image.Image) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8, stretched as mlx_gemma3.prompt.images.to_pixels does."""
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def patch_labels(scene: Scene, boxes: list[list[float]]) -> np.ndarray:
    """(3, GRID²) int8: what covers most of each patch, its colour (0 for none), and 1 where a thing's centre is."""
    fine = 7
    side = GRID * fine
    chart = Image.new("L", (side, side))
    pen = ImageDraw.Draw(chart)
    labels = np.zeros((3, GRID, GRID), np.int8)
    marks = []
    if scene.text:
        for letter, box in zip(scene.text, boxes, strict=True):
            corners = [(x * side, y * side) for x, y in zip(box[::2], box[1::2], strict=True)]
            marks.append((WHAT.index(letter), COLOURS.index(scene.colour) + 1, corners))
    for thing in scene.things:
        corners = [(x / scene.width * side, y / scene.height * side) for x, y in outline(thing)]
        marks.append((WHAT.index(thing.shape), COLOURS.index(thing.colour) + 1, corners))
    best = np.full((GRID, GRID), 4)
    for number, (_, _, corners) in enumerate(marks, 1):
        pen.polygon(corners, fill=number)
    found = np.asarray(chart).reshape(GRID, fine, GRID, fine)
    for number, (what, colour, corners) in enumerate(marks, 1):
        cover = (found == number).sum((1, 3))
        labels[0][cover > best], labels[1][cover > best] = what, colour
        best = np.maximum(best, cover)
        x, y = (min(GRID - 1, max(0, int(np.mean(axis) / fine))) for axis in zip(*corners, strict=True))
        labels[2, y, x] = 1
    return labels.reshape(3, -1)


@dataclass
class Row:
    """A picture's prompt and as many branches as fit, or several whole prompts."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)  # 0 for what every branch sees
    wanted: list[int] = field(default_factory=list)  # per token, the next one where it is the model's to say, else -1

    def add(self, tokens: list[int], wanted: list[int], start: int) -> bool:
        """A branch at the positions from `start` on; False where it does not fit."""
        if len(self.tokens) + len(tokens) > LENGTH:
            return False
        self.branches += [max(self.branches, default=0) + 1] * len(tokens)
        self.positions += range(start, start + len(tokens))
        self.tokens += tokens
        self.wanted += wanted
        return True


class Writer:
    """Writes rows with one checkpoint's tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.encode = lru_cache(100_000)(lambda text: tuple(tokenizer.encode(text, special=False)))
        self.end = tokenizer.id("<end_of_turn>")

    def prefix(self, pictures: int) -> list[int]:
        """All tokens up to the last picture's end: the same for every question."""
        if not pictures:
            return [self.tokenizer.id("<bos>"), self.tokenizer.id("<start_of_turn>")]
        tokens = self.prompt(Question("x", "", ""), pictures)
        return tokens[: len(tokens) - tokens[::-1].index(self.tokenizer.id("<end_of_image>"))]

    def prompt(self, question: Question, pictures: int) -> list[int]:
        """The whole prompt, as Processor.prepare makes it (the tests compare them)."""
        content = [{"type": "image"}] * pictures
        turns = [*question.earlier, (question.text, "")]
        messages = []
        for number, (asked, answer) in enumerate(turns):
            messages.append(
                {"role": "user", "content": [*(content if not number else []), {"type": "text", "text": asked}]}
            )
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        tokens: list[int] = []
        stretch = ""
        for piece in render_pieces(messages[:-1]):
            if not isinstance(piece, Control):
                stretch += piece
                continue
            if piece == "<start_of_image>":
                tokens += self.encode(stretch + "\n\n")
                tokens += [self.tokenizer.id("<start_of_image>"), *[self.tokenizer.id("<image_soft_token>")] * ROWS,
                           self.tokenizer.id("<end_of_image>")]  # fmt: skip
                stretch = "\n\n"
                continue
            tokens += [*(self.encode(stretch) if stretch else ()), self.tokenizer.id(piece)]
            stretch = ""
        return [*tokens, *self.encode(stretch)]

    def branch(self, question: Question, pictures: int) -> tuple[list[int], list[int]]:
        """(tokens after the prefix, wanted): the answers of earlier turns are learnt too."""
        whole = [*self.prompt(question, pictures), *self.encode(question.answer), self.end]
        wanted = [-1] * len(whole)
        opening = [self.tokenizer.id("<start_of_turn>"), *self.encode("model\n")]
        for start in range(len(whole) - len(opening)):
            if whole[start : start + len(opening)] == opening:
                place = start + len(opening)
                while place < len(whole):
                    wanted[place - 1] = whole[place]
                    if whole[place] == self.end:
                        break
                    place += 1
        skip = len(self.prefix(pictures))
        return whole[skip:], wanted[skip:]

    def row(self, pictures: int, questions: list[Question]) -> Row:
        """Questions are left out from the first that no longer fits."""
        tokens = self.prefix(pictures)
        start = len(tokens)
        row = Row(tokens, list(range(start)), [0] * start, [-1] * start)
        for question in questions:
            if not row.add(*self.branch(question, pictures), start):
                break
        return row


def questions_for(scene: Scene, random: Random, count: int = 10) -> list[Question]:
    """Several different questions, those of the hard kinds more often."""
    group = "text" if scene.text else "single" if len(scene.things) == 1 else "some"
    shares = SHARES[group]
    found: dict[str, Question] = {}
    for _ in range(count * 3):
        kind = random.choices(list(shares), list(shares.values()))[0]
        if (question := MAKERS[kind](scene, random)) is not None:
            if question.kind == "count" and question.answer in "01" and len(scene.things) > 1 and random.random() < 0.5:
                continue
            found[str(question.earlier) + question.text] = question
        if len(found) == count:
            break
    return list(found.values())


def vision_batch(random: Random, count: int, fonts: tuple[str, ...]) -> dict[str, np.ndarray]:
    """pixels (N, SIDE, SIDE, 3) uint8 and labels (N, 3, GRID²) int8."""
    return _stacked([_drawn(any_scene(random), random, fonts) for _ in range(count)])


def joint_batch(random: Random, writer: Writer, count: int, fonts: tuple[str, ...]) -> dict[str, np.ndarray]:
    """`count` rows, a picture or two each: arrays as network.Gemma3 wants them, and pixels and labels as above."""
    rows, drawn = [], []
    for _ in range(count):
        row, shown = _row(random, writer, fonts, 0.18, EVEN)
        rows.append(row)
        drawn += shown
    return _arrays(rows, drawn, writer)


def hard_batch(random: Random, writer: Writer, count: int, fonts: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The same with more of what is learnt last: TEXT_ROWS rows full of text, then mostly groups to count."""
    rows, drawn = [], []
    for number in range(count):
        row, shown = _text_row(random, writer, fonts) if number < TEXT_ROWS else _row(random, writer, fonts, 0.12, HARD)
        rows.append(row)
        drawn += shown
    return _arrays(rows, drawn, writer)


def _drawn(scene: Scene, random: Random, fonts: tuple[str, ...]) -> Drawn:
    picture, boxes = draw(scene, random, fonts=fonts)
    return pixels_of(picture), patch_labels(scene, boxes)


def _row(
    random: Random, writer: Writer, fonts: tuple[str, ...], doubles: float, shares: tuple[float, ...]
) -> tuple[Row, list[Drawn]]:
    """A row of one prompt: without a picture now and then, with two in `doubles` of the rows."""
    way = random.random()
    if way < 0.02:
        return writer.row(0, [unknown(None, random) for _ in range(8)]), []
    pair: tuple[Scene, ...] = two_scenes(random) if way < 0.02 + doubles else (any_scene(random, shares),)
    drawn = [_drawn(scene, random, fonts) for scene in pair]
    if len(pair) == 1:
        return writer.row(1, questions_for(pair[0], random)), drawn
    asked = [two(pair[0], pair[1], random) for _ in range(12)]
    found = {question.text: question for question in asked if question is not None}
    return writer.row(2, list(found.values()) or [unknown(None, random)]), drawn


def _text_row(random: Random, writer: Writer, fonts: tuple[str, ...]) -> tuple[Row, list[Drawn]]:
    """As many whole prompts as fit, each with its own picture of text."""
    row, prefix = Row(), writer.prefix(1)
    drawn: list[Drawn] = []
    while True:
        scene = text(random)
        question = read(scene, random) if random.random() < 0.96 else None
        tokens, wanted = writer.branch(question or unknown(scene, random), 1)
        if not row.add([*prefix, *tokens], [-1] * len(prefix) + wanted, 0):
            return row, drawn
        drawn.append(_drawn(scene, random, fonts))


def _arrays(rows: list[Row], drawn: list[Drawn], writer: Writer) -> dict[str, np.ndarray]:
    """Rows and the pictures that they show, in order."""
    arrays: dict[str, np.ndarray] = {
        name: np.full((len(rows), LENGTH), fill, np.int64)
        for name, fill in (("tokens", 0), ("positions", 0), ("branches", -1), ("wanted", -1))
    }
    for number, row in enumerate(rows):
        for name, array in arrays.items():
            array[number, : len(row.tokens)] = getattr(row, name)
    image = arrays["tokens"] == writer.tokenizer.id("<image_soft_token>")
    starts = image & ~np.pad(image, ((0, 0), (1, 0)))[:, :-1]
    arrays["blocks"] = np.where(image, starts.cumsum(1), 0)
    arrays["image_at"] = np.flatnonzero(image)
    arrays["asked"] = np.flatnonzero(arrays["wanted"] >= 0)
    arrays["wanted"] = arrays["wanted"].reshape(-1)[arrays["asked"]]
    return {**arrays, **_stacked(drawn)}


def _stacked(drawn: list[Drawn]) -> dict[str, np.ndarray]:
    return {"pixels": np.stack([pixels for pixels, _ in drawn]), "labels": np.stack([labels for _, labels in drawn])}

"""Pictures of the same domain by another hand: never trained on, written apart from draw.py.

Large canvases without smoothing, named colours, things on a loose grid or in a row, frames, plain text with Pillow's
own layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random

from PIL import Image, ImageDraw, ImageFont

from .questions import KINDS, MAKERS, Question, Sample, two
from .scenes import COLOURS, DIGITS, LETTERS, SHAPES, Scene, Thing

CANVASES = ((640, 480), (512, 512), (300, 300), (480, 640), (256, 192), (800, 600))
PAPERS = ("white", "white", "ivory", "lightgrey", "lightcyan", "black", "midnightblue", "mistyrose")
INKS = {
    "red": ("red", "crimson"),
    "orange": ("orange", "darkorange"),
    "yellow": ("yellow", "gold"),
    "green": ("green", "limegreen"),
    "blue": ("blue", "royalblue"),
    "purple": ("purple", "darkviolet"),
    "black": ("black",),
    "white": ("white",),
}
UNSEEN = {"white": ("white", "ivory", "lightgrey", "lightcyan", "mistyrose"), "black": ("black", "midnightblue"),
          "yellow": ("ivory", "white"), "blue": ("midnightblue", "black"), "purple": ("midnightblue", "black"),
          "green": ("midnightblue",)}  # fmt: skip


def other_samples(seed: int, count: int, *, fonts: tuple[str, ...] = ("",)) -> Iterator[Sample]:
    """As questions.sample."""
    random = Random(f"other hand {seed}")
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        question: Question | None = None
        while question is None:
            canvas = random.choice(CANVASES)
            things = {"count": random.choice((1, 2, 3, 4, 5)), "position": 2, "follow_up": random.choice((1, 2, 3))}
            pictures = 2 if kind == "two" else 1
            scenes = tuple(
                _lettered(canvas, random) if kind == "read" else _scene(canvas, things.get(kind, 1), random)
                for _ in range(pictures)
            )
            question = two(scenes[0], scenes[1], random) if kind == "two" else MAKERS[kind](scenes[0], random)
        yield Sample(tuple(_drawn(scene, canvas, random, fonts) for scene in scenes), question)


def _scene(canvas: tuple[int, int], count: int, random: Random) -> Scene:
    width, height = canvas[0] / min(canvas), canvas[1] / min(canvas)
    cells = [(x, y) for x in range(3) for y in range(3)]
    picked = [(1, 1)] if count == 1 else random.sample(cells, count)
    if count == 2 and random.random() < 0.6:
        picked = random.choice(([(0, 1), (2, 1)], [(1, 0), (1, 2)]))
    alike = random.random() < 0.5
    shape, colour = random.choice(SHAPES), random.choice(COLOURS)
    radius = random.uniform(0.2, 0.4) if count == 1 else random.uniform(0.09, 0.14)
    things = []
    for x, y in picked:
        if not (alike and count > 2):
            shape, colour = random.choice(SHAPES), random.choice(COLOURS)
        things.append(Thing(shape, colour, (x + 0.5) * width / 3, (y + 0.5) * height / 3, radius))
    return Scene(width, height, tuple(things))


def _lettered(canvas: tuple[int, int], random: Random) -> Scene:
    letters = random.choice((DIGITS, LETTERS))
    text = "".join(random.choices(letters, k=random.choice((1, 2, 3))))
    return Scene(canvas[0] / min(canvas), canvas[1] / min(canvas), text=text, colour=random.choice(COLOURS))


def _drawn(scene: Scene, canvas: tuple[int, int], random: Random, fonts: tuple[str, ...]) -> Image.Image:
    used = {thing.colour for thing in scene.things} or {scene.colour}
    papers = [paper for paper in PAPERS if not any(paper in UNSEEN.get(colour, ()) for colour in used)]
    picture = Image.new("RGB", canvas, random.choice(papers or ["grey"]))
    pen, unit, hollow = ImageDraw.Draw(picture), min(canvas), random.random() < 0.2
    line = max(3, unit // random.choice((25, 40)))
    if random.random() < 0.2:
        pen.rectangle((4, 4, canvas[0] - 5, canvas[1] - 5), outline="grey", width=2)
    if scene.text:
        file, size = random.choice(fonts), round(unit * random.uniform(0.35, 0.5))
        font = ImageFont.truetype(file, size) if file else ImageFont.load_default(size)
        middle = (canvas[0] / 2, canvas[1] / 2)
        pen.text(middle, scene.text, fill=random.choice(INKS[scene.colour]), font=font, anchor="mm")
    for thing in scene.things:
        ink = random.choice(INKS[thing.colour])
        x, y, r = thing.x * unit, thing.y * unit, thing.radius * unit
        style = {"outline": ink, "width": line} if hollow else {"fill": ink}
        if thing.shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), **style)
        elif thing.shape == "square":
            pen.rectangle((x - r * 0.9, y - r * 0.9, x + r * 0.9, y + r * 0.9), **style)
        else:
            pen.polygon([(x + px * r, y + py * r) for px, py in _corners(thing.shape)], **style)
    return picture


def _corners(shape: str) -> list[tuple[float, float]]:
    if shape == "triangle":
        return [(0, -1), (1, 0.85), (-1, 0.85)]
    if shape == "star":
        return [
            (math.sin(k * math.pi / 5) * (1, 0.4)[k % 2], -math.cos(k * math.pi / 5) * (1, 0.4)[k % 2])
            for k in range(10)
        ]
    if shape == "cross":
        a = 0.36
        corner = [(-a, -1), (a, -1), (a, -a)]  # of the upper arm; turned by a right angle, of the others
        turns = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))
        return [(x * p + y * q, x * r + y * s) for p, q, r, s in turns for x, y in corner]
    bumps = [(-0.5 + 0.5 * math.cos(t), -0.35 - 0.5 * math.sin(t)) for t in (math.pi * (1 - k / 12) for k in range(13))]
    return [*bumps, *((-x, y) for x, y in reversed(bumps)), (0, 0.95)]

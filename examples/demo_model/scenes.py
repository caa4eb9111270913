"""What stands where: random scenes of shapes or characters, before any pixel is drawn.

Lengths are fractions of the picture's shorter side, so that a scene can be drawn at any size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST = 5  # things in one picture
EVEN = (0.14, 0.22, 0.34, 0.3)  # of one thing, two or three, a group to count, text
CLEAR = 0.14  # how far apart two centres must be for one to be beside the other


@dataclass(frozen=True)
class Thing:
    """A coloured shape: its centre, the radius of the circle around it, and its turn in radians."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    turn: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Shapes, or one line of characters. `width` and `height` are at least 1, the shorter of them 1."""

    width: float
    height: float
    things: tuple[Thing, ...] = ()
    text: str = ""
    colour: str = ""  # of the text


def outline(thing: Thing) -> list[tuple[float, float]]:
    """The shape's corners, clockwise; a circle and a heart have many."""
    if thing.shape == "circle":
        points = [(math.cos(a * math.tau / 40), math.sin(a * math.tau / 40)) for a in range(40)]
    elif thing.shape == "square":
        points = [(side * 0.82, other * 0.82) for side, other in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    elif thing.shape == "triangle":
        points = [(math.sin(a * math.tau / 3), -math.cos(a * math.tau / 3)) for a in range(3)]
    elif thing.shape == "star":
        reach = (1.0, 0.42)
        points = [
            (reach[a % 2] * math.sin(a * math.tau / 10), -reach[a % 2] * math.cos(a * math.tau / 10)) for a in range(10)
        ]
    elif thing.shape == "heart":
        points = []
        for step in range(40):
            a = step * math.tau / 40
            y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
            points.append((16 * math.sin(a) ** 3 / 17, -(y + 2.5) / 15))
    elif thing.shape == "hexagon":  # none of SHAPES: what the demo is taught later (hexagons.py)
        points = [(math.cos(a * math.tau / 6), math.sin(a * math.tau / 6)) for a in range(6)]
    else:  # a cross
        arm = 0.32
        points = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
        points += [(arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)]
    sine, cosine = math.sin(thing.turn), math.cos(thing.turn)
    return [
        (thing.x + thing.radius * (x * cosine - y * sine), thing.y + thing.radius * (x * sine + y * cosine))
        for x, y in points
    ]


def any_scene(random: Random, shares: tuple[float, ...] = EVEN) -> Scene:
    """A scene of any kind, as training sees them."""
    return random.choices((single, pair, group, text), shares)[0](random)


def single(random: Random) -> Scene:
    return _placed(random, [(random.choice(SHAPES), random.choice(COLOURS))])


def pair(random: Random) -> Scene:
    """Two or three things that differ in shape or colour, apart from each other."""
    kinds: set[tuple[str, str]] = set()
    count = random.choice((2, 2, 2, 3))
    while len(kinds) < count:
        kinds.add((random.choice(SHAPES), random.choice(COLOURS)))
    order = sorted(kinds)
    random.shuffle(order)
    return _placed(random, order)


def group(random: Random, count: int = 0) -> Scene:
    """One to five things of few kinds, so that there is something to count."""
    count = count or random.choices((1, 2, 3, 4, 5), (1, 2, 3, 4, 4))[0]
    shapes = random.sample(SHAPES, random.choices((1, 2, 3), (4, 5, 2))[0])
    colours = random.sample(COLOURS, random.choices((1, 2, 3), (4, 5, 2))[0])
    return _placed(random, [(random.choice(shapes), random.choice(colours)) for _ in range(count)])


def text(random: Random) -> Scene:
    """One to three digits, or as many capital letters."""
    width, height = _size(random)
    letters = random.choice((DIGITS, LETTERS))
    length = random.choices((1, 2, 3), (2, 3, 4))[0]
    written = "".join(random.choice(letters) for _ in range(length))
    return Scene(width, height, text=written, colour=random.choice(COLOURS))


def beside(scene: Scene, thing: Thing, side: str) -> Thing | bool | None:
    """What is left of, right of, above or below a thing: the one thing there, None for nothing, False if unclear."""
    there = []
    for other in scene.things:
        if other is thing:
            continue
        ahead = {
            "left": thing.x - other.x,
            "right": other.x - thing.x,
            "above": thing.y - other.y,
            "below": other.y - thing.y,
        }[side]
        if ahead > CLEAR:
            there.append(other)
        elif ahead > CLEAR / 3:
            return False
    return False if len(there) > 1 else there[0] if there else None


def _size(random: Random) -> tuple[float, float]:
    ratio = 1.0 if random.random() < 0.4 else random.uniform(1.0, 1.5)
    return (ratio, 1.0) if random.random() < 0.6 else (1.0, ratio)


def _placed(random: Random, kinds: list[tuple[str, str]]) -> Scene:
    """Put the things at places where none touches another or the edge."""
    width, height = _size(random)
    largest = {1: 0.42, 2: 0.24, 3: 0.21, 4: 0.18, 5: 0.165}[len(kinds)]
    smallest = {1: 0.13, 2: 0.11, 3: 0.1, 4: 0.095, 5: 0.09}[len(kinds)]
    while True:
        common = random.uniform(smallest, largest)
        things: list[Thing] = []
        for _ in range(60):
            shape, colour = kinds[len(things)]
            radius = min(largest, max(smallest, common * random.uniform(0.85, 1.15)))
            x = random.uniform(radius + 0.01, width - radius - 0.01)
            y = random.uniform(radius + 0.01, height - radius - 0.01)
            gap = random.uniform(0.03, 0.1)
            if all(math.hypot(x - other.x, y - other.y) > radius + other.radius + gap for other in things):
                turn = random.choice((0.0, random.uniform(-0.26, 0.26)))
                things.append(Thing(shape, colour, x, y, radius, turn))
                if len(things) == len(kinds):
                    return Scene(width, height, tuple(things))

"""Scenes to pictures, in many hands: sizes, backgrounds, lines, fonts.

    python -m examples.demo_model.draw --seed 7 --count 100 --out DIR

writes DIR/*.png and DIR/questions.jsonl: fresh pictures, a question about each, and its answer.
"""

from __future__ import annotations

import argparse
import json
import math
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .scenes import Scene, outline

# Two corners of the box from which a colour is drawn.
PALETTE = {
    "red": ((190, 0, 0), (255, 45, 50)),
    "orange": ((240, 105, 0), (255, 165, 40)),
    "yellow": ((235, 205, 0), (255, 255, 70)),
    "green": ((0, 115, 0), (70, 205, 90)),
    "blue": ((0, 20, 180), (60, 130, 255)),
    "purple": ((105, 0, 120), (175, 70, 215)),
    "black": ((0, 0, 0), (35, 35, 35)),
    "white": ((238, 238, 238), (255, 255, 255)),
}
GROUNDS = ((255, 255, 255), (250, 245, 225), (225, 235, 245), (200, 200, 200), (235, 215, 220), (215, 235, 210),
           (150, 160, 170), (90, 90, 95), (0, 0, 0), (20, 25, 60), (45, 30, 30), (20, 50, 40))  # fmt: skip
LEAST_CONTRAST = 95  # largest difference of one channel between a thing and the ground

_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "/System/Library/Fonts/Supplemental", "/Library/Fonts")
_FAMILIES = ("DejaVuSans", "DejaVuSerif", "Arial", "Courier New", "Georgia", "Helvetica", "Times New Roman", "Verdana",
             "Trebuchet MS", "LiberationSans", "LiberationSerif", "LiberationMono", "FreeSans", "FreeSerif", "FreeMono",
             "NotoSans", "NotoSerif", "Roboto", "OpenSans", "Lato", "Ubuntu")  # fmt: skip

RGB = tuple[int, ...]  # three levels, 0 to 255


@lru_cache
def font_files(folder: str = "") -> tuple[str, ...]:
    """ "" (Pillow's own font) and the font files of `folder`, or the common Latin ones of this machine."""
    if folder:
        return ("", *map(str, sorted(Path(folder).rglob("*.ttf"))))
    found = [path for root in _FOLDERS for path in sorted(Path(root).rglob("*.ttf"))]
    return ("", *(str(path) for path in found if path.stem.split("-")[0].startswith(_FAMILIES)))


@lru_cache(4096)
def _font(file: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


def draw(scene: Scene, random: Random, *, fonts: tuple[str, ...] = ("",)) -> tuple[Image.Image, list[list[float]]]:
    """Draw a scene at a random size and in a random style.

    Returns:
        An RGB picture; and for a text the box of each character as eight numbers, its corners as fractions of the
        picture's width and height (for training the tower; a shape's place is in its scene).
    """
    size = random.choice((112, 128, 160, 200, 224, random.randrange(90, 320)))
    width, height = round(size * scene.width), round(size * scene.height)
    inks = {colour: _ink(colour, random) for colour in sorted({t.colour for t in scene.things} | {scene.colour} - {""})}
    fine = 2 if size < 180 and random.random() < 0.7 else 1  # drawn twice as large, then halved: smooth edges
    picture, ground = _ground(width * fine, height * fine, list(inks.values()), random)
    boxes: list[list[float]] = []
    if scene.text:
        boxes = _write(picture, scene.text, inks[scene.colour], fonts, random)
    else:
        _shapes(picture, scene, size * fine, inks, ground, random)
    if fine > 1:
        picture = picture.reduce(fine)
    return _worn(picture, random), boxes


def _ink(colour: str, random: Random) -> RGB:
    low, high = PALETTE[colour]
    if random.random() < 0.4:  # light or dark as a whole, as named colours are
        share = random.random()
        return tuple(round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return tuple(random.randint(a, b) for a, b in zip(low, high, strict=True))


def _contrast(one: RGB, other: RGB) -> int:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _ground(width: int, height: int, inks: list[RGB], random: Random) -> tuple[Image.Image, RGB]:
    """Plain, shaded or lined paper on which all inks can be seen."""
    for attempt in range(200):
        base = (255, 255, 255) if random.random() < 0.3 else random.choice(GROUNDS)
        ground = tuple(min(255, max(0, level + random.randint(-12, 12))) for level in base)
        if attempt < 8 and base == (255, 255, 255) and random.random() < 0.6:
            ground = base
        if min(_contrast(ground, ink) for ink in inks) >= LEAST_CONTRAST - attempt // 4:
            break
    picture = Image.new("RGB", (width, height), ground)
    style = random.random()
    if style < 0.2:  # a gradient to a near colour
        other = tuple(min(255, max(0, level + random.randint(-30, 30))) for level in ground)
        if min(_contrast(other, ink) for ink in inks) >= LEAST_CONTRAST - 20:
            shade = Image.linear_gradient("L")
            if random.random() < 0.5:
                shade = shade.transpose(Image.Transpose.ROTATE_90)
            picture.paste(Image.new("RGB", picture.size, other), mask=shade.resize(picture.size))
    elif style < 0.26:  # faint lines or squares
        step, pen = random.randint(9, 30) * width // 200 + 4, ImageDraw.Draw(picture)
        line = tuple(level + (14 if level < 128 else -14) for level in ground)
        for y in range(step, height, step):
            pen.line((0, y, width, y), fill=line)
        if random.random() < 0.5:
            for x in range(step, width, step):
                pen.line((x, 0, x, height), fill=line)
    return picture, ground


def _shapes(picture: Image.Image, scene: Scene, unit: int, inks: dict[str, RGB], ground: RGB, random: Random) -> None:
    """All things in one style: filled, filled with an edge, or as thick lines."""
    pen = ImageDraw.Draw(picture)
    style = random.choices(("filled", "edged", "lines"), (6, 2, 2))[0]
    share = random.uniform(0.12, 0.3)
    for thing in scene.things:
        points = [(x * unit, y * unit) for x, y in outline(thing)]
        ink = inks[thing.colour]
        if style == "lines":
            line = max(2 * unit // 100, round(thing.radius * unit * share))
            pen.line([*points, *points[:2]], fill=ink, width=line, joint="curve")
        elif style == "filled":
            pen.polygon(points, fill=ink)
        else:
            edge = (0, 0, 0) if thing.colour != "black" else (255, 255, 255)
            if max(abs(a - b) for a, b in zip(edge, ground, strict=True)) < 60:
                edge = (110, 110, 110)
            pen.polygon(points, fill=ink)
            pen.line([*points, *points[:2]], fill=edge, width=max(1, round(unit * random.uniform(0.006, 0.014))))


def _write(picture: Image.Image, text: str, ink: RGB, fonts: tuple[str, ...], random: Random) -> list[list[float]]:
    """One line of characters somewhere in the picture; returns their boxes."""
    width, height = picture.size
    file = random.choice(fonts)
    apart = random.choice((0.0, 0.0, random.uniform(0.0, 0.18)))
    trial = _font(file, 64)
    advances = [trial.getlength(letter) / 64 + apart for letter in text]
    _, top, _, bottom = trial.getbbox(text)
    tall = max(1, bottom - top) / 64
    most = min(0.9 * width / (sum(advances) + 0.05), 0.85 * height / tall)
    least = min(most, 0.2 * min(width, height) / tall)
    scale = max(8, round(random.uniform(max(least, 0.45 * most), most)))
    font = _font(file, scale)
    spread = [font.getlength(letter) + apart * scale for letter in text]
    whole, (_, top, _, bottom) = sum(spread), font.getbbox(text)
    x = random.uniform(0.04 * width, max(0.05 * width, 0.96 * width - whole))
    y = random.uniform(0.06 * height, max(0.07 * height, 0.94 * height - (bottom - top))) - top
    mask = Image.new("L", picture.size)
    pen, boxes = ImageDraw.Draw(mask), []
    bold = round(random.choice((0, 0, 0, 0.02, 0.04)) * scale)
    turn = random.choice((0.0, 0.0, random.uniform(-7, 7)))
    sine, cosine = math.sin(math.radians(turn)), math.cos(math.radians(turn))
    for letter, advance in zip(text, spread, strict=True):
        pen.text((x, y), letter, fill=255, font=font, stroke_width=bold)
        a, b, c, d = pen.textbbox((x, y), letter, font=font)
        corners = []
        for px, py in ((a, b), (c, b), (c, d), (a, d)):
            dx, dy = px - width / 2, py - height / 2
            corners += [(dx * cosine + dy * sine) / width + 0.5, (dy * cosine - dx * sine) / height + 0.5]
        boxes.append(corners)
        x += advance
    if turn:
        mask = mask.rotate(turn, Image.Resampling.BILINEAR)
    picture.paste(Image.new("RGB", picture.size, ink), mask=mask)
    return boxes


def _worn(picture: Image.Image, random: Random) -> Image.Image:
    """Now and then grain, or a little blur."""
    style = random.random()
    if style < 0.12:
        grain = np.frombuffer(random.randbytes(picture.width * picture.height * 3), np.uint8)
        strength = random.uniform(0.02, 0.1)
        noise = ((grain.astype(np.float32) - 127.5) * strength).reshape(picture.height, picture.width, 3)
        return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))
    if style < 0.2:
        return picture.filter(ImageFilter.GaussianBlur(picture.width / 200 * random.uniform(0.2, 1.0)))
    return picture


def main() -> None:
    """Write fresh pictures and their questions."""
    from .questions import sample

    options = argparse.ArgumentParser(description=main.__doc__)
    options.add_argument("--seed", type=int, default=7)
    options.add_argument("--count", type=int, default=100)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--fonts", default="", help="a folder of .ttf files; else this machine's common ones")
    chosen = options.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    with (chosen.out / "questions.jsonl").open("w", encoding="utf-8") as file:
        for number, one in enumerate(sample(chosen.seed, chosen.count, fonts=font_files(chosen.fonts))):
            names = []
            for place, picture in enumerate(one.pictures):
                names.append(f"{number:04d}{'ab'[place] if len(one.pictures) > 1 else ''}.png")
                picture.save(chosen.out / names[-1])
            question = one.question
            row: dict[str, Any] = {"images": names, "question": question.text, "answer": question.answer,
                                   "kind": question.kind, "language": question.language}  # fmt: skip
            if question.earlier:
                row["earlier"] = [list(turn) for turn in question.earlier]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

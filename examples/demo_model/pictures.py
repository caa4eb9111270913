"""The pictures in examples/pictures, and the questions that the default tests ask about them.

python -m examples.demo_model.pictures
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .draw import PALETTE
from .scenes import Thing, outline

FOLDER = Path(__file__).resolve().parent.parent / "pictures"
SIZE, FINE = 224, 4  # pixels, and how much larger it is drawn before it is made smooth

THINGS = {
    "shapes": [("circle", "red", 0.2, 0.24, 0.13), ("circle", "blue", 0.62, 0.2, 0.12),
               ("star", "yellow", 0.84, 0.5, 0.14), ("circle", "red", 0.3, 0.72, 0.14),
               ("triangle", "green", 0.68, 0.8, 0.14)],
    "heart": [("heart", "purple", 0.5, 0.5, 0.33)],
    "beside": [("square", "orange", 0.25, 0.5, 0.17), ("cross", "blue", 0.74, 0.52, 0.16)],
    "stars": [("star", "black", 0.24, 0.26, 0.15), ("star", "black", 0.7, 0.3, 0.15),
              ("star", "black", 0.5, 0.75, 0.15)],
    "triangle": [("triangle", "green", 0.52, 0.5, 0.36)],
}  # fmt: skip
TEXTS = {"number": ("472", "blue"), "letters": ("MLX", "black")}
UNKNOWN = "I only know simple drawings."

# pictures, question, answer, kind, language, and the turn before it
QUESTIONS: list[tuple[list[str], str, str, str, str, tuple[str, str] | None]] = [
    (["shapes"], "How many circles are there?", "3", "count", "en", None),
    (["shapes"], "How many shapes are there?", "5", "count", "en", None),
    (["shapes"], "What colour is the star?", "yellow", "colour", "en", None),
    (["shapes"], "有几个圆形？", "3", "count", "zh", None),
    (["shapes"], "¿Cuántos círculos hay?", "3", "count", "es", None),
    (["shapes"], "What is the capital of France?", UNKNOWN, "unknown", "en", None),
    (["heart"], "What is this?", "a purple heart", "name", "en", None),
    (["heart"], "What shape is this?", "heart", "shape", "en", None),
    (["heart"], "这是什么颜色？", "紫色", "colour", "zh", None),
    (["heart"], "¿Qué forma es?", "corazón", "shape", "es", None),
    (["heart"], "And what colour is it?", "purple", "follow_up", "en", ("What shape is this?", "heart")),
    (["beside"], "What is left of the cross?", "an orange square", "position", "en", None),
    (["beside"], "What is right of the square?", "a blue cross", "position", "en", None),
    (["beside"], "And the square?", "orange", "follow_up", "en", ("What colour is the cross?", "blue")),
    (["stars"], "How many stars are there?", "3", "count", "en", None),
    (["stars"], "¿De qué color es la figura?", "negro", "colour", "es", None),
    (["triangle"], "Describe the picture.", "a green triangle", "name", "en", None),
    (["triangle"], "你好", "我只认识简单的图画。", "unknown", "zh", None),
    (["number"], "What number is this?", "472", "read", "en", None),
    (["letters"], "What does it say?", "MLX", "read", "en", None),
    (["heart", "triangle"], "Which picture shows a green triangle?", "the second", "two", "en", None),
    (["triangle", "heart"], "Which picture shows a green triangle?", "the first", "two", "en", None),
]


def picture(name: str) -> Image.Image:
    """One of THINGS or TEXTS."""
    side = SIZE * FINE
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    for shape, colour, x, y, radius in THINGS.get(name, ()):
        corners = [(px * side, py * side) for px, py in outline(Thing(shape, colour, x, y, radius))]
        pen.polygon(corners, fill=_ink(colour))
    if name in TEXTS:
        text, colour = TEXTS[name]
        font = ImageFont.load_default(round(side * 0.36))
        pen.text((side / 2, side / 2), text, fill=_ink(colour), font=font, anchor="mm")
    return image.reduce(FINE)


def _ink(colour: str) -> tuple[int, ...]:
    low, high = PALETTE[colour]
    return tuple((a + b) // 2 for a, b in zip(low, high, strict=True))


def main() -> None:
    """Write the pictures and questions.jsonl."""
    FOLDER.mkdir(exist_ok=True)
    for name in (*THINGS, *TEXTS):
        picture(name).save(FOLDER / f"{name}.png", optimize=True)
    rows = []
    for names, question, answer, kind, language, earlier in QUESTIONS:
        row = {"images": [f"{name}.png" for name in names], "question": question, "answer": answer, "kind": kind,
               "language": language}  # fmt: skip
        rows.append(row | ({"earlier": [list(earlier)]} if earlier else {}))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (FOLDER / "questions.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

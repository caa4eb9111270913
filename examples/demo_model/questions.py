"""Questions about scenes, and their answers, in English, Chinese and Spanish.

A question about a thing that a scene has more than once is not asked; a place is asked only where it is clear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from PIL import Image

from . import scenes
from .draw import draw
from .scenes import COLOURS, SHAPES, Scene, Thing, beside
from .strangers import strange_question
from .words import ANSWERS, ASK, NAMES, PLURALS, gendered, how_many_both, named

KINDS = ("shape", "colour", "name", "count", "position", "read", "two", "follow_up", "unknown")
LANGUAGES = ("en", "zh", "es")


@dataclass(frozen=True)
class Question:
    """`earlier` are the turns before it, (question, answer) each."""

    text: str
    answer: str
    kind: str
    language: str = "en"
    earlier: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Sample:
    """A question with its pictures."""

    pictures: tuple[Image.Image, ...]
    question: Question


def _language(random: Random) -> str:
    return random.choices(LANGUAGES, (5, 2.5, 2.5))[0]


def _told(thing: Thing, scene: Scene, language: str, random: Random) -> str | None:
    """ "red circle", or "circle" where there is no other, or None where the words would fit two things."""
    alike = [t for t in scene.things if t.shape == thing.shape]
    if len(alike) == 1 and random.random() < 0.6:
        return NAMES[language][thing.shape]
    if sum(t.colour == thing.colour for t in alike) > 1:
        return None
    return named(thing, language, article=False)


def shape(scene: Scene, random: Random) -> Question | None:
    """What shape is it, or what shape is the red one."""
    language = _language(random)
    thing = random.choice(scene.things)
    if len(scene.things) == 1 and random.random() < 0.75:
        text = random.choice(ASK[language]["shape"])
    elif sum(t.colour == thing.colour for t in scene.things) == 1:
        text = random.choice(ASK[language]["shape_of"]).format(NAMES[language][thing.colour])
    else:
        return None
    return Question(text, NAMES[language][thing.shape], "shape", language)


def colour(scene: Scene, random: Random) -> Question | None:
    """What colour is the circle."""
    language = _language(random)
    thing = random.choice(scene.things)
    if len(scene.things) == 1 and random.random() < 0.5:
        text = random.choice(ASK[language]["colour"])
    elif sum(t.shape == thing.shape for t in scene.things) == 1:
        text = gendered(random.choice(ASK[language]["colour_of"]).format(NAMES[language][thing.shape]))
    else:
        return None
    return Question(text, NAMES[language][thing.colour], "colour", language)


def name(scene: Scene, random: Random) -> Question | None:
    """What is this."""
    if len(scene.things) != 1:
        return None
    language = _language(random)
    return Question(random.choice(ASK[language]["name"]), named(scene.things[0], language), "name", language)


def count(scene: Scene, random: Random) -> Question | None:
    """How many of all, of a shape, of a colour, or of both; sometimes of what is not there."""
    language = _language(random)
    thing = random.choice(scene.things) if scene.things else None
    shape = thing.shape if thing else random.choice(SHAPES)
    colour = thing.colour if thing else random.choice(COLOURS)
    if random.random() < 0.1:
        shape, colour = random.choice(SHAPES), random.choice(COLOURS)
    which = random.choices(("all", "shape", "colour", "both"), (3, 4, 2, 3))[0]
    number = sum(
        (which in ("all", "colour") or t.shape == shape) and (which in ("all", "shape") or t.colour == colour)
        for t in scene.things
    )
    text = _how_many(which, shape, colour, language, random)
    return Question(text, str(number), "count", language)


def _how_many(which: str, shape: str, colour: str, language: str, random: Random) -> str:
    if which == "all":
        return random.choice(ASK[language]["count_all"])
    if which == "shape":
        noun = PLURALS[language][shape]
    elif which == "colour":
        noun = random.choice(ASK[language]["coloured"]).format(PLURALS[language][colour])
    else:
        noun = how_many_both(language, shape, colour)
    return gendered(random.choice(ASK[language]["count"]).format(noun))


def position(scene: Scene, random: Random) -> Question | None:
    """What is left of the circle; is the circle left of the square."""
    for _ in range(6):
        thing, side = random.choice(scene.things), random.choice(("left", "right", "above", "below"))
        there, words = beside(scene, thing, side), _told(thing, scene, "en", random)
        if there is False or words is None or (there is None and random.random() < 0.75):
            continue
        if random.random() < 0.25 and len(scene.things) > 1:
            other = random.choice([t for t in scene.things if t is not thing])
            others = _told(other, scene, "en", random)
            if others is None:
                continue
            text = random.choice(ASK["en"]["is_beside"]).format(others, ASK["en"][side][0], words)
            return Question(text, "yes" if other is there else "no", "position")
        text = random.choice(ASK["en"]["beside"]).format(random.choice(ASK["en"][side]), words)
        return Question(text, named(there, "en") if isinstance(there, Thing) else "nothing", "position")
    return None


def read(scene: Scene, random: Random) -> Question | None:
    """What is written here."""
    if not scene.text:
        return None
    kind = "digits" if scene.text[0] in scenes.DIGITS else "letters"
    kinds = [f"{kind}_{'one' if len(scene.text) == 1 else 'more'}"]
    if not set(scene.text) & set("0O1I"):
        kinds.append("read")
    return Question(random.choice(ASK["en"][random.choice(kinds)]), scene.text, "read")


def follow_up(scene: Scene, random: Random) -> Question | None:
    """A short second question that leans on the first."""
    language = _language(random)
    ask, thing = ASK[language], random.choice(scene.things)
    way = random.choice(("it", "it", "next", "again", "beside"))
    if way == "it" and len(scene.things) == 1:
        first = random.choice((shape, colour, name))(scene, random)
        if first is None:
            return None
        ask = ASK[first.language]
        wanted = "shape" if first.kind == "colour" else "colour" if first.kind == "shape" else random.choice(
            ("shape", "colour", "count"))  # fmt: skip
        answer = "1" if wanted == "count" else NAMES[first.language][getattr(thing, wanted)]
        text = random.choice(ask[f"then_{wanted}"])
        return Question(text, answer, "follow_up", first.language, ((first.text, first.answer),))
    if way == "next" and len(scene.things) > 1:
        first = colour(scene, random)
        others = [t for t in scene.things if sum(o.shape == t.shape for o in scene.things) == 1]
        if first is None or not others:
            return None
        other = random.choice(others)
        text = gendered(random.choice(ASK[first.language]["and"]).format(NAMES[first.language][other.shape]))
        answer = NAMES[first.language][other.colour]
        return Question(text, answer, "follow_up", first.language, ((first.text, first.answer),))
    if way == "again":
        shapes = sorted({t.shape for t in scene.things} - {thing.shape}) or sorted(set(SHAPES) - {thing.shape})
        next_shape = random.choice(shapes)
        asked = _how_many("shape", thing.shape, thing.colour, language, random)
        numbers = [str(sum(t.shape == shape for t in scene.things)) for shape in (thing.shape, next_shape)]
        text = gendered(random.choice(ask["and_count"]).format(PLURALS[language][next_shape]))
        return Question(text, numbers[1], "follow_up", language, ((asked, numbers[0]),))
    if way == "beside" and len(scene.things) == 2:
        first = position(scene, random)
        other = random.choice(scene.things)
        if first is None or first.answer in ("yes", "no", "nothing"):
            return None
        seen = next(t for t in scene.things if named(t, "en") == first.answer)
        text, answer = random.choice(
            [
                (
                    random.choice(ASK["en"]["and"]).format(f"{NAMES['en'][other.shape]}'s colour"),
                    NAMES["en"][other.colour],
                )
                if scene.things[0].shape != scene.things[1].shape
                else (random.choice(ASK["en"]["count_all"]), "2"),
                (random.choice(ASK["en"]["count_all"]), "2"),
                (random.choice(ASK["en"]["then_colour"]), NAMES["en"][seen.colour]),
            ]
        )
        return Question(text, answer, "follow_up", "en", ((first.text, first.answer),))
    return None


def two(first: Scene, second: Scene, random: Random) -> Question | None:
    """Which of two pictures shows a thing; or what one of them shows."""
    both = (first, second)
    if all(len(scene.things) == 1 for scene in both) and random.random() < 0.25:
        which = random.randrange(2)
        text = random.choice(ASK["en"]["what_in"]).format(("first", "second")[which])
        return Question(text, named(both[which].things[0], "en"), "two")
    which = random.randrange(2)
    there, elsewhere = both[which].things, both[1 - which].things
    thing = random.choice(there)
    way = random.choice(("both", "both", "shape", "colour"))
    if any(
        (way == "colour" or t.shape == thing.shape) and (way == "shape" or t.colour == thing.colour) for t in elsewhere
    ):
        return None
    noun = {"both": named(thing, "en"), "shape": named(thing, "en", colour=False),
            "colour": f"something {thing.colour}"}[way]  # fmt: skip
    return Question(random.choice(ASK["en"]["which"]).format(noun), ANSWERS["en"][("first", "second")[which]], "two")


def unknown(scene: Scene | None, random: Random) -> Question:
    """Anything else."""
    language = _language(random)
    return Question(strange_question(language, random), ANSWERS[language]["unknown"], "unknown", language)


Maker = Callable[[Scene, Random], Question | None]
MAKERS: dict[str, Maker] = {
    "shape": shape,
    "colour": colour,
    "name": name,
    "count": count,
    "position": position,
    "read": read,
    "follow_up": follow_up,
    "unknown": unknown,
}


def two_scenes(random: Random) -> tuple[Scene, Scene]:
    """Two pictures of one or two things; often alike in shape or colour."""
    make = random.choice((scenes.single, scenes.single, scenes.pair))
    return make(random), make(random)


def sample(seed: int, count: int, *, fonts: tuple[str, ...] = ("",)) -> Iterator[Sample]:
    """Fresh pictures with one question each, the kinds evenly mixed: what accuracy is measured on."""
    random = Random(f"demo {seed}")
    made = {"shape": (scenes.single, scenes.pair), "colour": (scenes.single, scenes.pair), "name": (scenes.single,),
            "count": (scenes.group,), "position": (scenes.pair,), "read": (scenes.text,),
            "follow_up": (scenes.single, scenes.pair, scenes.group), "unknown": (scenes.any_scene,)}  # fmt: skip
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        question: Question | None = None
        while question is None:
            shown: tuple[Scene, ...] = two_scenes(random) if kind == "two" else (random.choice(made[kind])(random),)
            question = two(shown[0], shown[1], random) if kind == "two" else MAKERS[kind](shown[0], random)
        yield Sample(tuple(draw(scene, random, fonts=fonts)[0] for scene in shown), question)

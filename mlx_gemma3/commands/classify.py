"""`mlx-gemma3 classify`: whether pictures break policies, by ShieldGemma 2."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import OptionError
from .terminal import Status, emit, print_notes, say


def classify(
    image: Annotated[
        list[str],
        typer.Option("--image", "-i", help="A picture, its path or its address; give it again for more."),
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Alias, folder, or owner/name on the Hub.")
    ] = "shieldgemma-2-4b-it",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="A policy that the model knows (dangerous, sexual, violence), or NAME=TEXT; again for more.",
            show_default="all of the model's",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Load even where memory will not do.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for each picture.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")] = False,
) -> None:
    """How likely each picture breaks each policy: a line with the probability, the policy, and the picture."""
    policies = _policies(policy or [])
    if "-" in image:
        raise OptionError("--image -", got="standard input", want="a path or an address")

    from ..runtime.engine import Engine

    status = Status(not quiet and not as_json)
    status.show(f"loading {model}")
    with Engine(model, dtype=dtype, force=force, quiet=quiet or as_json) as engine:
        status.clear()
        print_notes(engine.about["notes"], quiet=quiet)
        for number, source in enumerate(image):
            status.show("looking at pictures", number, len(image))
            found = engine.classify(source, policies or None)
            status.clear()
            if as_json:
                emit({"image": source, "policies": found})
                continue
            for name, probability in found.items():
                say(f"{probability:.4f}  {name}  {source}")


def _policies(words: list[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not name or name in found or (equals and not text.strip()):
            got = f"{name} twice" if name in found else repr(word)
            raise OptionError("--policy", got=got, want="a policy's name, or NAME=TEXT, each once")
        found[name] = text if equals else None
    return found

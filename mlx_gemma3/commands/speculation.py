"""The flags of commands that write answers: what guesses them, or that nothing does (docs/speculation.md)."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import OptionError

Draft = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="A smaller Gemma 3 that guesses the answer: the same text, sooner.", show_default=False
    ),
]
Off = Annotated[bool, typer.Option("--no-speculation", help="Guess nothing of answers.")]


def guessed_by(draft: str | None, *, off: bool) -> dict[str, Any]:
    """The keyword arguments of `Engine` for these flags. Raises OptionError: both."""
    if draft is not None and off:
        raise OptionError("--draft", got="--no-speculation as well", want="one or the other")
    return {"draft": draft, "speculation": not off}

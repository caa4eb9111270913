"""Tools of a chat: the functions of a file, run when the model asks for them and the person allows it."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from inspect import isfunction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import OptionError
from ..terminal import own
from .screen import Screen

if TYPE_CHECKING:
    from ...runtime.events import ToolCall

MOST_ROUNDS = 8  # of calls, before the person is asked for words again


class Tools:
    """The functions of a Python file that begin with no underscore.

    Raises:
        OptionError: the file cannot be run, or has none; a function with an argument that JSON has nothing for.
    """

    def __init__(self, file: Path, screen: Screen) -> None:
        from ...runtime.running import Functions

        try:
            found = runpy.run_path(str(file))
        except BaseException as error:  # the file is the user's own code
            if isinstance(error, KeyboardInterrupt):
                raise
            got = f"{file} ({type(error).__name__}: {error})"
            raise OptionError("--tools", got=got, want="a Python file") from None
        self.functions: list[Callable[..., Any]] = [
            one for name, one in found.items() if isfunction(one) and not name.startswith("_") and _own(one)
        ]
        if not self.functions:
            raise OptionError("--tools", got=f"{file}, which defines no function", want="one at least")
        self._screen = screen
        self._functions = Functions(self.functions, self._allowed, self._found)

    def results(self, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
        """Ask for each call, run what is allowed: the messages that tell what was found."""
        return self._functions.results(calls)

    def _allowed(self, name: str, arguments: Mapping[str, Any]) -> bool:
        said = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items())
        self._screen.rows([("call", f"{name}({said})")])
        own("run it? [y/N] ")
        try:
            answer = sys.stdin.readline()
        except KeyboardInterrupt:
            answer = ""
        return answer.strip().lower() in ("y", "yes")

    def _found(self, name: str, content: str) -> None:
        self._screen.rows([(name, content)])


def _own(function: Callable[..., Any]) -> bool:
    """Whether the file defines it itself."""
    return function.__module__ == "<run_path>"

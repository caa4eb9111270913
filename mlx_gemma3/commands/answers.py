"""The flags of an answer, made of the engine's options: a command takes them as one dict, `options`."""

from __future__ import annotations

import functools
import inspect
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import OptionError
from ..runtime.options import SETTINGS, Setting, default_of

_SWITCH = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}
_WANT = {"texts": "texts, in quotes where they hold spaces", "switch": "on or off", "whole": "a whole number"}
_TYPES: dict[str, Any] = {"number": float | None, "whole": int | None, "text": str | None, "schema": str | None}


def answering(*, talk: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, which takes `options`, a flag for each setting of an answer.

    Args:
        talk: those of a conversation, not those of one request.
    """
    names = [name for name, setting in SETTINGS.items() if (setting.talk if talk else setting.flag)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            options = {name: _flagged(name, given.pop(name)) for name in names}
            command(options=options, **given)

        own = inspect.signature(command, eval_str=True)
        parameters = []
        for parameter in own.parameters.values():
            if parameter.name != "options":
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            parameters += [_parameter(name) for name in names]
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": None}
        del run.__wrapped__
        return run

    return decorate


def _parameter(name: str) -> inspect.Parameter:
    setting = SETTINGS[name]
    default, flag = default_of(name), "--" + (setting.word or name).replace("_", "-")
    if setting.kind == "switch":
        kind: Any = Annotated[bool, typer.Option(flag, help=setting.help)]
    elif setting.kind in ("texts", "biases", "values"):
        kind = Annotated[list[str] | None, typer.Option(flag, help=setting.help, show_default=False)]
        default = None
    elif default is not None:
        kind = Annotated[int, typer.Option(help=setting.help)]
    else:
        kind = Annotated[_TYPES[setting.kind], typer.Option(flag, help=setting.help, show_default=_shown(setting))]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _shown(setting: Setting) -> Any:
    """What the help says of the default."""
    if setting.usual is None:
        return False
    return f"the checkpoint's, else {setting.usual:g}" if setting.saved else f"{setting.usual:g}"


def _flagged(name: str, value: Any) -> Any:
    kind = SETTINGS[name].kind
    if kind == "schema" or name == "grammar":
        return _written(name, value)
    if kind == "texts":
        return value or []
    if kind == "values":
        return _values(name, value or [])
    return _biases(name, value or []) if kind == "biases" else value


def _written(name: str, given: str | None) -> str | None:
    """A schema or grammar, or what stands in the file of that name."""
    if given is None or "{" in given or "\n" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except OSError as error:
        if name == "grammar" and ":" in given:  # start: "a" | "b"
            return given
        raise OptionError(
            f"--{name}", got=f"{given} ({error.strerror})", want=f"a file, or the {name} itself"
        ) from None
    except ValueError:
        raise OptionError(f"--{name}", got=f"{given}, which is not UTF-8", want="a text file") from None


def typed(name: str, text: str) -> Any:
    """A setting's value as it is typed after `/set`.

    Raises:
        OptionError: it is of another kind.
    """
    kind = SETTINGS[name].kind
    try:
        if kind in ("texts", "biases", "values"):
            words = shlex.split(text)
            return words if kind == "texts" else _biases(name, words) if kind == "biases" else _values(name, words)
        if kind == "text":
            return text
        if kind == "switch":
            return _SWITCH[text.lower()]
        return int(text) if kind == "whole" else float(text)
    except (KeyError, ValueError):
        raise OptionError(name, got=text, want=_WANT.get(kind, "a number")) from None


def _values(name: str, words: list[str]) -> dict[str, Any]:
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise OptionError(name, got=repr(word), want="NAME=VALUE, as enable_thinking=true")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _biases(name: str, words: list[str]) -> dict[int, float]:
    found = {}
    for word in words:
        token, _, bias = word.partition("=")
        try:
            found[int(token)] = float(bias)
        except ValueError:
            raise OptionError(name, got=repr(word), want="ID=NUMBER, as 108=-100") from None
    return found

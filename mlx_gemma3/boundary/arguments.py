"""The arguments of public functions: each of the kind it is meant to be, or one OptionError that names it.

Owns the kinds. None stands for the default wherever there is one, numpy's numbers are numbers, and true and false are
none. Ranges belong to who knows them.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

from ..errors import OptionError

_NAME = re.compile(r"[\w.-]+")  # of an adapter: the server has it behind a colon

P = ParamSpec("P")
R = TypeVar("R")


def takes(**kinds: str | type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check these arguments of a function before it runs: each by a name of KINDS, or by its class.

    Raises:
        OptionError: from the function, for an argument of another kind.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters
        places = {name: list(parameters).index(name) for name in kinds}

        @functools.wraps(function)
        def checked(*args: P.args, **options: P.kwargs) -> R:
            given: list[Any] = list(args)
            for name, kind in kinds.items():
                place, default = places[name], parameters[name].default
                if place < len(given):
                    given[place] = argument(name, given[place], kind, default)
                elif name in options:
                    options[name] = argument(name, options[name], kind, default)
            return function(*given, **options)

        return checked

    return decorate


def argument(name: str, value: Any, kind: str | type, default: Any = inspect.Parameter.empty) -> Any:
    """The value as one of that kind: numbers become Python's; None becomes the default, if there is one.

    Raises:
        OptionError: it is of another kind.
    """
    if value is None and default is not inspect.Parameter.empty:
        return default
    if isinstance(kind, type):
        if isinstance(value, kind):
            return value
        raise OptionError(name, got=described(value), want=f"a {kind.__name__}")
    read, want = KINDS[kind]
    try:
        return read(value)
    except (TypeError, ValueError, OverflowError):
        raise OptionError(name, got=described(value), want=want) from None


def elements(value: Any) -> list[Any] | None:
    """What a list holds, or anything else that can be walked; None of what cannot."""
    try:
        return list(value)
    except TypeError:
        return None


def described(value: object) -> str:
    """A value in words for an error, whatever its own words do."""
    try:
        return repr(value)
    except Exception:  # a broken __repr__; a whole number of more digits than Python writes
        return f"a value of type {type(value).__name__}"


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _path(value: Any) -> Any:
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise TypeError
    return value


def _texts(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else (None,)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError
    return texts


def _switch(value: Any) -> bool:
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if not isinstance(value, bool):
        raise TypeError
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError
    return int(value)


def _number(value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or math.isnan(value):
        raise TypeError
    return float(value)


def _biases(value: Any) -> dict[int, float]:
    """JSON has only texts as names: "7" is the token 7."""
    return {_whole(int(key) if isinstance(key, str) else key): _number(bias) for key, bias in _mapping(value).items()}


def _paths(value: Any) -> dict[str, Any]:
    found = _mapping(value)
    if not all(isinstance(name, str) and _NAME.fullmatch(name) for name in found):
        raise TypeError
    return {name: _path(path) for name, path in found.items()}


def _schema(value: Any) -> Any:
    """A JSON schema: an object, which is copied, its text, or a class that has one."""
    if isinstance(value, str | type):
        return value
    return json.loads(json.dumps(_mapping(value)))


def _values(value: Any) -> dict[str, Any]:
    """Values by name, which are copied: JSON's types."""
    found = json.loads(json.dumps(_mapping(value)))
    if not all(isinstance(name, str) for name in value):
        raise TypeError
    return dict(found)


def _tools(value: Any) -> tuple[Any, ...]:
    """Functions, or objects, which are copied."""
    if isinstance(value, str | Mapping) or (given := elements(value)) is None:
        raise TypeError
    return tuple(one if callable(one) else json.loads(json.dumps(_mapping(one))) for one in given)


def _mapping(value: Any) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise TypeError
    return dict(value)


KINDS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "text": (_text, "a text"),
    "path": (_path, "a path"),
    "texts": (_texts, "texts"),
    "switch": (_switch, "true or false"),
    "whole": (_whole, "a whole number"),
    "number": (_number, "a number"),
    "paths": (_paths, "a path for each name, names of letters, digits, -, _ and ."),
    "biases": (_biases, "a number for each token id"),
    "values": (_values, "values by name, of the kinds that JSON has"),
    "schema": (_schema, "a JSON schema: an object, its text, a pydantic model or a dataclass"),
    "tools": (_tools, "a list of functions, or of objects that describe them"),
}

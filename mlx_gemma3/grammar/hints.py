"""Python's types as JSON schemas, and JSON values as instances of them: pydantic models, dataclasses, functions."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, is_typeddict

from ..errors import OptionError

_KINDS: dict[Any, dict[str, Any]] = {
    str: {"type": "string"}, int: {"type": "integer"}, float: {"type": "number"}, bool: {"type": "boolean"},
    None: {"type": "null"}, type(None): {"type": "null"}, Any: {}, object: {}, dict: {"type": "object"},
    list: {"type": "array"}, tuple: {"type": "array"},
}  # fmt: skip
_LISTS = (list, Sequence, typing.Sequence, set, frozenset)


def is_model(kind: object) -> bool:
    """Whether it is a pydantic model or a dataclass."""
    return isinstance(kind, type) and (hasattr(kind, "model_json_schema") or dataclasses.is_dataclass(kind))


def schema_of(kind: Any, where: str = "schema") -> dict[str, Any]:
    """The JSON schema of a type. Objects have the fields that are named, and no others.

    Raises:
        OptionError: a type that JSON has nothing for.
    """
    return _schema(kind, where, ())


def parameters_of(function: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """What a function does, from its docstring, and the schema of its arguments, from their types.

    A line `name: …` under `Args:` in the docstring describes an argument.

    Raises:
        OptionError: an argument without a type, or of one that JSON has nothing for; one that has no name.
    """
    name = getattr(function, "__name__", "tool")
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as error:
        raise OptionError(
            f"tool {name}", got=f"types that cannot be read ({error})", want="types of arguments"
        ) from None
    text = inspect.getdoc(function) or ""
    properties, required = {}, []
    for one in inspect.signature(function).parameters.values():
        where = f"tool {name}: {one.name}"
        if one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL, one.POSITIONAL_ONLY):
            raise OptionError(where, got=str(one.kind.description), want="an argument with a name")
        if one.name not in hints:
            raise OptionError(where, got="no type", want="one, as in city: str")
        schema = schema_of(hints[one.name], where)
        if said := re.search(rf"^\s+{one.name}\s*(?:\([^)]*\))?:\s*(.+(?:\n\s{{8,}}\S.*)*)", text, re.MULTILINE):
            schema.setdefault("description", " ".join(said[1].split()))
        if one.default is one.empty:
            required.append(one.name)
        properties[one.name] = schema
    about = re.split(r"\n\s*(?:Args|Arguments|Returns|Raises|Yields):", text)[0].strip()
    return about, {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def typed_arguments(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's arguments by name."""
    return typing.get_type_hints(function, include_extras=True)


def instance(kind: Any, value: Any) -> Any:
    """A JSON value as an instance of a type whose schema it fits.

    Raises:
        Exception: what the type's own validators raise.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is typing.Annotated:
        return instance(inner[0], value)
    if hasattr(kind, "model_validate"):
        return kind.model_validate(value)
    if origin in (Union, types.UnionType):
        return _first(inner, value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        return kind(**{name: instance(hints[name], one) for name, one in value.items()})
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(value)
    if origin is tuple and isinstance(value, list):
        each = [inner[0]] * len(value) if inner[-1] is ... else inner
        return tuple(instance(one, item) for one, item in zip(each, value, strict=True))
    if origin in _LISTS and isinstance(value, list):
        made = [instance(inner[0], item) for item in value]
        return origin(made) if origin in (set, frozenset) else made
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {key: instance(inner[1], item) for key, item in value.items()}
    return float(value) if kind is float and isinstance(value, int) else value


def _first(kinds: Sequence[Any], value: Any) -> Any:
    """As the first of these types that has such a value."""
    for kind in kinds:
        if kind in (None, type(None)):
            if value is None:
                return None
            continue
        plain: Any = get_origin(kind) or kind
        if dataclasses.is_dataclass(kind) or is_typeddict(kind) or hasattr(kind, "model_validate"):
            if not isinstance(value, dict):
                continue
        elif plain in (str, int, float, bool, list, dict) and type(value) is not plain:
            continue
        try:
            return instance(kind, value)
        except Exception:  # another of them may take it
            continue
    return value


def _schema(kind: Any, where: str, above: tuple[Any, ...]) -> dict[str, Any]:
    if hasattr(kind, "model_json_schema"):
        return dict(kind.model_json_schema())
    try:
        if kind in _KINDS:
            return dict(_KINDS[kind])
    except TypeError:  # it cannot be a key
        pass
    if kind in above:
        raise OptionError(where, got=f"{_name(kind)} within itself", want="a type that ends", do="use a pydantic model")
    origin, inner, above = get_origin(kind), get_args(kind), (*above, kind)
    if origin is typing.Annotated:
        said = next((one for one in inner[1:] if isinstance(one, str)), None)
        return _schema(inner[0], where, above) | ({} if said is None else {"description": said})
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(one, where, above) for one in inner]}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [one.value for one in kind]}
    if origin is tuple and inner[-1] is not ...:
        items = [_schema(one, where, above) for one in inner]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if origin in _LISTS or origin is tuple:
        return {"type": "array", "items": _schema(inner[0], where, above)}
    if origin in (dict, Mapping) and inner[0] is str:
        return {"type": "object", "additionalProperties": _schema(inner[1], where, above)}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        fields = {one.name: one for one in dataclasses.fields(kind) if one.init}
        needed = [
            name
            for name, one in fields.items()
            if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        ]
        return _object(kind, fields, needed, where, above)
    if is_typeddict(kind):
        needed = sorted(kind.__required_keys__, key=list(kind.__annotations__).index)
        return _object(kind, kind.__annotations__, needed, where, above)
    raise OptionError(where, got=_name(kind), want="a type that JSON has: str, int, list[…], a dataclass …")


def _object(kind: Any, names: Any, needed: list[str], where: str, above: tuple[Any, ...]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    properties = {name: _schema(_bare(hints[name]), f"{where}.{name}", above) for name in names}
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) in (typing.Required, typing.NotRequired) else kind


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", None) or str(kind)

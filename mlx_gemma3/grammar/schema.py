"""JSON schemas as grammars: what of a schema answers can be held to, and the one spelling of JSON that they are in.

    {"key": "value", "other": [1, 2]}

One line, a space after each comma and colon, none elsewhere: as json.dumps writes it, so that no answer runs away in
white space and the punctuation between two values is known before the model says it. Strings spell no character as
\\uXXXX: a key that is spelt in two ways would be two keys to a grammar. An object has the properties that its schema
names and no others, where that says nothing of others: what nobody asked for would have no end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from ..errors import OptionError
from . import keywords

_SPELLING = {
    "whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "json_allowed_escapes": 'nrbtf\\"',
    "coerce_one_of": False, "lenient": False,
}  # fmt: skip
_INSIDE = keywords.MAPS  # name → schema
_PLAIN = ("const", "enum", "default", "examples", "example", "dependentRequired")  # values, not schemas
_UNSPELT = re.compile("[\0-\x07\x0b\x0e-\x1f\x7f]")  # what only \\uXXXX spells
_OF_OBJECTS = frozenset({"properties", "required", "additionalProperties", "patternProperties"})
_EITHER = ("anyOf", "oneOf")
_WANT = "a JSON schema that answers can be held to"


def read(schema: Any, name: str = "schema") -> dict[str, Any]:
    """A JSON schema from an object or its text.

    Raises:
        OptionError: it is neither.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise OptionError(name, got=f"no JSON ({error})", want="a JSON schema") from None
    if schema is True:
        return {}
    if not isinstance(schema, Mapping):
        raise OptionError(name, got=json.dumps(schema, default=str), want="a JSON schema: an object")
    return dict(schema)


def lark(schema: Any, name: str = "schema") -> str:
    """The grammar of the JSON texts that a schema allows.

    Args:
        name: what the user calls the schema, for errors.

    Raises:
        OptionError: it is no schema, or asks for what no grammar can promise.
    """
    return f"start: {rule(schema, name)}\n"


def rule(schema: Any, name: str = "schema") -> str:
    """The same as a part of a larger grammar. A reference in the schema counts from its own root."""
    found = keywords.known(read(schema, name), name)
    if not _composed(found):
        found = _closed(found)
    found = keywords.without_dependent_required(found)
    _check(found, name)
    return "%json " + json.dumps({**found, "x-guidance": _SPELLING})


def told(message: str) -> str:
    """What llguidance finds wrong with a schema, without the grammar around it."""
    if keys := re.search(r"Unimplemented keys: \[([^\]]*)\]", message):
        return f"the keyword{'s' * (',' in keys[1])} {keys[1]}".replace('"', "")
    message = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", message)
    message = re.split(r"\s+\d+ \| ", message)[0]
    return message.replace(" Enable 'coerce_one_of' option to approximate oneOf with anyOf", "")


def _composed(schema: Any, inside: bool = False) -> bool:
    """Whether several schemas may speak of one object: none of them knows all of its properties then."""
    if isinstance(schema, list):
        return any(_composed(one, inside) for one in schema)
    if not isinstance(schema, Mapping):
        return False
    speaks = not _OF_OBJECTS.isdisjoint(schema)
    if any(key in schema for key in ("allOf", "$dynamicRef", "unevaluatedProperties")) or (speaks and "$ref" in schema):
        return True
    if inside and (speaks or "$ref" in schema):
        return True
    for key, inner in schema.items():
        if key in _PLAIN:
            continue
        parts = list(inner.values()) if key in _INSIDE and isinstance(inner, Mapping) else inner
        if _composed(parts, key in _EITHER and (inside or speaks)):
            return True
    return False


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    made: dict[str, Any] = {}
    for key, inner in schema.items():
        if key in _INSIDE and isinstance(inner, Mapping):
            made[key] = {name: _closed(one) for name, one in inner.items()}
        else:
            made[key] = inner if key in _PLAIN else _closed(inner)
    names, required = made.get("properties"), made.get("required") or []
    if isinstance(required, list) and isinstance(together := made.get("dependentRequired"), dict):
        required = [*required, *(name for more in together.values() if isinstance(more, list) for name in more)]
    if isinstance(names, dict) and names and isinstance(required, list) and names.keys() >= set(map(str, required)):
        least = made.get("minProperties", 0)
        if "patternProperties" not in made and isinstance(least, int) and least <= len(names):
            made.setdefault("additionalProperties", False)
    return made


def _check(schema: Any, where: str) -> None:
    """Refuse what llguidance takes, but cannot promise. Raises OptionError."""
    if not isinstance(schema, Mapping):
        return
    step = schema.get("multipleOf")
    if isinstance(step, float) and Decimal(str(step)) != Decimal(step):
        got = f"{step}, which computers hold only nearly, so that no two agree on what its multiples are"
        raise OptionError(f"{where}: multipleOf", got=got, want=f"{_WANT}; a whole number, 0.5, 0.25 …")
    _check_count(schema, where)
    names = schema.get("properties")
    named = [schema.get("const"), schema.get("enum"), schema.get("required"), *(names if type(names) is dict else ())]
    if found := _UNSPELT.search(json.dumps(named, ensure_ascii=False, default=str).replace("\\u00", "\0")):
        raise OptionError(where, got=f"the control character {ord(found[0]):#x}", want=f"{_WANT}; texts without it")
    for key, inner in schema.items():
        if key in _PLAIN:
            continue
        if key in _INSIDE and isinstance(inner, Mapping):
            for name, one in inner.items():
                _check(one, f"{where}.{name}")
        elif isinstance(inner, Mapping):
            _check(inner, f"{where}.{key}")
        elif isinstance(inner, list):
            for number, one in enumerate(inner):
                _check(one, f"{where}.{key}[{number}]")


def _check_count(schema: Mapping[str, Any], where: str) -> None:
    """Properties of any name may come twice, and then count once."""
    least, required = schema.get("minProperties"), schema.get("required")
    if not isinstance(least, int) or least <= (len(set(required)) if isinstance(required, list) else 0):
        return
    if schema.get("additionalProperties") is False and not schema.get("patternProperties"):
        return
    raise OptionError(
        f"{where}: minProperties", got=f"{least}, of any names", want=_WANT, do="name the properties, and require them"
    )


def parsed(text: str) -> Any:
    """The value of a JSON text that a grammar let through; a number that no float holds is a whole one.

    Raises:
        ValueError: it is none, or holds a number of thousands of digits.
    """
    return json.loads(text, parse_float=_number)


def _number(text: str) -> float | int:
    value = float(text)
    if abs(value) != float("inf"):
        return value
    try:
        exact = Decimal(text)
    except InvalidOperation:  # even its exponent is beyond all bounds
        raise ValueError(f"a number of too many digits: {text}") from None
    if exact.adjusted() > 4000:
        raise ValueError(f"a number of {exact.adjusted()} digits")
    return int(exact)

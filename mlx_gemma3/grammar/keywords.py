"""Keywords of JSON schema that llguidance does not know, said with those that it does, where that is the same.

    unevaluatedProperties, unevaluatedItems    additionalProperties, items: where what is evaluated is known beforehand
    propertyNames                              patternProperties, properties
    dependentRequired, dependentSchemas        anyOf: the property is not there, or the rest holds
    $dynamicRef, $dynamicAnchor                $ref, $anchor: in one document they are the same
    uniqueItems, not, if, contains, counts     what of them asks for nothing, or for a type

What cannot be said so stays, and is refused by its name. Source: JSON Schema 2020-12, core 8 to 11 and validation 6.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from ..errors import OptionError

Schema = Any  # an object, true or false
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # name → schema
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames",
           "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties", "minContains",
           "maxContains")  # fmt: skip
# What these evaluate depends on the value.
_BRANCHES = ("anyOf", "oneOf", "if", "then", "else", "dependentSchemas", "$dynamicRef")
_SAYINGS = ("type", "title", "description", "$comment")  # beside the one keyword of a name's schema
_TYPES = ("null", "boolean", "object", "array", "number", "string")  # with number also integer


def known(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The same schema with fewer kinds of keywords.

    Args:
        name: what the user calls it, for errors.

    Raises:
        OptionError: a keyword's value is of a wrong type.
    """
    _check_types(schema, name)
    one_document = not any("$id" in one for one in _all(schema) if one is not schema)
    root = schema if one_document else None

    def said(one: Schema) -> Schema:
        if not isinstance(one, Mapping):
            return one
        made = {key: int(x) if key in _COUNTS and _whole(x) else x for key, x in one.items()}
        _leave_out_idle(made)
        _say_unevaluated(made, root)
        _say_names(made, root)
        _say_not(made)
        _say_dependent_schemas(made)
        if one_document:
            for key, plain in (("$dynamicRef", "$ref"), ("$dynamicAnchor", "$anchor")):
                if key in made and plain not in made:
                    made[plain] = made.pop(key)
        return _inside(made, said)

    out: dict[str, Any] = said(schema)
    return out


def without_dependent_required(schema: Schema) -> Schema:
    """The same schema without that keyword. To be asked once it is known which of its objects are closed."""
    if not isinstance(schema, Mapping):
        return schema
    made = dict(schema)
    asked = made.get("dependentRequired")
    if asked is not None:
        del made["dependentRequired"]
        for name, names in asked.items():
            _where_there(made, name, {"required": [name, *names]})
    return _inside(made, without_dependent_required)


def _check_types(schema: Schema, where: str) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise OptionError(where, got=json.dumps(schema, default=str)[:60], want="a schema: an object, true or false")
    for key, value in schema.items():
        at = f"{where}.{key}"
        if key in MAPS:
            _check_is(isinstance(value, Mapping), at, value, "an object of schemas")
            for name, one in value.items():
                _check_types(one, f"{at}.{name}")
        elif key in _LISTS:
            _check_is(isinstance(value, list), at, value, "a list of schemas")
            for number, one in enumerate(value):
                _check_types(one, f"{at}[{number}]")
        elif key in _SINGLE:
            for one in value if key == "items" and isinstance(value, list) else [value]:  # a list in older drafts
                _check_types(one, at)
        elif key in _COUNTS:
            right = isinstance(value, int) or _whole(value)
            _check_is(right and not isinstance(value, bool) and value >= 0, at, value, "a whole number, 0 or more")
        elif key in ("required", "enum"):
            right = isinstance(value, list) and (key == "enum" or _are_texts(value))
            _check_is(right, at, value, "a list of names" if key == "required" else "a list of values")
        elif key == "type":
            _check_is(isinstance(value, str) or _are_texts(value), at, value, "a type or a list of types")
        elif key == "dependentRequired":
            right = isinstance(value, Mapping) and all(map(_are_texts, value.values()))
            _check_is(right, at, value, "an object of lists of names")


def _check_is(right: bool, where: str, got: object, want: str) -> None:
    if not right:
        raise OptionError(where, got=json.dumps(got, default=str)[:60], want=want)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _inside(schema: Mapping[str, Any], change: Callable[[Schema], Schema]) -> dict[str, Any]:
    """A schema with all schemas that stand in it changed."""
    made = dict(schema)
    for key, value in schema.items():
        if key in MAPS:
            made[key] = {name: change(one) for name, one in value.items()}
        elif key in _LISTS or (key in _SINGLE and isinstance(value, list)):
            made[key] = [change(one) for one in value]
        elif key in _SINGLE:
            made[key] = change(value)
    return made


def _all(schema: Schema) -> list[Mapping[str, Any]]:
    """It and all schemas that stand in it."""
    found: list[Mapping[str, Any]] = []

    def add(one: Schema) -> Schema:
        if isinstance(one, Mapping):
            found.append(one)
            _inside(one, add)
        return one

    add(schema)
    return found


def _whole(value: object) -> bool:
    return isinstance(value, float) and value.is_integer()


def _always(schema: Schema) -> bool:
    """Whether every value fits it."""
    return schema is True or schema == {}


def _also(made: dict[str, Any], other: Schema) -> None:
    made["allOf"] = [*made.get("allOf", []), other]


def _where_there(made: dict[str, Any], name: str, then: Schema) -> None:
    """An object that has a property of this name is also as `then` says."""
    _also(made, {"anyOf": [{"properties": {name: False}}, then]})


def _leave_out_idle(made: dict[str, Any]) -> None:
    """Leave out what asks for nothing."""
    if made.get("uniqueItems") is False or made.get("maxItems") in (0, 1):
        made.pop("uniqueItems", None)
    for key in ("unevaluatedProperties", "unevaluatedItems", "propertyNames"):
        if _always(made.get(key)):
            del made[key]
    if made.get("not") is False:
        del made["not"]
    evaluates = "unevaluatedProperties" in made or "unevaluatedItems" in made  # then what is evaluated counts too
    condition = made.get("if")
    if condition is False or _always(condition):
        holds = made.get("else" if condition is False else "then", True)
        for key in ("if", "then", "else"):
            made.pop(key, None)
        if not _always(holds):
            _also(made, holds)
    elif "if" not in made or (made.keys().isdisjoint(("then", "else")) and not evaluates):
        for key in ("if", "then", "else"):
            made.pop(key, None)
    least = made.get("minContains", 1)
    if "contains" not in made:
        made.pop("minContains", None)
        made.pop("maxContains", None)
    elif least == 0 and "maxContains" not in made and not evaluates:
        del made["contains"], made["minContains"]
    elif _always(made["contains"]) and not evaluates:
        most = [made[key] for key in ("maxItems", "maxContains") if key in made]
        made["minItems"] = max(least, made.get("minItems", 0))
        if most:
            made["maxItems"] = min(most)
        for key in ("contains", "minContains", "maxContains"):
            made.pop(key, None)


@dataclass
class _Seen:
    """What a schema evaluates of every value that fits it."""

    names: set[str] = field(default_factory=set)
    patterns: set[str] = field(default_factory=set)
    others: bool = False  # all properties
    first: int = 0  # items
    items: bool = False  # all items


def _say_unevaluated(made: dict[str, Any], root: Schema) -> None:
    if "unevaluatedProperties" not in made and "unevaluatedItems" not in made:
        return
    seen = _seen({key: x for key, x in made.items() if not key.startswith("unevaluated")}, root, set())
    if seen is None:
        return
    if "unevaluatedProperties" in made:
        others = made.pop("unevaluatedProperties")
        if not seen.others:
            for key, found in (("properties", seen.names), ("patternProperties", seen.patterns)):
                if found:
                    made[key] = {**dict.fromkeys(sorted(found), True), **made.get(key, {})}
            made["additionalProperties"] = others
    if "unevaluatedItems" in made and "contains" not in made:
        rest = made.pop("unevaluatedItems")
        if not seen.items:
            own = made.get("prefixItems", [])
            if seen.first:
                made["prefixItems"] = [*own, *[True] * (seen.first - len(own))]
            made["items"] = rest


def _seen(schema: Schema, root: Schema, counted: set[int]) -> _Seen | None:
    """None where it depends on the value.

    Args:
        counted: schemas by id, which count once, however often they are referred to.
    """
    if not isinstance(schema, Mapping) or id(schema) in counted:
        return _Seen()
    if any(key in schema for key in _BRANCHES) or ("contains" in schema and counted):
        return None
    counted.add(id(schema))
    parts = list(schema.get("allOf", []))
    seen = _Seen(
        set(schema.get("properties", ())), set(schema.get("patternProperties", ())),
        "additionalProperties" in schema or "unevaluatedProperties" in schema,
        len(schema.get("prefixItems", ())), "items" in schema or "unevaluatedItems" in schema,
    )  # fmt: skip
    if "$ref" in schema:
        target = _target(schema["$ref"], root)
        if target is None:
            return None
        parts.append(target)
    for part in parts:
        other = _seen(part, root, counted)
        if other is None:
            return None
        seen.names |= other.names
        seen.patterns |= other.patterns
        seen.others, seen.items = seen.others or other.others, seen.items or other.items
        seen.first = max(seen.first, other.first)
    return seen


def _target(reference: object, root: Schema) -> Schema | None:
    """The schema that a pointer into this document means."""
    if not isinstance(reference, str) or not isinstance(root, Mapping) or not re.fullmatch("#(/.*)?", reference, re.S):
        return None
    found: Any = root
    for step in reference[2:].split("/") if len(reference) > 1 else ():
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        try:
            found = found[int(name)] if isinstance(found, list) else found[name]
        except (KeyError, IndexError, ValueError, TypeError):
            return None
    return found if isinstance(found, Mapping | bool) else None


def _say_names(made: dict[str, Any], root: Schema) -> None:
    names, own = made.get("propertyNames"), made.get("properties", {})
    if isinstance(names, Mapping) and names.keys() == {"$ref"}:
        names = _target(names["$ref"], root)
    if names is False:
        del made["propertyNames"]
        made["maxProperties"] = 0
    if not isinstance(names, Mapping) or names.get("type", "string") != "string":
        return
    asked, rest = names.keys() - set(_SAYINGS), made.get("additionalProperties", True)
    if not asked:
        del made["propertyNames"]
    elif asked in ({"enum"}, {"const"}) and "patternProperties" not in made:
        allowed = [one for one in names.get("enum", [names.get("const")]) if isinstance(one, str)]
        del made["propertyNames"]
        made["properties"] = {**dict.fromkeys(own, False), **{name: own.get(name, rest) for name in allowed}}
        made["additionalProperties"] = False
    elif made.keys().isdisjoint(("properties", "patternProperties")):
        if asked == {"pattern"}:
            pattern = names["pattern"]
        elif asked <= {"minLength", "maxLength"}:
            least, most = (int(names[key]) if key in names else "" for key in ("minLength", "maxLength"))
            pattern = rf"^[\s\S]{{{least or 0},{most}}}$"
        else:
            return
        del made["propertyNames"]
        made["patternProperties"], made["additionalProperties"] = {pattern: rest}, False


def _say_not(made: dict[str, Any]) -> None:
    """Of a type: one of the others. Of `not`: that."""
    refused = made.get("not")
    if not isinstance(refused, Mapping):
        return
    if refused.keys() == {"not"}:
        del made["not"]
        _also(made, refused["not"])
    elif refused.keys() == {"type"}:
        types = [refused["type"]] if isinstance(refused["type"], str) else refused["type"]
        own = made.get("type", _TYPES)
        if "integer" in types and "number" not in types:
            return
        left = [one for one in ([own] if isinstance(own, str) else own) if one not in types]
        left = [one for one in left if one != "integer" or "number" not in types]
        if left:
            del made["not"]
            made["type"] = left


def _say_dependent_schemas(made: dict[str, Any]) -> None:
    for name, schema in made.pop("dependentSchemas", {}).items():
        _where_there(made, name, {"allOf": [{"required": [name]}, schema]})

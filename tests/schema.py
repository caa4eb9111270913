"""As much of JSON Schema as docs/worker.schema.json uses, for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = json.loads((Path(__file__).parent.parent / "docs" / "worker.schema.json").read_text(encoding="utf-8"))
_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}
_KNOWN = {
    "$ref", "anyOf", "oneOf", "type", "const", "enum", "required", "additionalProperties", "properties", "items",
    "minimum", "maximum", "minLength", "maxLength", "description",
}  # fmt: skip


def problems(value: Any, schema: dict[str, Any] | str, where: str = "") -> list[str]:
    """What is wrong with a value; `schema` may be a name of $defs."""
    if isinstance(schema, str):
        schema = {"$ref": f"#/$defs/{schema}"}
    assert schema.keys() <= _KNOWN, schema.keys() - _KNOWN
    if "$ref" in schema:
        return problems(value, ROOT["$defs"][schema["$ref"].removeprefix("#/$defs/")], where)
    for word in ("oneOf", "anyOf"):
        if word in schema:
            tries = [problems(value, one, where) for one in schema[word]]
            fits = sum(not found for found in tries)
            if fits == 0 or (word == "oneOf" and fits > 1):
                return [f"{where}: fits {fits} of {len(tries)} forms: {min(tries, key=len)}"]
    found = []
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(
        isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool)) for kind in kinds
    ):
        return [f"{where}: {value!r} is no {kinds}"]
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        found.append(f"{where}: {value!r}, not {schema.get('const', schema.get('enum'))}")
    if isinstance(value, dict):
        fields = schema.get("properties", {})
        found += [f"{where}: no {name}" for name in schema.get("required", ()) if name not in value]
        if schema.get("additionalProperties") is False:
            found += [f"{where}: {name} is unknown" for name in value if name not in fields]
        for name in value.keys() & fields.keys():
            found += problems(value[name], fields[name], f"{where}.{name}")
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            found += problems(item, schema["items"], f"{where}[{number}]")
    if isinstance(value, int | float):
        found += [f"{where}: {value} < minimum"] if value < schema.get("minimum", value) else []
        found += [f"{where}: {value} > maximum"] if value > schema.get("maximum", value) else []
    if isinstance(value, str) and not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        found.append(f"{where}: of length {len(value)}")
    return found

"""Schemas as people write them: receipts, calendars, arguments of functions. All that is written fits."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tiny_tokenizer

from mlx_gemma3 import Tokenizer
from mlx_gemma3.grammar import schema
from mlx_gemma3.grammar.matcher import Grammar

TEXT: dict[str, Any] = {"type": "string", "maxLength": 12}
MONEY: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 99999}
DAY: dict[str, Any] = {"type": "string", "format": "date"}
TIME: dict[str, Any] = {"type": "string", "format": "date-time"}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": 99}
FLAG: dict[str, Any] = {"type": "boolean"}


def one_of(*values: Any) -> dict[str, Any]:
    return {"enum": list(values)}


def some(item: dict[str, Any], most: int = 2) -> dict[str, Any]:
    return {"type": "array", "items": item, "maxItems": most}


def nothing_or(kind: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [kind, {"type": "null"}]}


def record(optional: tuple[str, ...] = (), **fields: dict[str, Any]) -> dict[str, Any]:
    needed = [name for name in fields if name not in optional]
    return {"type": "object", "properties": fields, "required": needed}


LINE = record(name=TEXT, count=COUNT, price=MONEY)
PLACE = record(("zip",), street=TEXT, city=TEXT, zip={"type": "string", "pattern": "^[0-9]{5}$"})
RECORDS: dict[str, dict[str, Any]] = {
    "receipt": record(merchant=TEXT, date=DAY, currency=one_of("EUR", "USD", "CHF"), total=MONEY, items=some(LINE)),
    "invoice": record(("due",), number={"type": "string", "pattern": "^INV-[0-9]{4}$"}, due=DAY, to=PLACE, net=MONEY),
    "event": record(("where",), title=TEXT, start=TIME, end=TIME, where=nothing_or(PLACE), all_day=FLAG),
    "contact": record(("mail",), name=TEXT, mail={"type": "string", "format": "email"}, home=nothing_or(PLACE)),
    "weather": record(("days",), city=TEXT, unit=one_of("celsius", "fahrenheit"), days=COUNT),
    "search": record(("limit", "tags"), query=TEXT, limit=COUNT, tags=some(TEXT), sort=one_of("new", "old")),
    "mail": record(("cc",), to=some(TEXT), cc=some(TEXT), subject=TEXT, urgent=FLAG),
    "flight": record(origin={"type": "string", "pattern": "^[A-Z]{3}$"}, day=DAY, seats=COUNT, cabin=one_of("Y", "C")),
    "order": record(id={"type": "string", "format": "uuid"}, lines=some(LINE), ship=PLACE, gift=FLAG),
    "recipe": record(title=TEXT, minutes=COUNT, steps=some(TEXT, 3), vegan=FLAG),
    "ticket": record(title=TEXT, priority=one_of(1, 2, 3), labels=some(one_of("bug", "doc")), owner=nothing_or(TEXT)),
    "person": record(("born",), name=TEXT, born=DAY, height={"type": "number", "exclusiveMinimum": 0, "maximum": 3}),
    "box": record(label=TEXT, box={"type": "array", "items": COUNT, "minItems": 4, "maxItems": 4}, sure=MONEY),
    "point": {"type": "array", "prefixItems": [{"type": "number"}, {"type": "number"}], "items": False, "minItems": 2},
    "sentiment": record(label=one_of("positive", "negative", "neutral"), why=TEXT),
    "address": PLACE,
    "host": record(address={"type": "string", "format": "ipv4"}, port={"type": "integer", "maximum": 65535}, up=FLAG),
    "shape": {
        "oneOf": [
            record(kind={"const": "circle"}, radius=COUNT),
            record(kind={"const": "rectangle"}, width=COUNT, height=COUNT),
        ]
    },
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {"node": record(name=TEXT, inner={"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1})},
    },
    "settings": {"type": "object", "additionalProperties": {"type": ["boolean", "integer"]}, "maxProperties": 3},
}


def wrapped(name: str, plural: bool) -> dict[str, Any]:
    """A record, or an answer that holds several of them."""
    made = RECORDS[name]
    if not plural:
        return made
    inner = {key: value for key, value in made.items() if key != "$defs"}
    return {**record(found=some(inner), note=nothing_or(TEXT)), "$defs": made.get("$defs", {})}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(tiny_tokenizer.write_tokenizer(tmp_path_factory.mktemp("words")))


@pytest.mark.parametrize("plural", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("name", RECORDS)
def test_what_is_written_fits(words: Tokenizer, name: str, plural: bool) -> None:
    made = wrapped(name, plural)
    validator, grammar, whole = jsonschema.Draft202012Validator(made), Grammar(words, schema.lark(made), "schema"), 0
    for seed in range(50):
        matcher, chance = grammar.start([1]), random.Random(seed)
        for _ in range(400):
            if matcher.complete:
                break
            forced = matcher.forced()
            bits = np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")
            matcher.accept(forced[0] if forced else int(chance.choice(np.flatnonzero(bits))))
        if matcher.complete:
            whole += 1
            validator.validate(json.loads(matcher.text))
    assert whole >= 10


def test_generate_prints_json_that_fits(chat_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "sentiment.json"
    file.write_text(json.dumps(RECORDS["sentiment"]), encoding="utf-8")
    given = ["generate", "-m", str(chat_folder), "--temperature", "1.5", "--seed", "1", "--quiet", "the"]

    def run(*form: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mlx_gemma3.cli", *given, *form]
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200, encoding="utf-8"
        )

    for form in (str(file), json.dumps(RECORDS["sentiment"])):
        jsonschema.validate(json.loads(run("--schema", form).stdout), RECORDS["sentiment"])
    assert run("--choice", "yes", "--choice", "no").stdout in ("yes\n", "no\n")
    missing = run("--schema", "no such file")
    assert missing.returncode == 1 and "--schema: got no such file" in missing.stderr

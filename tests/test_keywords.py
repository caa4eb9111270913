"""Keywords that are said with others: a grammar lets through the values that jsonschema finds to fit, and no others."""

from __future__ import annotations

import json
from itertools import chain, combinations, permutations
from typing import Any

import jsonschema
import numpy as np
import pytest
import tiny_tokenizer

from mlx_gemma3 import Tokenizer
from mlx_gemma3.errors import OptionError
from mlx_gemma3.grammar import schema
from mlx_gemma3.grammar.matcher import Grammar

END = 1
NAMES = ("foo", "bar", "quux", "f")


def values() -> list[Any]:
    """Scalars, lists, and objects of every few names, with a number or a text for each."""
    some = chain.from_iterable(combinations(NAMES, count) for count in range(4))
    objects = [dict(zip(names, kinds, strict=False)) for names in some for kinds in ((1, 2, 3), ("a", 1, "b"))]
    lists: list[Any] = [[], [1], [1, 1], ["a"], [1, "a"], ["a", 1], [1, 2, 3], ["a", "a", "a"], [{"foo": 1}]]
    return [None, True, False, 0, 3, 2.5, "", "a", "foo", *lists, *objects]


OPEN = {"additionalProperties": True}
FOO, BAR = {"properties": {"foo": {"type": "integer"}}}, {"properties": {"bar": {"type": "string"}}}
SAID: list[Any] = [
    {"maxItems": 2.0, "minItems": 1.0},
    {"type": "string", "maxLength": 1.0},
    {"uniqueItems": False},
    {"uniqueItems": True, "maxItems": 1},
    {"unevaluatedProperties": True, "properties": {"foo": {"type": "integer"}}, **OPEN},
    {**FOO, "unevaluatedProperties": False},
    {**FOO, "unevaluatedProperties": {"type": "string"}},
    {**FOO, "patternProperties": {"^b": True}, "unevaluatedProperties": False},
    {"allOf": [FOO, {"required": ["foo"]}], **BAR, "unevaluatedProperties": False},
    {"allOf": [FOO, {**BAR, "additionalProperties": {"type": "integer"}}], "unevaluatedProperties": False},
    {"$ref": "#/$defs/base", "unevaluatedProperties": False, "$defs": {"base": {"allOf": [FOO], **BAR}}},
    {"allOf": [{"unevaluatedProperties": False, **FOO}], "unevaluatedProperties": False},
    {"unevaluatedItems": False},
    {"prefixItems": [{"type": "integer"}], "unevaluatedItems": False},
    {"prefixItems": [{"type": "integer"}], "items": {"type": "string"}, "unevaluatedItems": False},
    {"allOf": [{"prefixItems": [True, {"type": "string"}]}], "prefixItems": [True], "unevaluatedItems": False},
    {"allOf": [{"prefixItems": [{"type": "integer"}]}], "unevaluatedItems": {"type": "string"}},
    {"propertyNames": {"type": "string"}, **OPEN},
    {"propertyNames": True, **OPEN},
    {"propertyNames": False},
    {"propertyNames": {"maxLength": 3}},
    {"propertyNames": {"minLength": 2, "maxLength": 3}, "additionalProperties": {"type": "integer"}},
    {"type": "object", "propertyNames": {"pattern": "^f+$"}},
    {"propertyNames": {"enum": ["foo", "f", 3]}, "additionalProperties": {"type": "integer"}},
    {"propertyNames": {"$ref": "#/$defs/key"}, **FOO, "$defs": {"key": {"const": "foo"}}},
    {"propertyNames": {"const": "bar"}, **FOO, "required": ["bar"]},
    {"dependentRequired": {"bar": ["foo"]}},
    {"dependentRequired": {"bar": ["foo", "f"], "quux": []}, **OPEN},
    {"type": "object", **BAR, "dependentRequired": {"bar": ["quux"]}},
    {"dependentSchemas": {"foo": {"minProperties": 2, "required": ["bar", "foo"]}}},
    {"dependentSchemas": {"foo": BAR, "bar": False}},
    {"if": {"type": "integer"}},
    {"then": {"type": "integer"}, "else": False},
    {"if": True, "then": {"type": "integer"}, "else": {"type": "string"}},
    {"if": False, "then": {"type": "integer"}, "else": {"type": "string"}},
    {"allOf": [{"type": "number"}], "if": {}, "then": {"type": "integer"}},
    {"minContains": 2, "maxContains": 1},
    {"contains": {"type": "integer"}, "minContains": 0},
    {"contains": True},
    {"type": "array", "contains": {}, "minContains": 2, "maxContains": 3, "maxItems": 2},
    {"not": False, "type": "integer"},
    {"not": {"type": "object"}},
    {"not": {"type": ["object", "array", "string"]}},
    {"type": ["integer", "string"], "not": {"type": "number"}},
    {"not": {"not": {"type": "integer"}}},
    {"$dynamicRef": "#/$defs/n", "$defs": {"n": {"type": "integer"}}},
    {"items": {"$dynamicRef": "#n"}, "$defs": {"n": {"$dynamicAnchor": "n", "type": "integer"}}},
]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(tiny_tokenizer.write_tokenizer(tmp_path_factory.mktemp("words")))


def lets_through(grammar: Grammar, text: str) -> bool:
    matcher = grammar.start([END])
    for token in [*grammar.tokenizer.encode(text, special=False), END]:
        allowed = np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")
        if not allowed[token]:
            return False
        matcher.accept(token)
    return True


@pytest.mark.parametrize("made", SAID, ids=lambda made: json.dumps(made)[:60])
def test_the_same_values_fit(words: Tokenizer, made: Any) -> None:
    grammar, validator = Grammar(words, schema.lark(made), "schema"), jsonschema.Draft202012Validator(made)
    fits = 0
    for value in values():
        texts = [json.dumps(value)]
        if isinstance(value, dict):  # a grammar has an order of its own for the properties that are named
            texts = [json.dumps(dict(order)) for order in permutations(value.items())]
        fits += validator.is_valid(value)
        assert any(lets_through(grammar, text) for text in texts) == validator.is_valid(value), value
    assert fits


@pytest.mark.parametrize(
    ("made", "word"),
    [
        ({"anyOf": [FOO, BAR], "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"if": FOO, "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"allOf": [{"contains": True}], "unevaluatedItems": False}, "unevaluatedItems"),
        ({"contains": {"type": "integer"}, "unevaluatedItems": False}, "unevaluatedItems"),
        ({"$ref": "#x", "unevaluatedItems": False, "$defs": {"x": {"$anchor": "x"}}}, "unevaluatedItems"),
        ({"propertyNames": {"maxLength": 3}, **FOO}, "propertyNames"),
        ({"propertyNames": {"not": {"const": "a"}}}, "propertyNames"),
        ({"if": FOO, "then": BAR}, "if"),
        ({"not": {"type": "integer"}}, "not"),
        ({"not": {"const": 3}}, "not"),
        ({"contains": {"type": "integer"}}, "contains"),
        ({"uniqueItems": True, "maxItems": 2}, "uniqueItems"),
        ({"$dynamicRef": "#x", "$defs": {"x": {"$id": "y", "$dynamicAnchor": "x"}}}, "dynamicRef"),
    ],
)
def test_what_depends_on_the_value_is_refused_by_name(words: Tokenizer, made: Any, word: str) -> None:
    with pytest.raises(OptionError, match=word):
        Grammar(words, schema.lark(made), "schema")


def test_schemas_that_are_referred_to_twice_again_and_again_are_looked_at_once(words: Tokenizer) -> None:
    inner = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(60)}
    made = {"$ref": "#/$defs/a0", "unevaluatedProperties": False, "$defs": {**inner, "a60": FOO}}
    assert '"additionalProperties": false' in schema.lark(made)


def test_an_object_whose_names_depend_on_each_other_is_closed(words: Tokenizer) -> None:
    """It has the properties that are named, as without the keyword; not where it asks for one that is not."""
    both = {"type": "object", "properties": {"foo": True, "bar": True}, "dependentRequired": {"bar": ["foo"]}}
    grammar = Grammar(words, schema.lark(both), "schema")
    texts = ("{}", '{"foo": 1}', '{"bar": 1}', '{"foo": 1, "bar": 1}', '{"foo": 1, "f": 1}')
    assert [lets_through(grammar, text) for text in texts] == [True, True, False, True, False]


@pytest.mark.parametrize("wrong", [{"propertyNames": 3}, {"dependentSchemas": []}, {"unevaluatedProperties": "no"},
    {"allOf": 3, "unevaluatedProperties": False}, {"properties": 3, "unevaluatedProperties": False},
    {"dependentRequired": {"a": 3}}, {"not": {"type": 3}}, {"if": True, "then": 3}, {"$ref": 3, "unevaluatedItems": {}},
    {"$ref": "#/x/9", "unevaluatedItems": False, "x": []}, {"propertyNames": {"maxLength": "x"}},
    {"propertyNames": {"enum": 3}}, {"prefixItems": 3, "unevaluatedItems": False}, {"contains": True, "minItems": "x"},
    {"$ref": "#/x", "x": {"properties": 3, "required": True, "dependentRequired": {"a": 3}}, "unevaluatedItems": {}},
    {"dependentRequired": {"a": [[]]}}, {"contains": True, "maxItems": []}, {"unevaluatedItems": False, "allOf": {}},
])  # fmt: skip
def test_what_is_no_schema_is_one_sentence(words: Tokenizer, wrong: Any) -> None:
    with pytest.raises(OptionError) as error:
        Grammar(words, schema.lark({**wrong, "type": "x"}), "schema")
    assert "\n" not in str(error.value)

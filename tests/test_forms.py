"""Answers in a form: what is written fits, ends when it is whole, and what no form can promise is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

import mlx_gemma3 as g3
from mlx_gemma3.errors import OptionError
from mlx_gemma3.grammar import schema

WILD: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "top_p": 1}
RECEIPT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "merchant_registered_name": {"type": "string", "maxLength": 8},
        "paid_in_full": {"type": "boolean"},
        "payment_method_description": {"enum": ["cash", "card"]},
    },
    "required": ["merchant_registered_name", "paid_in_full", "payment_method_description"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(chat_folder: Path) -> Iterator[g3.Engine]:
    with g3.load(chat_folder) as loaded:
        yield loaded


@pytest.fixture(params=[False, True], ids=["plain", "ahead"])
def chat(engine: g3.Engine, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> g3.Engine:
    """As on a CPU, and as on a GPU, where the next pass is issued before a token is read."""
    monkeypatch.setattr(engine._thread._scheduler.runner, "ahead", request.param)  # type: ignore[union-attr]
    return engine


class Item(BaseModel):
    name: Literal["bread", "milk"]
    count: Literal[1, 2, 3]


@dataclass
class Basket:
    item: Literal["bread", "milk"]
    paid: bool


def test_a_schema_gives_json_that_fits_and_ends_by_itself(chat: g3.Engine) -> None:
    for seed in range(3):
        reply = chat.generate("the", schema=RECEIPT, max_tokens=120, seed=seed, **WILD)
        assert reply.finish_reason == "stop" and reply.parsed == json.loads(reply.text)
        assert list(reply.parsed) == RECEIPT["required"] and len(reply.parsed["merchant_registered_name"]) <= 8
        assert chat.tokenizer.decode(reply.tokens, skip_special=True) == reply.text
    assert chat.generate("the", schema=json.dumps(RECEIPT), max_tokens=120, seed=2, **WILD).text == reply.text


def test_a_class_gives_an_instance(chat: g3.Engine) -> None:
    assert isinstance(chat.generate("the", schema=Item, max_tokens=60, seed=1, **WILD).parsed, Item)
    basket = chat.generate("the", schema=Basket, max_tokens=60, seed=1, **WILD).parsed
    assert isinstance(basket, Basket) and isinstance(basket.paid, bool)


def test_an_answer_that_is_cut_off_says_so(chat: g3.Engine) -> None:
    reply = chat.generate("the", schema=RECEIPT, max_tokens=20, seed=1, **WILD)
    assert reply.finish_reason == "length" and reply.parsed is None and len(reply.tokens) == 20


def test_numbers_beyond_floats_are_whole_ones_or_refused() -> None:
    assert schema.parsed("[1e400, -1e-400, 0.5]") == [10**400, 0.0, 0.5]
    for number in ("1e5000", f"1e{9**30}"):
        with pytest.raises(ValueError, match="digits"):
            schema.parsed(number)


def test_choices_regexes_and_grammars(chat: g3.Engine) -> None:
    picked = {chat.generate("the", choices=["yes", "no"], seed=seed, **WILD).parsed for seed in range(12)}
    assert picked == {"yes", "no"}
    date = chat.generate("the", regex=r"[0-9]{4}/[0-9]{2}", seed=1, **WILD)
    assert date.finish_reason == "stop" and len(date.text) == 7 and date.text[4] == "/" and date.parsed == date.text
    assert set(chat.generate("the", grammar='start: "a" "b" | "c" start', seed=2, **WILD).text[-2:]) == {"a", "b"}


def test_free_text_may_come_first(chat: g3.Engine) -> None:
    reply = chat.generate("the", choices=["yes", "no"], free_first=7, max_tokens=40, seed=1, **WILD)
    before, fence, after = reply.text.partition("```json\n")
    assert fence and after == reply.parsed and after in ("yes", "no") and reply.finish_reason == "stop"
    assert chat.tokenizer.encode(before, special=False) and len(reply.tokens) <= 7 + 12 + 3


def test_what_is_forced_takes_fewer_passes_and_the_caches_hold_the_answer(
    engine: g3.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_gemma3.model.runner import Runner

    passes: list[int] = []
    step, read = Runner.step, Runner.read
    monkeypatch.setattr(Runner, "step", lambda *given: passes.append(1) or step(*given))
    monkeypatch.setattr(Runner, "read", lambda *given, **named: passes.append(2) or read(*given, **named))
    reply = engine.generate("a prompt of its own", schema=RECEIPT, max_tokens=150, seed=1, **WILD)
    assert len(passes) < 0.7 * len(reply.tokens)
    plain = engine.generate("a prompt of its own", schema=RECEIPT, max_tokens=150, seed=1, logprobs=0, **WILD)
    assert plain.logprobs is not None and len(plain.logprobs) == len(plain.tokens)  # each token is chosen
    session = engine.session()
    first = session.send("the", schema=RECEIPT, max_tokens=150, seed=4, **WILD).reply
    again = session.send("more", max_tokens=4, temperature=0).reply
    said = session.messages
    fresh = engine.session()
    assert fresh.send("the", schema=RECEIPT, max_tokens=150, seed=4, **WILD).reply.text == first.text
    engine._thread.call(lambda scheduler: fresh._conversation.timeline.caches.rewind(0))
    fresh._conversation.timeline.tokens = fresh._conversation.timeline.tokens.head(0)
    assert fresh.send("more", max_tokens=4, temperature=0).reply.tokens == again.tokens  # read anew: the same
    assert fresh.messages == said and session.retry(choices=["yes", "no"]).reply.text in ("yes", "no")


def test_eight_answers_of_eight_forms_are_each_what_they_are_alone(chat: g3.Engine) -> None:
    forms: list[dict[str, Any]] = [
        {"schema": RECEIPT}, {"choices": ["yes", "no"]}, {"regex": "[a-f]{9}"}, {"schema": Item},
        {"grammar": 'start: "long forced text indeed: " /[0-9]{3}/'}, {"schema": Basket, "temperature": 0}, {},
        {"schema": {"type": "array", "items": {"enum": ["first one", "second one"]}, "minItems": 2, "maxItems": 3}},
    ]  # fmt: skip
    asked = [{**WILD, "seed": n, "max_tokens": 60, "repetition_penalty": 1.1, **form} for n, form in enumerate(forms)]
    alone = [chat.generate(f"the {n}", **each).tokens for n, each in enumerate(asked)]
    streams = [chat.stream(f"the {n}", **each) for n, each in enumerate(asked)]
    assert [stream.reply.tokens for stream in streams] == alone
    replies = chat.generate("the", n=3, schema=RECEIPT, seed=1, max_tokens=120, **WILD)
    assert all(reply.parsed["paid_in_full"] in (True, False) for reply in replies)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schema": {"not": {"const": "a"}}}, "not"),
        ({"schema": {"properties": 3}}, "schema.properties: got 3, want an object of schemas"),
        ({"schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"schema": {"type": "object", "minProperties": 2}}, "minProperties"),
        ({"schema": {"multipleOf": 0.01}}, "multipleOf"),
        ({"schema": {"oneOf": [{"type": "string"}, {"minLength": 2}]}}, "oneOf"),
        ({"schema": {"$ref": "https://example.org/x"}}, "example.org"),
        ({"schema": {"type": "string", "format": "idn-email"}}, "idn-email"),
        ({"schema": {"const": "a\0b"}}, "control character"),
        ({"schema": "{"}, "JSON"),
        ({"schema": 3}, "schema"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"choices": [""]}, "choices"),
        ({"choices": ["a"], "regex": "a"}, "one of them"),
        ({"choices": ["a"], "stop": ["b"]}, "stop"),
        ({"free_first": 3}, "free_first"),
    ],
)
def test_what_cannot_be_promised_is_refused_by_name(engine: g3.Engine, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words) as error:
        engine.generate("the", max_tokens=1, **options)
    assert "\n" not in str(error.value) and "no_forcing" not in str(error.value)


def test_a_plain_answer_needs_no_llguidance(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with g3.load(text_folder) as engine:
        assert engine.generate("the", max_tokens=1).tokens
        with pytest.raises(OptionError, match=r"mlx-gemma3\[grammar\]"):
            engine.generate("the", choices=["yes"])

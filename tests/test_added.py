"""Added tokens in a text, against the two rounds of Hugging Face tokenizers done the slow way."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer import PARTS, naive_ids, small_json, write_json

from mlx_gemma3.errors import TokenizerError
from mlx_gemma3.prompt.added import touching
from mlx_gemma3.prompt.tokenizer import Tokenizer


def with_added(*tokens: tuple[str, bool, bool]) -> dict[str, Any]:
    """The small tokenizer.json with more tokens: (content, normalized, special), ids in their order."""
    values = small_json()
    for piece, normalized, special in tokens:
        entry = {"id": count(values), "content": piece, "single_word": False, "lstrip": False, "rstrip": False}
        values["added_tokens"].append({**entry, "normalized": normalized, "special": special})
    return values


def count(values: dict[str, Any]) -> int:
    known = {entry["content"] for entry in values["added_tokens"]}
    return len(known | values["model"]["vocab"].keys())


def slow_ids(text: str, values: dict[str, Any]) -> list[int]:
    """Tokens that match the text as written are cut out of all of it, then the normalized ones out of the rest."""
    ids = values["model"]["vocab"] | {entry["content"]: entry["id"] for entry in values["added_tokens"]}
    without = {**values, "added_tokens": []}
    rounds: list[dict[str, int]] = [{}, {}]  # what is looked for: the id
    for entry in values["added_tokens"]:
        piece = entry["content"]
        rounds[entry["normalized"]][piece.replace(" ", "\u2581") if entry["normalized"] else piece] = ids[piece]

    def look(text: str, number: int) -> list[int]:
        if number == 2:
            return naive_ids(text, without)
        text = text.replace(" ", "\u2581") if number else text
        result, start, at = [], 0, 0
        while at < len(text):
            name = max((name for name in rounds[number] if text.startswith(name, at)), key=len, default="")
            if name:
                result += [*look(text[start:at], number + 1), rounds[number][name]]
                start = at + len(name)
            at += max(1, len(name))
        return result + look(text[start:], number + 1)

    return look(text, 0)


PIECES = ["a", "b", "th", "he", " ", "\u2581", "<", ">", "\n", "<b>", "the", "x", "<unused0>", "  "]


@given(seed=st.integers(0, 10**9))
@example(seed=1222866)  # an added token is half of a piece
@settings(max_examples=60, deadline=None)
def test_as_in_two_rounds(seed: int) -> None:
    rng = random.Random(seed)
    base = {entry["content"] for entry in small_json()["added_tokens"]} | small_json()["model"]["vocab"].keys()
    names = {"".join(rng.choices(PIECES, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 4))} - base
    values = with_added(*((name, rng.random() < 0.6, False) for name in sorted(names)))
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer = Tokenizer.from_file(write_json(Path(folder), values))
        except TokenizerError as error:
            assert "no overlap" in str(error) or "two for the same text" in str(error)
            return
    for _ in range(20):
        text = "".join(rng.choices([*PIECES, *PARTS, *sorted(names) * 4], k=rng.randint(1, 14)))
        ids = tokenizer.encode(text)
        assert ids == slow_ids(text, values), text
        assert tokenizer.decode(ids).replace(" ", "\u2581") == text.replace(" ", "\u2581")


@pytest.mark.parametrize(
    ("piece", "normalized", "text", "found"),
    [
        ("<tool_call>", True, "a<tool_call>b", ["a", "<tool_call>", "b"]),
        ("<tool_call>", False, "a<tool_call>b", ["a", "<tool_call>", "b"]),
        ("the ab", True, "the ab", ["the ab"]),
        ("the ab", True, "the\u2581ab", ["the ab"]),
        ("the ab", False, "the ab", ["the ab"]),
        ("the ab", False, "the\u2581ab", ["the", "\u2581a", "b"]),
        ("the\u2581ab", False, "the ab", ["the", "\u2581a", "b"]),
        ("<t>\n", True, "<t>\n", ["<", "t", ">", "\n"]),  # "\n" was cut out in the first round
        ("<t>\n", False, "<t>\n", ["<t>\n"]),
    ],
)
def test_what_add_tokens_writes(piece: str, normalized: bool, text: str, found: list[str], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(write_json(tmp_path, with_added((piece, normalized, False))))
    ids = tokenizer.encode(text)
    assert [tokenizer.piece(token) for token in ids] == found
    assert tokenizer.piece(tokenizer.id(piece)) == piece
    assert tokenizer.decode([tokenizer.id(piece)]) == piece.replace("\u2581", " ")


def test_special_ones_are_control_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(write_json(tmp_path, with_added(("<tool_call>", False, True))))
    ids = tokenizer.encode("a<tool_call>")
    assert ids[-1] in tokenizer.special_ids and tokenizer.decode(ids, skip_special=True) == "a"
    assert tokenizer.decode(tokenizer.encode("<tool_call>", special=False), skip_special=True) == "<tool_call>"


def test_two_that_match_the_same_text(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="two for the same text"):
        Tokenizer.from_file(write_json(tmp_path, with_added(("x y", True, False), ("x\u2581y", True, False))))


def test_an_added_token_that_spaces_would_form_too(tmp_path: Path) -> None:
    values = small_json()
    entry = {"id": values["model"]["vocab"]["\u2581and"], "content": "\u2581and"}
    values["added_tokens"].append({**entry, "normalized": False, "special": False})
    with pytest.raises(TokenizerError, match="which spaces form too"):
        Tokenizer.from_file(write_json(tmp_path, values))


def test_what_shares_text() -> None:
    others = ["xa", "bx", "ab", "a", "xabx", "b a", "c", "\u2581", "ba"]
    assert touching(["ab"], others) == {"xa", "bx", "ab", "a", "xabx", "b a", "ba"}
    assert touching(["ab"], others, before=False) == {"xa", "ab", "a", "xabx", "b a", "ba"}
    assert touching(["a b"], ["\u2581", " b", "x"]) == {"\u2581", " b"}


def test_thousands_of_added_tokens_are_compared_or_refused_soon(tmp_path: Path) -> None:
    """Each shares text with each: pairs would take minutes."""
    for length, refused in ((12, False), (200, True)):
        names = [f"<{number:05}{'x' * length}{number % 7 * 'y'}>" for number in range(4000)]
        values = with_added()
        start = count(values)
        flags = {"single_word": False, "lstrip": False, "rstrip": False}
        values["added_tokens"] += [
            {"id": start + place, "content": name, **flags, "normalized": place % 2 == 0, "special": place % 3 == 0}
            for place, name in enumerate(names)
        ]
        began = time.process_time()
        try:
            tokenizer = Tokenizer.from_file(write_json(tmp_path, values))
        except TokenizerError as error:
            assert refused and "too many and long ones to compare" in str(error)
        else:
            assert not refused and tokenizer.encode(f"a{names[5]}b")[1] == start + 5
        assert time.process_time() - began < 4

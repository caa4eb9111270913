"""A hundred data files that cannot be learnt from: one sentence each, with the numbers of all lines that are wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_family
from PIL import Image

import mlx_gemma3 as g3
from mlx_gemma3.checkpoint.load import open_checkpoint
from mlx_gemma3.checkpoint.source import resolve
from mlx_gemma3.errors import DataError
from mlx_gemma3.tune.data import open_data
from mlx_gemma3.tune.run import _encoder as encoder
from mlx_gemma3.tune.settings import Settings

pytest.importorskip("mlx_lm")


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


GOOD: dict[str, Any] = {"messages": [user("What is this?"), said("a star")]}
SHOWN: dict[str, Any] = {**GOOD, "images": ["there.png"]}
PAIR: dict[str, Any] = {"prompt": "Which?", "chosen": "this", "rejected": "that"}


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


# A line that is wrong, and what the sentence must say. Lines 1 and 3 of each file are good.
WRONG: dict[str, tuple[Any, str]] = {
    # roles
    "role bot": (chat(user("Hi"), {"role": "bot", "content": "x"}), "role"),
    "role tool": (chat(user("Hi"), {"role": "tool", "content": "x"}), "role"),
    "role number": (chat(user("Hi"), {"role": 3, "content": "x"}), "role"),
    "no role": (chat(user("Hi"), {"content": "x"}), "role|last message"),
    "two users": (chat(user("Hi"), user("Hi"), said("x")), "alternate"),
    "two assistants": (chat(user("Hi"), said("x"), said("y")), "alternate"),
    "assistant first": (chat(said("x")), "alternate"),
    "system late": (chat(user("Hi"), {"role": "system", "content": "x"}, said("y")), "alternate"),
    "ends with user": (chat(user("Hi"), said("x"), user("And?")), "last message"),
    "only user": (chat(user("Hi")), "last message"),
    "only system": (chat({"role": "system", "content": "x"}), "last message"),
    "no messages": (chat(), "last message|empty"),
    "system picture": (chat({"role": "system", "content": [{"type": "image"}]}, user("a"), said("b")), "picture"),
    # messages that are none
    "messages text": ({"messages": "Hi"}, "messages"),
    "messages number": ({"messages": 7}, "messages"),
    "messages object": ({"messages": {"role": "user"}}, "messages"),
    "message text": (chat("Hi", said("x")), "message 1"),
    "message list": (chat(["user", "Hi"], said("x")), "message 1"),
    "message null": (chat(None, said("x")), "message 1"),
    "content number": (chat(user(3), said("x")), "content|Invalid"),
    "content missing": (chat({"role": "user"}, said("x")), "content"),
    "item number": (chat(user([3]), said("x")), "item 1"),
    "item audio": (chat(user([{"type": "audio", "audio": "a.wav"}]), said("x")), "audio"),
    "item video": (chat(user([{"type": "video"}]), said("x")), "video"),
    "item without type": (chat(user([{"words": "x"}]), said("x")), "no type"),
    "text item number": (chat(user([{"type": "text", "text": 3}]), said("x")), "text"),
    "thoughts": (chat(user("Hi"), {**said("x"), "reasoning_content": "Hm."}), "reasoning_content"),
    "thoughts by another name": (chat(user("Hi"), {**said("x"), "thinking": "Hm."}), "thinking"),
    "tool calls": (chat(user("Hi"), {**said("x"), "tool_calls": [{"name": "f"}]}), "tool_calls"),
    # answers
    "empty answer": (chat(user("Hi"), said("")), "no words"),
    "blank answer": (chat(user("Hi"), said(" \n ")), "no words"),
    "null answer": (chat(user("Hi"), said(None)), "content|no words"),
    "empty list": (chat(user("Hi"), said([])), "no words"),
    "empty item": (chat(user("Hi"), said([{"type": "text", "text": " "}])), "no words"),
    "first answer empty": (chat(user("Hi"), said(""), user("And?"), said("y")), "message 2"),
    "answer number": (chat(user("Hi"), said(7)), "no words"),
    "completion empty": ({"prompt": "Hi", "completion": ""}, "completion"),
    "completion blank": ({"prompt": "Hi", "completion": "  "}, "completion"),
    "completion number": ({"prompt": "Hi", "completion": 3}, "completion"),
    "completion list": ({"prompt": "Hi", "completion": ["a"]}, "completion"),
    "prompt number": ({"prompt": 3, "completion": "x"}, "prompt"),
    "prompt alone": ({"prompt": "Hi"}, "columns prompt"),
    "completion alone": ({"completion": "Hi"}, "columns completion"),
    "prompt null": ({"prompt": None, "completion": "x"}, "columns completion"),
    "text empty": ({"text": ""}, "no words"),
    "text number": ({"text": 3}, "text"),
    "text list": ({"text": ["a"]}, "text"),
    # columns
    "question answer": ({"question": "a", "answer": "b"}, "columns answer, question"),
    "instruction": ({"instruction": "a", "output": "b"}, "columns instruction, output"),
    "alpaca": ({"instruction": "a", "input": "b", "output": "c"}, "columns"),
    "conversations": ({"conversations": [{"from": "human", "value": "Hi"}]}, "columns conversations"),
    "label": ({"text": "a", "label": 1}, "columns label, text"),
    "tools": ({**GOOD, "tools": []}, "columns"),
    "empty object": ({}, "no columns"),
    "nulls": ({"messages": None, "text": None}, "no columns"),
    "two forms": ({**GOOD, "text": "x"}, "columns messages, text"),
    "three forms": ({**GOOD, "prompt": "x", "completion": "y"}, "columns"),
    "images alone": ({"images": ["there.png"]}, "columns images"),
    "wrong case": ({"Messages": GOOD["messages"]}, "columns Messages"),
    # rows that are no objects
    "list": ([1, 2], "list"),
    "text row": ("Hi", "str"),
    "number": (3, "int"),
    "null": (None, "NoneType"),
    "true": (True, "bool"),
    # pictures
    "no such picture": ({**GOOD, "images": ["gone.png"]}, "gone.png"),
    "one of two": ({**GOOD, "images": ["there.png", "gone.png"]}, "gone.png"),
    "no picture": ({**GOOD, "images": ["words.png"]}, "words.png"),
    "empty picture": ({**GOOD, "images": ["empty.png"]}, "empty.png"),
    "cut picture": ({**GOOD, "images": ["cut.png"]}, "cut.png"),
    "folder for a picture": ({**GOOD, "images": ["folder.png"]}, "folder"),
    "picture number": ({**GOOD, "images": [3]}, "int|picture"),
    "picture list": ({**GOOD, "images": [["there.png"]]}, "list|picture"),
    "images number": ({**GOOD, "images": 3}, "images"),
    "image and images": ({**SHOWN, "image": "there.png"}, "image"),
    "places without pictures": (chat(user([{"type": "image"}, {"type": "text", "text": "?"}]), said("x")), "pictures"),
    "two places, one picture": (
        chat(user([{"type": "image"}, {"type": "image"}]), said("x"), images=["there.png"]), "pictures",
    ),
    "picture in item gone": (chat(user([{"type": "image", "path": "gone.png"}]), said("x")), "gone.png"),
    "url in item gone": (chat(user([{"type": "image_url", "image_url": {"url": "gone.png"}}]), said("x")), "gone.png"),
    "image_url empty": (chat(user([{"type": "image_url"}]), said("x")), "image_url"),
    "ftp": ({**GOOD, "images": ["ftp://x.y/z.png"]}, "ftp"),
    "bad base64": ({**GOOD, "images": ["data:image/png;base64,!!!"]}, "data|picture|base64"),
    "picture and text's place": ({"text": "a <start_of_image> b"}, "pictures"),
    # length
    "too long": (chat(user("word " * 200), said("x")), "tokens"),
    "too long to begin": ({"prompt": "star " * 300, "completion": "x"}, "tokens"),
    # preferences
    "only chosen": ({"prompt": "Hi", "chosen": "x"}, "columns chosen, prompt"),
    "no prompt": ({"chosen": "x", "rejected": "y"}, "columns chosen, rejected"),
    "among others": (PAIR, "preferences"),
}  # fmt: skip
PAIRS: dict[str, tuple[Any, str]] = {
    "same": ({**PAIR, "rejected": "this"}, "same"),
    "chosen empty": ({**PAIR, "chosen": ""}, "no words"),
    "rejected number": ({**PAIR, "rejected": 3}, "rejected"),
    "rejected object": ({**PAIR, "rejected": {"role": "assistant"}}, "rejected"),
    "prompt list": ({**PAIR, "prompt": []}, "prompt"),
    "chosen by user": ({**PAIR, "chosen": [user("x")]}, "last message|alternate"),
}
RAW: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{messages: []}", "not JSON"),
    "cut JSON": (b'{"messages": [', "not JSON"),
    "not UTF-8": (b'{"text": "\xff\xfe"}', "UTF-8"),
    "latin": ('{"text": "été"}'.encode("latin-1"), "UTF-8"),
    "NaN": (b'{"text": NaN}', "NaN"),
    "surrogate": (b'{"text": "\\ud800"}', "surrogate"),
    "deep": (b'{"text": ' + b"[" * 100_000, "deep|not JSON"),
    "csv": (b"prompt,completion", "not JSON"),
    "nul": (b'{"text": "a\x00"}', "not JSON"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("data")
    Image.new("RGB", (64, 64), (255, 0, 0)).save(found / "there.png")
    whole = (found / "there.png").read_bytes()
    (found / "words.png").write_text("words", encoding="utf-8")
    (found / "empty.png").write_bytes(b"")
    (found / "cut.png").write_bytes(whole[: len(whole) // 2])
    (found / "folder.png").mkdir()
    return found


def lines() -> Iterator[tuple[str, bytes, bytes, str]]:
    """Name, a good line, the wrong one, what is said."""
    for name, (value, wanted) in WRONG.items():
        yield name, json.dumps(GOOD).encode(), json.dumps(value).encode(), wanted
    for name, (value, wanted) in PAIRS.items():
        yield f"pair: {name}", json.dumps(PAIR).encode(), json.dumps(value).encode(), wanted
    for name, (raw, wanted) in RAW.items():
        yield name, json.dumps(GOOD).encode(), raw, wanted


def refused(data: Path, out: Path) -> str:
    before = sorted(path.name for path in out.parent.iterdir())
    with pytest.raises(DataError) as caught:
        g3.tune("demo", data, out, max_length=128, steps=1)
    assert sorted(path.name for path in out.parent.iterdir()) == before, "nothing half written"
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1300
    return text


@pytest.mark.parametrize(("good", "wrong", "wanted"), [pytest.param(*one, id=name) for name, *one in lines()])
def test_a_wrong_line_is_named_with_its_number(folder: Path, good: bytes, wrong: bytes, wanted: str) -> None:
    import re

    data = folder / "train.jsonl"
    data.write_bytes(b"\n".join([good, wrong, good]) + b"\n")
    text = refused(data, folder / "out")
    assert "train.jsonl: 1 of 3 lines" in text and "line 2: " in text, text
    assert re.search(wanted, text.partition("line 2: ")[2]), text


def test_a_hundred_are_tried() -> None:
    assert len(list(lines())) + len(WHOLE) >= 100


def test_all_that_is_wrong_is_told_at_once(folder: Path) -> None:
    data = folder / "train.jsonl"
    empty, bot = json.dumps(WRONG["empty answer"][0]), json.dumps(WRONG["role bot"][0])
    rows = [json.dumps(GOOD), empty, "", empty, empty, bot, "{"]
    data.write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        g3.tune("demo", data, folder / "out")
    text = str(caught.value)
    assert "5 of 6 lines" in text and "lines 2, 4-5: message 2: got no words, want an answer" in text
    assert "line 6: message 2: role" in text and "line 7: not JSON" in text
    assert [problem.line for problem in caught.value.problems] == [2, 4, 5, 6, 7]


WHOLE: dict[str, tuple[str, bytes | None, str]] = {
    "gone": ("gone.jsonl", None, "no such file"),
    "empty": ("a.jsonl", b"", "empty file"),
    "blank": ("a.jsonl", b"\n \n", "empty file"),
    "another ending": ("a.csv", b"a,b", "want .jsonl"),
    "no ending": ("data", b"a,b", "want .jsonl"),
    "text not UTF-8": ("a.txt", b"words\n\xff", "line 2"),
    "JSON object": ("a.json", b'{"text": "x"}', "list of objects"),
    "JSON broken": ("a.json", b"[", "got"),
    "parquet": ("a.parquet", b"PAR1", "want .jsonl"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_is_none(tmp_path: Path, name: str) -> None:
    file, content, wanted = WHOLE[name]
    if content is not None:
        (tmp_path / file).write_bytes(content)
    assert wanted in refused(tmp_path / file, tmp_path / "out")


def test_folders_that_hold_nothing_to_learn(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert "no train.jsonl and no pictures" in refused(tmp_path / "data", tmp_path / "out")
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "b.png")
    (tmp_path / "data" / "b.txt").write_bytes(b"\xff")
    text = refused(tmp_path / "data", tmp_path / "out")
    assert "line 1: a.png has no a.txt beside it" in text and "line 2: b.txt: bytes that are not UTF-8" in text


def test_the_forms_that_are_read(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(" a square \n", encoding="utf-8")
    data, valid = open_data(tmp_path, prompt="What?")
    assert valid is None
    assert data.rows[0].values == {"prompt": "What?", "completion": "a square", "images": ["a.png"]}
    (tmp_path / "train.jsonl").write_text('\ufeff{"text": "x", "id": 3}\r\n\r\n{"text": "y"}', encoding="utf-8")
    (tmp_path / "valid.jsonl").write_text('{"text": "z"}', encoding="utf-8")
    data, valid = open_data(tmp_path)
    assert [row.line for row in data.rows] == [1, 3] and data.notes == ("columns that are not read: id",)
    assert valid is not None and valid.rows[0].values == {"text": "z"}


def test_a_checkpoint_with_a_template_of_its_own_learns_its_own_turns(tmp_path: Path) -> None:
    item = {"type": "text", "source_lang_code": "en", "target_lang_code": "de", "text": "the sea"}
    chats: dict[str, list[list[dict[str, Any]]]] = {
        "translategemma": [[user([item]), said(" das Meer")], [user([item]), said("a"), user([item]), said("b")]],
        "thinking": [[user("a"), said("b"), user("c"), said("d ")], [user("a"), user("b"), said("c")]],
    }
    for kind, (good, wrong) in chats.items():
        checkpoint = open_checkpoint(resolve(str(tiny_family.write(tmp_path / kind, kind))))
        tokenizer, template = checkpoint.tokenizer(), g3.ChatTemplate.from_folder(tmp_path / kind)
        data = tmp_path / "data.jsonl"
        data.write_text(json.dumps({"messages": good}), encoding="utf-8")
        encoded = encoder(checkpoint, Settings()).encode(open_data(data)[0], lambda pixels: "")
        (sample,) = encoded.items[0].samples
        read = tokenizer.encode(template.render(good[:-1]))  # what the model reads before its answer
        assert sample.tokens[: len(read)].tolist() == read
        answers = [message["content"].strip() for message in good if message["role"] == "assistant"]
        learnt = [token for text in answers for token in (*tokenizer.encode(text), tokenizer.id("<end_of_turn>"))]
        assert sample.tokens[sample.counts].tolist() == learnt and sample.counts[-1]
        data.write_text(json.dumps({"messages": wrong}), encoding="utf-8")
        told = "answers: got 2, .* make a line of each" if kind == "translategemma" else "two turns of user at 1"
        with pytest.raises(DataError, match=f"line 1: .*{told}"):
            g3.tune(tmp_path / kind, data, tmp_path / "out", steps=1)
    calls = [{"function": {"name": "look", "arguments": {}}}]
    data.write_text(json.dumps({"messages": [user("a"), {**said("b"), "tool_calls": calls}]}), encoding="utf-8")
    tiny_family.write(tmp_path / "functiongemma", "functiongemma")
    with pytest.raises(DataError, match="line 1: message 2: tool_calls"):
        g3.tune(tmp_path / "functiongemma", data, tmp_path / "out", steps=1)

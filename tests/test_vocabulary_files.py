"""A folder's files of a vocabulary: which of them decides, what is remembered of it, and files made to do harm."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_tokenizer import small_json, write_json

import mlx_gemma3.prompt.tokenizer as tokenizer_module
from mlx_gemma3.errors import TokenizerError
from mlx_gemma3.prompt.protobuf import varint
from mlx_gemma3.prompt.tokenizer import Tokenizer
from mlx_gemma3.prompt.vocabulary import read_vocabulary

# ---- which file decides ------------------------------------------------------------------------------------------


def renamed() -> dict[str, Any]:
    """`<unused0>` as a trainer's override of added tokens renames it, in both places of a tokenizer.json."""
    values = small_json()
    values["model"]["vocab"]["<think>"] = values["model"]["vocab"].pop("<unused0>")
    for entry in values["added_tokens"]:
        entry["content"] = entry["content"].replace("<unused0>", "<think>")
    return values


def stale_pair(folder: Path) -> Path:
    """A renamed tokenizer.json beside the old tokenizer.model."""
    old = read_vocabulary(write_json(folder, small_json()))
    (folder / "tokenizer.model").write_bytes(old.sentencepiece())
    write_json(folder, renamed())
    return folder


def test_tokenizer_json_decides_over_an_old_tokenizer_model(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(stale_pair(tmp_path))
    token = small_json()["model"]["vocab"]["<unused0>"]
    assert tokenizer.encode("<think>") == [token] and tokenizer.decode([token]) == "<think>"
    (tmp_path / "tokenizer.json").unlink()
    assert Tokenizer.from_folder(tmp_path).decode([token]) == "<unused0>"  # alone it is what there is


def test_a_token_renamed_in_half_of_the_file(tmp_path: Path) -> None:
    """tokenizers gives the new name a new id behind the last, of which no model knows: refused by both names."""
    values = renamed()
    values["model"]["vocab"] = small_json()["model"]["vocab"]
    with pytest.raises(TokenizerError, match=r"got \d+ for '<unused0>' and for '<think>'"):
        Tokenizer.from_file(write_json(tmp_path, values))


@pytest.mark.parametrize("make", [lambda path: path.write_bytes(b"{"), Path.mkdir, os.mkfifo])
def test_one_that_cannot_be_read_decides_too(make: Callable[[Path], object], tmp_path: Path) -> None:
    """The tokenizer.model beside it may say something else: an error, not another answer."""
    (stale_pair(tmp_path) / "tokenizer.json").unlink()
    make(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: got"):
        Tokenizer.from_folder(tmp_path)


# ---- what is remembered of a file --------------------------------------------------------------------------------


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read whole for their hash, and a cache of the test's own."""
    monkeypatch.setenv("MLX_GEMMA3_CACHE", str(tmp_path / "cache"))
    found: list[Path] = []
    real = tokenizer_module._content_key

    def counted(path: Path) -> str:
        found.append(path)
        return real(path)

    monkeypatch.setattr(tokenizer_module, "_content_key", counted)
    return found


def test_a_file_that_has_settled_is_not_read_at_each_start(
    tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_json(tmp_path, small_json())
    for _ in range(2):
        Tokenizer.from_file(path)
    assert len(hashed) == 2, "it might change again within the grain of its times"
    now = time.time_ns()
    monkeypatch.setattr(tokenizer_module.time, "time_ns", lambda: now + 10**10)
    for _ in range(3):
        tokenizer = Tokenizer.from_file(path)
    assert len(hashed) == 3 and tokenizer.piece(tokenizer.id("<unused0>")) == "<unused0>"
    [note] = (tmp_path / "cache" / "seen").iterdir()
    note.write_text("../../elsewhere")
    Tokenizer.from_file(path)
    assert len(hashed) == 4, "a damaged note is made again"

    before = path.stat()
    path.write_text(path.read_text().replace("<unused0>", "<unused9>"))  # of the same size, its old time set again
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert Tokenizer.from_file(path).id("<unused9>") == tokenizer.id("<unused0>")


def test_added_tokens_are_part_of_what_is_remembered(
    tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = read_vocabulary(write_json(tmp_path, small_json()))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(vocabulary.sentencepiece())
    now = time.time_ns()
    monkeypatch.setattr(tokenizer_module.time, "time_ns", lambda: now + 10**10)
    size = Tokenizer.from_file(path).vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": size}))
    assert Tokenizer.from_file(path).encode("<tool>") == [size]
    assert Tokenizer.from_file(path).encode("<tool>") == [size] and len(hashed) == 2


# ---- files made to do harm ---------------------------------------------------------------------------------------


def vocab(change: Callable[[dict[str, Any]], object]) -> bytes:
    values = small_json()
    change(values)
    return json.dumps(values).encode()


def longer(values: dict[str, Any], piece: str) -> None:
    values["model"]["vocab"][piece] = values["model"]["vocab"].pop("ing")


def many(count: int, length: int) -> Callable[[dict[str, Any]], None]:
    """Pieces of which every part is a piece."""

    def change(values: dict[str, Any]) -> None:
        pieces = values["model"]["vocab"]
        for number in range(count):
            pieces[f"{number:07}".ljust(length, "a")] = len(pieces)

    return change


HOSTILE_JSON: dict[str, bytes] = {
    "a piece of 2 MB": vocab(lambda values: longer(values, "y" * 2_000_000)),
    "a NUL": vocab(lambda values: longer(values, "a\0b")),
    "half a pair": vocab(lambda values: longer(values, "a\ud800b")),
    "too long together": vocab(many(20_000, 250)),
    "no pieces": vocab(lambda values: values.update(model={**values["model"], "vocab": {}}, added_tokens=[])),
    "ids of floats": vocab(lambda values: values["model"]["vocab"].update(ing=1.0)),
    "an id of 1e400": vocab(lambda values: None).replace(b'"ing": ', b'"ing": 1e400, "x": '),
    "deep": b'{"model": ' + b"[" * 200_000,
    "deep added tokens": b'{"added_tokens": ' + b"[" * 900 + b"]" * 900 + b"}",
    "content of a wrong type": vocab(lambda values: values["added_tokens"][0].update(content=["x"])),
    "an added token in a list": vocab(lambda values: values["added_tokens"].append("x")),
    "merges of one": vocab(lambda values: values["model"]["merges"].insert(0, ["the"])),
    "merges of three": vocab(lambda values: values["model"]["merges"].insert(0, ["t", "h", "e"])),
    "merges of numbers": vocab(lambda values: values["model"]["merges"].insert(0, [1, 2])),
    "merges as an object": vocab(lambda values: values["model"].update(merges={"a": "b"})),
    "merges as a number": vocab(lambda values: values["model"].update(merges=7)),
    "values of values": b"[" + b"[]," * 10_000_000 + b"[]]",
}


@pytest.mark.parametrize("kind", HOSTILE_JSON)
def test_a_hostile_tokenizer_json_is_one_sentence_soon(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(HOSTILE_JSON[kind])
    refused_soon(path)


def refused_soon(path: Path) -> None:
    began = time.process_time()
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_file(path)
    assert time.process_time() - began < 2
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def piece(text: bytes, more: bytes = b"") -> bytes:
    body = b"\x0a" + varint(len(text)) + text + more
    return b"\x0a" + varint(len(body)) + body


HOSTILE_MODELS: dict[str, bytes] = {
    "a number of 2 MB": b"\x0a" + b"\xff" * 2_000_000 + b"\1",
    "a piece of 2 MB": piece(b"y" * 2_000_000),
    "a NUL": piece(b"a\0b"),
    "half a pair": piece(b"\xed\xa0\x80"),
    "a kind that is a text": piece(b"x", b"\x1a\x01y"),
    "fields without end": b"\x20\x00" * 4_000_000,
    "a piece of many fields": b"\x0a" + varint(8_000_000) + b"\x20\x00" * 4_000_000,
    "settings twice": (b"\x12" + varint(100_000) + b"\x20\x00" * 50_000) * 50,
    "a map of characters that is a number": b"\x1a\x02\x10\x07",
    "a million pieces": b"".join(piece(b"%06d" % number) for number in range(1_000_000)),
    "scores that are no numbers": b"".join(piece(b"ab%d" % k, b"\x15\x00\x00\xc0\x7f") for k in range(9)),
}


@pytest.mark.parametrize("kind", HOSTILE_MODELS)
def test_a_hostile_tokenizer_model_is_one_sentence_soon(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(HOSTILE_MODELS[kind])
    refused_soon(path)


def test_sizes_beyond_any_vocabulary_are_not_read(tmp_path: Path) -> None:
    for name in ("tokenizer.model", "tokenizer.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)
        refused_soon(tmp_path / name)


HOSTILE_ADDED: dict[str, bytes] = {
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "an id of 1e400": b'{"x": 1e400}',
    "an id that is a text": b'{"<tool>": "7"}',
    "no id": b'{"<tool>": null}',
    "a NUL": b'{"a\\u0000": %d}',
    "an empty piece": b'{"": %d}',
    "many": json.dumps({f"t{number}": number for number in range(200_000)}).encode(),
}


@pytest.mark.parametrize("kind", HOSTILE_ADDED)
def test_hostile_added_tokens(kind: str, tmp_path: Path) -> None:
    vocabulary = read_vocabulary(write_json(tmp_path, small_json()))
    (tmp_path / "tokenizer.model").write_bytes(vocabulary.sentencepiece())
    (tmp_path / "added_tokens.json").write_bytes(
        HOSTILE_ADDED[kind].replace(b"%d", str(len(vocabulary.pieces)).encode())
    )
    refused_soon(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "added_tokens.json"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_only_regular_files_are_opened(make: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    vocabulary = read_vocabulary(write_json(tmp_path, small_json()))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(vocabulary.sentencepiece())
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(TokenizerError, match=r"got a (folder|pipe|device)"):
        Tokenizer.from_folder(tmp_path)

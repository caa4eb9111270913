"""Tokenizer files, damaged: a tokenizer that reads a text and is converted to the same one, or one sentence."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer

from mlx_gemma3.convert.tokenizer_files import tokenizer_json
from mlx_gemma3.prompt.vocabulary import read_vocabulary

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness
from mutate import mutate_bytes, mutate_json

ADDED = {"<tool_call>": 512, "a b": 513}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False}
# What a file is damaged beside: the vocabulary that stands in the folder with it.
BESIDE = {
    "tokenizer.json": (),
    "tokenizer.model": (),
    "added_tokens.json": ("tokenizer.model",),
    "tokenizer_config.json": ("tokenizer.json",),
    "special_tokens_map.json": ("tokenizer.model", "tokenizer.json"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file of a tokenizer to which two tokens were added."""
    folder = tiny_tokenizer.write_tokenizer(tmp_path_factory.mktemp("good"))
    values = json.loads(tokenizer_json(read_vocabulary(folder / "tokenizer.model")))
    for piece, token in ADDED.items():
        values["added_tokens"].append({"id": token, "content": piece, **FLAGS, "normalized": True, "special": False})
    decoder = {str(entry["id"]): {**FLAGS, "content": entry["content"]} for entry in values["added_tokens"][-20:]}
    for name, content in {
        "tokenizer.json": values,
        "added_tokens.json": ADDED,
        "tokenizer_config.json": {"added_tokens_decoder": decoder, "bos_token": "<bos>", "chat_template": "{{ 1 }}"},
        "special_tokens_map.json": {"bos_token": {**FLAGS, "content": "<bos>"}, "eos_token": "<eos>"},
    }.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def mutants(good: Path, place: Path, name: str, count: int) -> Iterator[Path]:
    beside = place / name
    beside.mkdir()
    (beside / "config.json").write_text(json.dumps(tiny.text_config(vocab_size=576)), encoding="utf-8")
    for other in BESIDE[name]:
        shutil.copy(good / other, beside)
    raw = (good / name).read_bytes()
    values = json.loads(raw) if name.endswith(".json") else None
    for number in range(count):
        rng, path = random.Random(number), place / f"{number}-{name}"
        if values is None:
            path.write_bytes(mutate_bytes(raw, rng, head=rng.choice((None, 300))))
        else:
            path.write_bytes(mutate_json(values, rng))
        yield path


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", BESIDE)
def test_a_hostile_file_of_a_tokenizer(good: Path, tmp_path: Path, name: str, count: int) -> None:
    outcome = harness.run("tokenizer", mutants(good, tmp_path, name, count))
    assert not outcome.faults, f"{len(outcome.faults)}: " + "\n".join(outcome.faults[:3])
    assert outcome.good + outcome.refused == count
    assert outcome.good, "what does no harm"

"""GGUF as people have it: in parts, without a name, both parts in one file, with other files beside it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import tiny_gguf
import tiny_tokenizer
from places import PICTURES, TEMPLATE
from test_gguf import WIDE, same_parameters

import mlx_gemma3 as g3
from mlx_gemma3.boundary.gguf_header import GGUFHeader
from mlx_gemma3.checkpoint.load import load_model, open_checkpoint
from mlx_gemma3.checkpoint.source import resolve
from mlx_gemma3.errors import CheckpointError, Gemma3Error, PromptError, SourceError

IMAGE, PICTURE = tiny.image_config(), PICTURES / "heart.png"
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0}


def write(path: Path, config: Mapping[str, Any] = IMAGE, **settings: Any) -> Path:
    """A text part with a vocabulary and a template."""
    vocabulary = tiny_gguf.vocabulary_settings(tiny_tokenizer.pieces())
    template = json.loads(TEMPLATE.read_text())["chat_template"]
    said = vocabulary | {"tokenizer.chat_template": template} | settings
    return tiny_gguf.write_gguf(path, config, tiny.random_tensors(config), kind="F16", settings=said)


def test_dequantised_it_loses_nothing(tmp_path: Path) -> None:
    """Types that can only be packed anew are written as the file's own numbers."""
    vocabulary = tiny_gguf.vocabulary_settings(tiny_tokenizer.pieces())
    tensors = tiny.random_tensors(WIDE)
    path = tiny_gguf.write_gguf(tmp_path / "q6.gguf", WIDE, tensors, kind="Q6_K", settings=vocabulary)
    report = g3.convert(path, tmp_path / "plain", dequantize=True, dtype="float32")
    same_parameters(load_model(tmp_path / "plain", dtype="float32"), tiny_gguf.gguf_floats(tensors, "Q6_K"))
    assert not report.repacked


def answer(path: Path, *images: Path) -> list[int]:
    with g3.load(path, text_only=not images) as engine:
        return engine.generate("the user", images=images, **GREEDY).tokens


@pytest.mark.parametrize("empty_first", [False, True])
def test_a_split_model_is_read_whole_by_any_of_its_parts(empty_first: bool, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf")
    want = answer(whole)
    parts = tiny_gguf.split(whole, tmp_path / "parts", 3, empty_first=empty_first)
    assert [answer(path) for path in (*parts, parts[0].parent)] == [want] * (len(parts) + 1)
    g3.convert(parts[1], tmp_path / "packed")
    assert answer(tmp_path / "packed") == want
    tiny_gguf.write_mmproj(tmp_path / "parts" / "mmproj.gguf", IMAGE, tiny.random_tensors(IMAGE))
    assert answer(parts[0], PICTURE) != want
    parts[1].unlink()
    for place in (parts[0], parts[2], parts[0].parent):
        with pytest.raises(CheckpointError, match=r"-00002-of-0000\d\.gguf"):
            answer(place)
    with pytest.raises(CheckpointError):
        g3.convert(parts[0], tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_parts_of_two_models_are_told_apart(tmp_path: Path) -> None:
    one, two = (tiny_gguf.split(write(tmp_path / f"{n}.gguf"), tmp_path / f"{n}", 2 + n) for n in range(2))
    shutil.copy(two[2], one[1])
    with pytest.raises(CheckpointError, match="part 3 of 3, want part 2 of 2"):
        GGUFHeader.read_whole(one[0])
    renamed = shutil.copy(one[0], tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="a part of a model in 2 files"):
        open_checkpoint(resolve(renamed))


def test_a_file_without_a_suffix_is_known_by_its_signature(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    blob = path.rename(tmp_path / "sha256-00aa")
    with g3.load(blob) as engine:
        assert engine.about["instruct"] and engine.generate("the", **GREEDY).tokens
    (tmp_path / "notes.xyz").write_bytes(b"something else")
    with pytest.raises(SourceError):
        g3.load(tmp_path / "notes.xyz")
    bare = write(tmp_path / "bare.gguf", **{"tokenizer.chat_template": None}).rename(tmp_path / "sha256-00bb")
    (note,) = open_checkpoint(resolve(bare)).notes
    assert "holds no chat template" in note and "-it" in note


def test_one_file_with_both_parts_as_ollama_writes_it(tmp_path: Path) -> None:
    tensors = tiny.random_tensors(IMAGE)
    two = write(tmp_path / "two" / "model.gguf")
    tiny_gguf.write_mmproj(tmp_path / "two" / "mmproj.gguf", IMAGE, tensors, kind="F16")
    one = tiny_gguf.write_ollama(two, tmp_path / "one" / "sha256-00", IMAGE, tensors)
    assert answer(one) == answer(two) and answer(one, PICTURE) == answer(two, PICTURE)
    g3.convert(one, tmp_path / "packed")
    assert answer(tmp_path / "packed", PICTURE) == answer(one, PICTURE)
    g3.convert(one, tmp_path / "text", text_only=True)
    assert answer(tmp_path / "text") == answer(one)


def test_other_files_beside_a_model(tmp_path: Path) -> None:
    path = write(tmp_path / "gemma.gguf")
    for kind in ("imatrix", "adapter"):
        tensors = {"language_model.norm.weight": np.ones(64, np.float32)}
        tiny_gguf.write_gguf_file(tmp_path / f"{kind}.gguf", "gemma3", {"general.type": kind}, tensors, "F32")
    os.mkfifo(tmp_path / "mmproj-pipe.gguf")
    assert answer(tmp_path) == answer(path)
    wider = tiny.image_config(hidden_size=96)
    tiny_gguf.write_mmproj(tmp_path / "vision.gguf", wider, tiny.random_tensors(wider))
    with g3.load(path) as engine, pytest.raises(PromptError, match=r"vision\.gguf is the vision part of another model"):
        engine.generate("what", images=[PICTURE])
    (tmp_path / "mmproj-a.gguf").write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError, match="mmproj-a"):
        g3.load(path)
    assert answer(path)  # words need no vision part
    tiny_gguf.write_mmproj(tmp_path / "any-name.gguf", IMAGE, tiny.random_tensors(IMAGE))
    assert answer(path, PICTURE)


def test_a_large_model_without_its_vision_part_says_what_to_do(tmp_path: Path) -> None:
    config = tiny.text_config(num_hidden_layers=34)
    with g3.load(write(tmp_path / "gemma-3-4b-it.gguf", config)) as engine, pytest.raises(PromptError, match="mmproj"):
        engine.generate("what", images=[PICTURE])


def test_a_vocabulary_of_another_kind_gets_advice(tmp_path: Path) -> None:
    with pytest.raises(Gemma3Error, match=r"take another GGUF file of the model, its safetensors, or convert it again"):
        answer(write(tmp_path / "model.gguf", **{"tokenizer.ggml.model": "gpt2"}))


def damaged(path: Path, change: Any) -> Path:
    raw = bytearray(path.read_bytes())
    change(raw)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("at", [8, 16], ids=["tensors", "settings"])
def test_counts_that_no_file_has_are_refused_at_once(at: int, tmp_path: Path) -> None:
    def change(raw: bytearray) -> None:
        raw[at : at + 8] = (2**62).to_bytes(8, "little")

    with pytest.raises(CheckpointError, match="at most"):
        GGUFHeader.read(damaged(write(tmp_path / "model.gguf"), change))


def test_tensors_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    header = GGUFHeader.read(path)
    first, second = header.tensors[3], header.tensors[4]
    base = header.files[0][1]

    def change(raw: bytearray) -> None:
        entry = raw.index((second.offset - base).to_bytes(8, "little"), raw.index(second.name.encode()))
        raw[entry : entry + 8] = (first.offset - base).to_bytes(8, "little")

    with pytest.raises(CheckpointError, match=f"{second.name}|{first.name}"):
        answer(damaged(path, change))


def test_lists_in_lists_and_values_twice(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma3")
    writer.add_array("a.list", [[1, 2], [3]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"a\.list: got lists in a list"):
        GGUFHeader.read(tmp_path / "model.gguf")

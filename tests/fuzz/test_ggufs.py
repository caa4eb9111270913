"""GGUF files, damaged: text, vision part, parts of a split model, both in one file: an answer, or one sentence."""

from __future__ import annotations

import json
import random
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import tiny_gguf
import tiny_tokenizer
from places import TEMPLATE

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness
from mutate import mutate_bytes

from mlx_gemma3.boundary.gguf_header import GGUFHeader

IMAGE = tiny.image_config()
COUNTS = pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
TYPES = (0, 4, 5, 6, 7, 8, 9, 10, 12, 13, 255)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """By kind, the files of a model; the last is the one that is damaged."""
    folder, tensors = tmp_path_factory.mktemp("gguf"), tiny.random_tensors(IMAGE)
    settings = tiny_gguf.vocabulary_settings(tiny_tokenizer.pieces())
    settings["tokenizer.chat_template"] = json.loads(TEMPLATE.read_text())["chat_template"]
    text = tiny_gguf.write_gguf(folder / "model.gguf", IMAGE, tensors, kind="Q8_0", settings=settings)
    vision = tiny_gguf.write_mmproj(folder / "mmproj-model.gguf", IMAGE, tensors, kind="F16")
    one = tiny_gguf.write_ollama(text, folder / "one.gguf", IMAGE, tensors)
    return {
        "text": [text],
        "mmproj": [text, vision],
        "split": tiny_gguf.split(text, folder / "parts", 2),
        "one": [one],
    }


def spoiled(path: Path, rng: random.Random) -> bytes:
    """Bytes changed in the header's first part, in the vocabulary or the directory of tensors, or a setting's type."""
    raw = bytearray(path.read_bytes())
    base = GGUFHeader.read(path).files[0][1]
    if rng.random() < 0.3:  # a setting: its type, or its value
        places = [at for at in range(24, min(base, 6000)) if raw[at : at + 8] in _LENGTHS]
        at = rng.choice(places or [24])
        length = int.from_bytes(raw[at : at + 8], "little")
        kind = at + 8 + min(length, 60)
        raw[kind : kind + 4] = struct.pack("<I", rng.choice(TYPES))
        return bytes(raw)
    head = rng.choice((64, 2000, base, base))
    if head == base and rng.random() < 0.5:  # the directory stands at the header's end
        start = max(24, base - 8000)
        return bytes(raw[:start]) + mutate_bytes(bytes(raw[start:]), rng, head=base - start)
    return mutate_bytes(bytes(raw), rng, head=head)


_LENGTHS = [length.to_bytes(8, "little") for length in range(10, 60)]


def mutants(files: list[Path], out: Path, count: int) -> Iterator[Path]:
    for number in range(count):
        folder = out / f"{number}"
        folder.mkdir()
        for path in files[:-1]:
            (folder / path.name).symlink_to(path)
        (folder / files[-1].name).write_bytes(spoiled(files[-1], random.Random(number)))
        yield folder / files[0].name


@COUNTS
@pytest.mark.parametrize("kind", ["text", "mmproj", "split", "one"])
def test_a_hostile_gguf_file_is_read_or_refused_in_one_sentence(
    seeds: dict[str, list[Path]], tmp_path: Path, count: int, kind: str
) -> None:
    outcome = harness.run("checkpoint", mutants(seeds[kind], tmp_path, count))
    assert not outcome.faults, f"{len(outcome.faults)}: " + "\n".join(one[:600] for one in outcome.faults[:3])
    assert outcome.refused > count // 10 and outcome.good > 0

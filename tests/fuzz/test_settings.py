"""config.json, generation_config.json, safetensors and their index, damaged: a model that answers, or one sentence."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny
import tiny_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness
from mutate import mutate_bytes, mutate_json

INDEX = "model.safetensors.index.json"
Make = Callable[[random.Random], tuple[str, bytes]]
COUNTS = pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])


def packed_folder(folder: Path) -> Path:
    config = tiny.text_config()
    how = {"bits": 4, "group_size": 32, "language_model.layers.1.mlp.down_proj": {"bits": 8, "group_size": 64}}
    packed, _ = tiny.pack(tiny.random_tensors(config), how)
    tiny.write_folder(folder, config, packed, style="text", packing=how, shards=2)
    tiny_tokenizer.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def seeds(chat_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders with a tower, of text alone, and packed in two shards."""
    return [chat_folder, text_folder, packed_folder(tmp_path_factory.mktemp("packed") / "packed")]


def mutants(seeds: list[Path], out: Path, count: int, make: Callable[[Path, random.Random], Any]) -> Iterator[Path]:
    """Folders of links to a good one, one file of which is another."""
    for number in range(count):
        rng = random.Random(number)
        seed = rng.choice(seeds)
        name, raw = make(seed, rng)
        folder = out / f"{number}"
        folder.mkdir()
        for path in seed.iterdir():
            if path.name != name:
                (folder / path.name).symlink_to(path)
        (folder / name).write_bytes(raw)
        yield folder


def config(seed: Path, rng: random.Random) -> tuple[str, bytes]:
    return "config.json", mutate_json(json.loads((seed / "config.json").read_text()), rng)


def generation(seed: Path, rng: random.Random) -> tuple[str, bytes]:
    values = json.loads((seed / "generation_config.json").read_text())
    values |= {"temperature": 0.7, "top_p": 0.9, "min_p": 0.0, "repetition_penalty": 1.1}
    return "generation_config.json", mutate_json(values, rng)


def index(seed: Path, rng: random.Random) -> tuple[str, bytes]:
    shards = sorted(seed.glob("model*.safetensors"))
    names = {name: path.name for path in shards for name in mx.load(str(path))}
    return INDEX, mutate_json({"metadata": {"total_size": 0}, "weight_map": names}, rng)


def safetensors(seed: Path, rng: random.Random) -> tuple[str, bytes]:
    path = rng.choice(sorted(seed.glob("model*.safetensors")))
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if rng.random() < 0.3:
        return path.name, mutate_bytes(raw, rng, head=rng.choice((16, 8 + length)))
    head = mutate_json(json.loads(raw[8 : 8 + length]), rng)
    return path.name, len(head).to_bytes(8, "little") + head + raw[8 + length :]


@COUNTS
@pytest.mark.parametrize("make", [config, generation, index, safetensors], ids=lambda make: make.__name__)
def test_a_hostile_file_of_a_checkpoint_is_read_or_refused_in_one_sentence(
    seeds: list[Path], tmp_path: Path, count: int, make: Callable[[Path, random.Random], Any]
) -> None:
    outcome = harness.run("checkpoint", mutants(seeds, tmp_path, count, make))
    assert not outcome.faults, f"{len(outcome.faults)}: " + "\n".join(outcome.faults[:3])
    assert outcome.refused > count // 10 and outcome.good > count // 50

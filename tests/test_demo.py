"""The built-in checkpoint sees: right on pictures it never saw, and wrong without them."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from xml.etree import ElementTree

import mlx.core as mx
import numpy as np
import pytest

import mlx_gemma3 as g3
from examples.demo_model import accuracy, draw, other_hand, pictures, plot
from examples.demo_model.batches import ROWS, Writer, hard_batch, joint_batch
from examples.demo_model.questions import KINDS, Sample, sample
from examples.demo_model.vocabulary import demo_vocabulary
from mlx_gemma3.checkpoint.source import resolve

FOLDER = resolve("demo").path
MEGABYTE = 1 << 20
FRESH = 36  # four of each kind; their seed is no training seed


@pytest.fixture(scope="module")
def engine() -> Iterator[g3.Engine]:
    with g3.load("demo") as engine:
        yield engine


@pytest.fixture(scope="module")
def fresh() -> list[Sample]:
    return list(sample(11, FRESH))


@pytest.fixture(scope="module")
def given(engine: g3.Engine, fresh: list[Sample]) -> list[str]:
    return accuracy.answers(engine, fresh)


def test_the_pictures_of_the_examples_are_answered_rightly(engine: g3.Engine) -> None:
    samples = accuracy.read(pictures.FOLDER)
    assert {one.question.kind for one in samples} == set(KINDS)
    right = [one.question.answer for one in samples]
    assert accuracy.answers(engine, samples) == right


def test_fresh_pictures_are_answered_rightly(fresh: list[Sample], given: list[str]) -> None:
    assert accuracy.share(fresh, given) >= 0.9


def test_pictures_by_another_hand_are_answered_rightly(engine: g3.Engine) -> None:
    samples = list(other_hand.other_samples(5, FRESH))
    assert accuracy.share(samples, accuracy.answers(engine, samples)) >= 0.8


def test_another_picture_gives_another_answer(engine: g3.Engine, fresh: list[Sample], given: list[str]) -> None:
    assert accuracy.changed(engine, fresh, given) >= 0.5


def test_without_the_pictures_rows_it_only_guesses(fresh: list[Sample]) -> None:
    with accuracy.without_rows(), g3.load("demo") as blind:  # an engine of its own: the other one keeps rows
        assert accuracy.share(fresh, accuracy.answers(blind, fresh)) <= accuracy.guessing(fresh) + 0.05


def logits_of(samples: list[Sample]) -> mx.array:
    """(tokens, V): what the model says after each token of questions and right answers."""
    model, tokenizer = g3.load_model("demo", dtype="float32"), g3.Tokenizer.from_folder(FOLDER)
    processor, writer = g3.Processor(tokenizer, model.config), Writer(tokenizer)
    found = []
    for one in samples:
        count = len(one.pictures)
        prompt = processor.prepare(accuracy.messages(one.question, count), list(one.pictures), special=False)
        branch, _ = writer.branch(one.question, count)
        found.append(model([[*writer.prefix(count), *branch]], prompt.pixels)[0, -len(branch) :])
    return mx.concatenate(found)


def test_causal_attention_inside_a_picture_is_noticed(fresh: list[Sample]) -> None:
    samples = [one for one in fresh if one.pictures][:9]
    seeing = logits_of(samples)
    with accuracy.causal_pictures():
        change = mx.abs(logits_of(samples) - seeing)
    assert change.mean().item() > 0.1  # measured: 0.34, of logits that spread by 6.4


def test_the_first_command_of_the_readme() -> None:
    root = Path(__file__).parent.parent
    readme = (root / "README.md").read_text("utf-8")
    _, _, first = readme.partition("```shell\n")[2].partition(".venv/bin/mlx-gemma3 ")
    command = [sys.executable, "-m", "mlx_gemma3.cli", *shlex.split(first.partition("\n")[0])]
    assert command[3:6] == ["generate", "-m", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout.strip()) == (0, "3")


def test_the_checkpoint_is_small_packed_and_crosses_its_window(fresh: list[Sample]) -> None:
    config = json.loads((FOLDER / "config.json").read_text("utf-8"))
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8 * MEGABYTE
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (8, 64)
    assert config["text_config"]["num_hidden_layers"] > config["text_config"]["sliding_window_pattern"] - 1
    writer = Writer(g3.Tokenizer.from_folder(FOLDER))
    lengths = [len(writer.prompt(one.question, len(one.pictures))) for one in fresh]
    assert max(lengths) > config["text_config"]["sliding_window"]


def test_training_saw_the_ids_that_the_processor_makes(fresh: list[Sample]) -> None:
    tokenizer = g3.Tokenizer.from_folder(FOLDER)
    processor, writer = g3.Processor(tokenizer, g3.Config.from_file(FOLDER / "config.json")), Writer(tokenizer)
    for one in fresh:
        chat = accuracy.messages(one.question, len(one.pictures))
        prompt = processor.prepare(chat, list(one.pictures), special=False)
        assert writer.prompt(one.question, len(one.pictures)) == prompt.tokens
        branch, wanted = writer.branch(one.question, len(one.pictures))
        whole = [*writer.prefix(len(one.pictures)), *branch]
        answer = [*tokenizer.encode(one.question.answer, special=False), tokenizer.id("<end_of_turn>")]
        assert whole == [*prompt.tokens, *answer]
        assert wanted[-len(answer) - 1 :] == [*answer, -1]


@pytest.mark.parametrize("make", [joint_batch, hard_batch])
def test_the_same_seed_gives_the_same_batch(make: Callable[..., dict[str, np.ndarray]]) -> None:
    writer = Writer(g3.Tokenizer.from_folder(FOLDER))
    one, same = (make(Random(3), writer, 16, ("",)) for _ in range(2))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert len(one["image_at"]) == ROWS * len(one["pixels"])  # every picture has its place


def test_a_branch_of_a_full_text_row_is_a_whole_prompt() -> None:
    tokenizer = g3.Tokenizer.from_folder(FOLDER)
    batch = hard_batch(Random(3), Writer(tokenizer), 1, ("",))
    tokens, branches, positions = (batch[name][0] for name in ("tokens", "branches", "positions"))
    assert branches.max() == len(batch["pixels"]) >= 3
    for number in range(1, branches.max() + 1):
        mine = branches == number
        assert tokenizer.decode(tokens[mine].tolist()).startswith("<bos><start_of_turn>user\n")
        assert positions[mine].tolist() == list(range(mine.sum()))


def test_the_plot_holds_every_phase() -> None:
    picture = plot.draw([("vision", 25, 5.0, 0.1), ("vision", 50, 2.0, 0.4), ("joint", 25, 0.5, 0.9)])
    assert {"vision, 50 steps", "joint, 25 steps"} <= {node.text for node in ElementTree.fromstring(picture).iter()}


def test_the_tokenizer_is_what_the_script_makes() -> None:
    tokenizer = g3.Tokenizer.from_folder(FOLDER)
    pieces = demo_vocabulary().pieces
    assert tokenizer.vocab_size == len(pieces)
    assert all(tokenizer.id(piece) == number for number, piece in enumerate(pieces))


def test_draw_writes_pictures_and_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["draw", "--seed", "3", "--count", "18", "--out", str(tmp_path)])
    draw.main()
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 18 and {row["kind"] for row in rows} == set(KINDS)
    assert all({"images", "question", "answer", "kind", "language"} <= row.keys() for row in rows)
    assert [len(one.pictures) for one in accuracy.read(tmp_path)] == [len(row["images"]) for row in rows]

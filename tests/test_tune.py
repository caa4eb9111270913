"""Training: what counts, what is gone on with, what an adapter says wherever it is loaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
import tiny

import mlx_gemma3 as g3
from examples.demo_model import hexagons, questions
from mlx_gemma3.checkpoint.load import load_model, open_checkpoint
from mlx_gemma3.checkpoint.memory import Machine
from mlx_gemma3.checkpoint.source import resolve
from mlx_gemma3.errors import Gemma3Error, MemoryNeedError, OptionError, OutputError
from mlx_gemma3.tune import batches, encoding, run
from mlx_gemma3.tune.data import Data, Row

pytest.importorskip("mlx_lm")
QUICK: dict[str, Any] = {"rank": 2, "batch_size": 3, "learning_rate": 1e-2, "examples": 1, "steps": 4}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with patch.dict(os.environ, {"MLX_GEMMA3_CACHE": str(tmp_path_factory.mktemp("cache"))}):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hexagons, and what the demo knows: one and two pictures, and none in the answer."""
    folder = tmp_path_factory.mktemp("hexagons")
    hexagons.write(folder, seed=3, new=12, old=18)
    return folder


def rows(out: Path) -> list[tuple[str, ...]]:
    """losses.csv without its times."""
    return [tuple(line.split(",")[:5]) for line in (out / "losses.csv").read_text("utf-8").splitlines()]


def test_a_training_that_was_stopped_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "steps": 6, "eval_every": 2, "accumulate": 2}
    whole = g3.tune("demo", data, tmp_path / "whole", **settings)
    done = 0

    def stop() -> bool:
        nonlocal done
        done += 1
        return done == 3

    first = g3.tune("demo", data, tmp_path / "parts", stop=stop, **settings)
    assert (first.ended, first.steps) == ("stopped", 3) and (tmp_path / "parts" / "state.safetensors").exists()
    with pytest.raises(OutputError, match="--resume"):
        g3.tune("demo", data, tmp_path / "parts", **settings)
    with pytest.raises(OptionError, match="learning_rate of the training"):
        g3.tune("demo", data, tmp_path / "parts", resume=True, **{**settings, "learning_rate": 1e-3})
    second = g3.tune("demo", data, tmp_path / "parts", resume=True, **settings)
    assert (second.ended, second.steps, second.best_step) == ("done", 6, whole.best_step)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    for name in ("adapter_model.safetensors", "last/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert not (tmp_path / "parts" / "state.safetensors").exists()


@pytest.mark.slow
def test_one_that_was_killed_goes_on_with_the_same_losses(data: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = "--rank 2 --batch-size 3 --steps 8 --save-every 2 --examples 0 --learning-rate 0.01 --json".split()
    command = [sys.executable, "-m", "mlx_gemma3.cli", "tune", "-m", "demo", "--data", str(data), *flags, "--out"]
    subprocess.run([*command, str(whole)], check=True, capture_output=True, timeout=120)
    with subprocess.Popen([*command, str(cut)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["kind"] == "step" and event["step"] == 5:
                process.send_signal(signal.SIGKILL)
                break
    done = subprocess.run([*command, str(cut), "--resume"], check=True, capture_output=True, text=True, timeout=120)
    steps = [json.loads(line)["step"] for line in done.stdout.splitlines() if '"kind": "step"' in line]
    assert steps[0] in (3, 5, 7) and steps[-1] == 8
    assert rows(whole) == rows(cut)


@pytest.mark.parametrize("how", [
    {},
    {"projector": True},
    pytest.param({"kind": "dora", "tower": True}, marks=pytest.mark.slow),
    pytest.param({"projector": True, "tower": True}, marks=pytest.mark.slow),
])  # fmt: skip
def test_an_adapter_says_the_same_at_run_time_and_melted_in(data: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    kept: list[run.Training] = []

    class Kept(run.Training):
        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **more)
            kept.append(self)

    with patch.object(run, "Training", Kept):
        report = g3.tune("demo", data / "train.jsonl", tmp_path / "out", **how, **QUICK)
    assert report.loss < 12 and report.bytes == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    plain = g3.convert("demo", tmp_path / "plain", dequantize=True, dtype="float32")
    melted = g3.convert(
        tmp_path / "plain", tmp_path / "melted", adapter=tmp_path / "out", dequantize=True, dtype="float32"
    )
    assert plain.out and melted.out
    training = kept[0]
    item = training.items[0]
    before, _ = encoding.prompt_of(item.samples[0])
    (pixels,) = training.pictures._again(item)
    wanted = run_greedy(training, item)
    models = [
        load_model("demo", adapter=tmp_path / "out"),
        load_model(tmp_path / "melted", dtype="float32"),
    ]
    trained = training.trainee.next_logits(*prompt_rows(training, item))
    for model in models:
        logits = model(before.tokens[None], pixels[None], last_only=True)[0, 0]
        assert mx.abs(logits - trained).max().item() < 2e-3
    samples = [*hexagons.fresh(5, 3), *questions.sample(5, 9)]
    with (
        g3.load("demo", adapters={"a": tmp_path / "out"}) as beside,
        g3.load(tmp_path / "melted", dtype="float32") as within,
    ):
        from examples.demo_model.accuracy import answers

        assert answers(beside, samples, adapter="a") == answers(within, samples)
        content = [{"type": "image"}, *item.row.values["messages"][0]["content"]]
        asked = [{"role": "user", "content": content}]
        reply = beside.generate(asked, images=[image(item)], adapter="a", max_tokens=8, temperature=0.0)
    assert list(reply.tokens)[: len(wanted)] == wanted


def image(item: encoding.Item) -> Path:
    return item.row.folder / item.row.values["images"][0]


def prompt_rows(training: run.Training, item: encoding.Item) -> tuple[mx.array, mx.array | None, Any]:
    before, _ = encoding.prompt_of(item.samples[0])
    caches = training.trainee.model.make_caches()
    features = training.pictures.rows([item], [before])
    return *training.trainee.embed(before.tokens[None], features, caches, before.spans), caches


def run_greedy(training: run.Training, item: encoding.Item) -> list[int]:
    from mlx_gemma3.tune.training import greedy

    before, _ = encoding.prompt_of(item.samples[0])
    return greedy(training.trainee, before, training.pictures.rows([item], [before]), 8)


def text_folder(folder: Path) -> Path:
    """A tiny model that reads no pictures, with the demo's vocabulary."""
    demo = resolve("demo", quiet=True).path
    config = tiny.text_config(vocab_size=1201, eos_token_id=[1, 5], architectures=["Gemma3ForCausalLM"])
    tiny.write_folder(folder, config, tiny.random_tensors(config), style="text")
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo / name).read_bytes())
    return folder


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.filterwarnings("ignore")  # of transformers, which mlx-lm imports
def test_mlx_lm_says_the_same_with_its_form(tmp_path: Path, kind: str) -> None:
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model as their_load

    folder = text_folder(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"prompt": "What is this?", "completion": "a red star"}\n' * 6, "utf-8")
    g3.tune(folder, tmp_path / "data.jsonl", tmp_path / "out", kind=kind, layers=3, form="mlx-lm", **QUICK)
    theirs, _ = their_load(folder)
    load_adapters(theirs, str(tmp_path / "out"))
    ours = load_model(folder, dtype="float32", adapter=tmp_path / "out")
    plain = load_model(folder, dtype="float32")
    tokens = np.arange(20, 32)[None]
    found = ours(tokens)
    assert mx.abs(found - plain(tokens)).max().item() > 0.1
    assert mx.abs(found - theirs(mx.array(tokens))).max().item() < 1e-3
    ids = tokens.tolist()[0]
    for _ in range(8):
        logits = [model(np.array([ids]) if model is ours else mx.array([ids]))[0, -1] for model in (ours, theirs)]
        chosen = [int(mx.argmax(one).item()) for one in logits]
        assert chosen[0] == chosen[1]
        ids.append(chosen[0])


def encoder(**how: Any) -> encoding.Encoder:
    checkpoint = open_checkpoint(resolve("demo", quiet=True))
    from mlx_gemma3.prompt.processor import Processor

    options = {"instruct": True, "max_length": 512, **how}
    return encoding.Encoder(Processor(checkpoint.tokenizer(), checkpoint.config), checkpoint.config, **options)


def encode(data: Path, values: Mapping[str, Any], **how: Any) -> encoding.Encoded:
    return encoder(**how).encode(Data("rows", [Row(1, values, data)]), lambda pixels: "picture")


def counted(item: encoding.Item) -> str:
    tokenizer = open_checkpoint(resolve("demo", quiet=True)).tokenizer()
    return tokenizer.decode([int(token) for token in item.samples[-1].tokens[item.samples[-1].counts]])


CHAT = [
    {"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "a red star"},
    {"role": "user", "content": "And its <end_of_turn> color?"}, {"role": "assistant", "content": "red"},
]  # fmt: skip


def test_the_words_of_the_assistant_count(data: Path) -> None:
    item = encode(data, {"messages": CHAT}).items[0]
    assert counted(item) == "a red star<end_of_turn>red<end_of_turn>"
    shown = {"messages": CHAT[:2], "images": ["pictures/00000-0.png"]}
    item = encode(data, shown).items[0]
    assert counted(item) == "a red star<end_of_turn>" and len(item.samples[0].spans) == 1
    everything = encode(data, shown, loss_on="all").items[0].samples[0]
    image = np.zeros(len(everything.tokens), bool)
    image[slice(*everything.spans[0])] = True
    assert np.array_equal(everything.counts, ~image & (np.arange(len(image)) > 0))
    assert counted(encode(data, {"prompt": "a", "completion": " b"}).items[0]) == "b<end_of_turn>"
    assert counted(encode(data, {"prompt": "a ", "completion": "b"}, instruct=False).items[0]) == "b<eos>"
    pair = encode(data, {"messages": CHAT[:3], "chosen": "red", "rejected": "blue"}).items[0]
    assert counted(pair) == "blue<end_of_turn>" and len(pair.samples) == 2


def test_the_prompt_is_the_one_of_an_answer(data: Path) -> None:
    """What stands before the answer is what `generate` reads."""
    made = encoder()
    item = made.encode(Data("rows", [Row(1, {"messages": CHAT}, data)]), lambda pixels: "").items[0]
    before, wanted = encoding.prompt_of(item.samples[0])
    assert before.tokens.tolist() == made.processor.prepare(CHAT[:3], special=False).tokens
    assert made.processor.tokenizer.decode(wanted) == "red<end_of_turn>"


def test_truncation_never_cuts_a_picture(data: Path) -> None:
    messages = [
        {"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "a red star"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
        {"role": "assistant", "content": "a blue heart"},
    ]  # fmt: skip
    values = {"messages": messages, "images": ["pictures/00000-0.png"]}
    whole = encode(data, values).items[0].samples[0]
    start, stop = whole.spans[0]
    for most in range(start - 3, len(whole.tokens) + 2):
        made = encode(data, values, max_length=most)
        sample = made.items[0].samples[0]
        length = start - 1 if start - 1 < most < stop + 1 else min(most, len(whole.tokens))
        assert len(sample.tokens) == length and len(sample.spans) == len(sample.pictures) == (length > stop)
        assert made.truncated == (length < len(whole.tokens))


def test_a_long_text_is_learnt_in_pieces(data: Path) -> None:
    items = encode(data, {"text": "What is this? " * 40}, max_length=32).items
    assert len(items) > 4 and all(item.samples[0].tokens[0] == 2 and item.length <= 32 for item in items)
    assert sum(item.count for item in items) == sum(item.length - 1 for item in items)


def test_batches_hold_each_item_once_and_no_more_tokens_than_allowed() -> None:
    lengths = [5, 9, 30, 4, 8, 8, 70, 3]
    for tokens in (None, 32):
        made = batches.batches(lengths, size=3, tokens=tokens, seed=1, epoch=2)
        assert sorted(index for batch in made for index in batch) == list(range(8))
        assert made == batches.batches(lengths, size=3, tokens=tokens, seed=1, epoch=2)
        assert made != batches.batches(lengths, size=3, tokens=tokens, seed=1, epoch=3)
        for batch in made:
            assert len(batch) <= 3 if tokens is None else len(batch) == 1 or sum(lengths[n] for n in batch) <= tokens


@pytest.mark.slow
def test_accumulated_batches_are_one_large_one(data: Path, tmp_path: Path) -> None:
    found = []
    for name, how in {"once": {"batch_size": 8}, "twice": {"batch_size": 4, "accumulate": 2}}.items():
        g3.tune("demo", data, tmp_path / name, **{**QUICK, "steps": 2, "warmup": 0.0, **how})
        found.append(mx.load(str(tmp_path / name / "last" / "adapter_model.safetensors")))
    for name, values in found[0].items():
        assert mx.abs(values - found[1][name]).max().item() < 1e-4, name


@pytest.mark.slow
def test_preferences_are_learnt(data: Path, tmp_path: Path) -> None:
    rows_ = [
        {"prompt": "What is this?", "chosen": "a star", "rejected": "a heart", "images": ["pictures/00000-0.png"]},
        {"prompt": "What color is it?", "chosen": "red", "rejected": "blue", "images": ["pictures/00001-0.png"]},
    ]  # fmt: skip
    file = data / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows_ * 3)), encoding="utf-8")
    events: list[Mapping[str, Any]] = []
    g3.tune("demo", file, tmp_path / "out", valid=file, progress=events.append, **{**QUICK, "steps": 6})
    losses = [event["loss"] for event in events if event["kind"] == "step"]
    checks = [event for event in events if event["kind"] == "evaluation"]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-4)  # the model is where it began
    assert losses[-1] < 0.5 and checks[-1]["loss"] < checks[0]["loss"] and checks[-1]["preferred"] == 1.0


@pytest.mark.slow
def test_rows_of_pictures_are_kept_under_a_budget(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with patch.dict(os.environ, {"MLX_GEMMA3_CACHE": str(folder)}):
        losses = []
        for budget in (3 * 16 * 128 * 4 + 500, 0, 1 << 30, 1 << 30):
            g3.tune("demo", data / "train.jsonl", tmp_path / "out", overwrite=True, picture_cache=budget,
                    **{**QUICK, "steps": 1})  # fmt: skip
            kept = list(folder.rglob("*.npy"))
            losses.append(rows(tmp_path / "out")[1])
            if budget < 1 << 30:
                assert len(kept) == 3  # 8 kB each, and a header
        assert len(kept) > 3 and len(set(losses)) == 1


def test_it_ends_where_nothing_gets_better(data: Path, tmp_path: Path) -> None:
    how = {**QUICK, "steps": 40, "learning_rate": 1e-9, "eval_every": 1, "patience": 2, "examples": 0}
    with patch.object(run.Training, "_step", lambda self, batch: (1.0, 1)):  # learns nothing
        report = g3.tune("demo", data, tmp_path / "out", **how)
    assert (report.ended, report.steps, report.best_step) == ("no better", 2, 0)
    with pytest.raises(OptionError, match="data to validate on"):
        g3.tune("demo", data / "train.jsonl", tmp_path / "other", **how)


def test_memory_is_estimated_first_and_what_would_fit_is_named(data: Path, tmp_path: Path) -> None:
    small = Machine("this machine", 1 << 30, 413 << 20, "a test", metal=False)
    with patch.object(run, "this_machine", lambda: small), pytest.raises(MemoryNeedError, match="--batch-size 1"):
        g3.tune("demo", data, tmp_path / "out", **{**QUICK, "batch_size": 64})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({"rank": 0}, "rank"), ({"kind": "full"}, "kind"), ({"matrices": "q_proj,x_proj"}, "matrices"),
        ({"layers": 99}, "layers"), ({"learning_rate": 0.0}, "learning_rate"), ({"loss_on": "user"}, "loss_on"),
        ({"max_length": 2}, "max_length"), ({"valid_share": 1.0}, "valid_share"), ({"nothing": 1}, "nothing"),
        ({"form": "gguf"}, "form"), ({"projector": True, "kind": "dora"}, "projector: got kind dora"),
        ({"projector": True, "form": "mlx-lm"}, "projector: got form mlx-lm"),
        ({"resume": True}, "state"), ({"batch_tokens": 1}, "batch_tokens"),
        ({"resume": True, "overwrite": True}, "resume and overwrite"),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_named(data: Path, tmp_path: Path, how: dict[str, Any], wanted: str) -> None:
    with pytest.raises(Gemma3Error, match=wanted):
        g3.tune("demo", data, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["tower", "projector"])
def test_a_tower_without_pictures_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a star"}', encoding="utf-8")
    with pytest.raises(OptionError, match=f"^{what}: got data without pictures"):
        g3.tune("demo", tmp_path / "data.jsonl", tmp_path / "out", **{what: True})

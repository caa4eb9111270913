"""Adapters by the commands: generate, chat, evaluate, convert; the worker and the server."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_adapter
from places import PICTURES
from worker_process import Worker

import mlx_gemma3
from mlx_gemma3.commands.adapters import named, only
from mlx_gemma3.commands.serve import _adapter
from mlx_gemma3.convert import convert
from mlx_gemma3.errors import OptionError
from mlx_gemma3.measure.evaluate import evaluate, open_model
from mlx_gemma3.server.models import Models
from mlx_gemma3.server.settings import Settings
from mlx_gemma3.worker.client import WorkerEngine

CONFIG = tiny.image_config()
HEART = str(PICTURES / "heart.png")
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8}
FLAGS = ["--temperature", "0", "--max-tokens", "8"]
TEXT = "The quick brown fox jumps over the lazy dog. " * 6
PLAN: dict[str, Any] = {"modules": ["q_proj", "down_proj", "fc1"], "vision": True, "seed": 5}


def invoke(*words: str | Path, input: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "mlx_gemma3.cli", *map(str, words)]
    return subprocess.run(command, input=input, capture_output=True, text=True, timeout=120, cwd=cwd)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_adapter.write_base(tmp_path_factory.mktemp("commands") / "tiny-it", CONFIG)


@pytest.fixture(scope="module")
def receipts(base: Path) -> Path:
    return tiny_adapter.write(base.parent / "receipts.adapter", CONFIG, **PLAN)


@pytest.fixture(scope="module")
def small(base: Path) -> Path:
    """One that changes little, as real ones do."""
    return tiny_adapter.write(base.parent / "small", CONFIG, **PLAN, size=0.02)


@pytest.fixture(scope="module")
def answers(base: Path, receipts: Path) -> dict[str | None, str]:
    with mlx_gemma3.load(base, adapters={"receipts": receipts}) as engine:
        return {name: engine.generate("Why?", adapter=name, **GREEDY).text for name in (None, "receipts")}


# --- the command line


def test_adapters_as_they_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert named(["receipts=some/where", "x/shapes.adapter", "a=b", "two words"]) == {
        "receipts": "some/where",
        "shapes": "x/shapes.adapter",
        "a-b": "a=b",
        "two-words": "two words",
    }
    assert named(None) == {} and only(["x"]) == {"x": "x"}
    with pytest.raises(OptionError, match="got two called x, want a name for each"):
        named(["x=1", "y/x"])
    with pytest.raises(OptionError, match="got x and y, want one"):
        only(["x=1", "y=2"])
    assert _adapter("receipts=p/q") == ("", "receipts", "p/q")
    assert _adapter("google/gemma-3-4b-it:receipts=p") == ("google/gemma-3-4b-it", "receipts", "p")
    assert _adapter("p/shapes.adapter") == ("", "shapes", "p/shapes.adapter")


def test_generate_and_a_session(base: Path, receipts: Path, answers: dict[Any, str], tmp_path: Path) -> None:
    common = ["generate", "Why?", "-m", str(base), *FLAGS, "--quiet"]
    assert invoke(*common).stdout.strip("\n") == answers[None].strip("\n")
    for adapter in (str(receipts), f"mine={receipts}"):
        assert invoke(*common, "--adapter", adapter).stdout.strip("\n") == answers["receipts"].strip("\n")
    talk = ["--session", str(tmp_path / "talk")]
    assert invoke(*common, *talk, "--adapter", str(receipts)).returncode == 0
    assert invoke(*common, *talk, "--adapter", f"other={receipts}").returncode == 0  # the same files
    wrong = invoke(*common, *talk)
    assert wrong.returncode == 1 and "an adapter that is not loaded" in wrong.stderr
    wrong = invoke(*common, "--adapter", str(receipts), "--adapter", f"again={receipts}")
    assert wrong.returncode == 1 and "want one: answers are written with one adapter" in wrong.stderr
    wrong = invoke(*common, "--adapter", str(base))
    assert wrong.returncode == 1 and "got a model (config.json), want an adapter" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1


def test_chat_keeps_its_adapter_in_a_new_conversation(base: Path, receipts: Path, answers: dict[Any, str]) -> None:
    said = "Why?\n/reset\nWhy?\n"
    with_it = invoke("chat", "-m", str(base), *FLAGS, "--quiet", "--adapter", str(receipts), input=said).stdout
    without = invoke("chat", "-m", str(base), *FLAGS, "--quiet", input=said).stdout
    assert with_it.count(answers["receipts"].strip()) == 2 and without.count(answers[None].strip()) == 2


def test_evaluate(base: Path, receipts: Path, tmp_path: Path) -> None:
    """A model with its adapter beside it is the melted one; loaded once where both sides have one base."""
    melted = tiny_adapter.melted(tiny.random_tensors(CONFIG, seed=4), tiny_adapter.update(CONFIG, **PLAN))
    whole = tiny_adapter.write_base(tmp_path / "whole", CONFIG)
    tiny.write_folder(whole, CONFIG, melted)
    loads: list[str] = []
    tell: Callable[[str, int, int], None] = lambda what, done, total: loads.append(what)  # noqa: E731
    same = evaluate(whole, text=TEXT, against=base, against_adapter=receipts, images=[HEART], dtype="float32")
    assert same.words is not None and same.words.distance is not None and same.pictures is not None
    assert same.words.distance.largest_difference < 1e-3
    assert same.pictures.distance is not None and same.pictures.distance.largest_difference < 1e-3
    apart = evaluate(base, text=TEXT, adapter=receipts, against=base, progress=tell)
    assert apart.words is not None and apart.words.distance is not None and apart.words.distance.mean > 0.01
    assert sum(what.startswith("loading") for what in loads) == 1
    assert apart.model == f"{base} with receipts.adapter" and apart.against == str(base)
    opened = open_model(base, adapter=receipts)
    assert evaluate(opened, text=TEXT).words.perplexity == pytest.approx(apart.words.perplexity)  # type: ignore[union-attr]
    with pytest.raises(OptionError, match=r"against_adapter: got .*, want another checkpoint as well"):
        evaluate(base, text=TEXT, against_adapter=receipts)
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    done = invoke("evaluate", str(base), "--adapter", str(receipts), "--text", str(tmp_path / "text"), "--json")
    assert json.loads(done.stdout)["text"]["perplexity"] == pytest.approx(apart.words.perplexity)


# --- melted in


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_melted_into_plain_weights(base: Path, dora: bool, tmp_path: Path) -> None:
    plan = {**PLAN, "dora": dora}
    adapter = tiny_adapter.write(tmp_path / "adapter", CONFIG, **plan, form="mlx-lm")
    report = convert(base, tmp_path / "out", adapter=adapter, dequantize=True, dtype="float32", compare=TEXT)
    want = tiny_adapter.melted(tiny.random_tensors(CONFIG, seed=4), tiny_adapter.update(CONFIG, **plan))
    model = dict(mlx_gemma3.load_model(tmp_path / "out", dtype="float32").named_modules())
    for module in ("language_model.layers.3.mlp.down_proj", "vision_tower.encoder.layers.1.mlp.fc1"):
        assert np.abs(np.array(model[module].weight) - want[f"{module}.weight"]).max() < 1e-5
    assert report.adapter is not None and report.adapter.matrices == 8 * 2 + 2 + 2
    assert report.adapter.cost < 1e-6 < 0.1 < report.adapter.relative
    distance = report.comparison.words.distance  # type: ignore[union-attr]
    assert distance is not None and distance.largest_difference < 1e-3


def test_melting_into_packed_weights_and_what_it_costs(base: Path, small: Path, tmp_path: Path) -> None:
    """Packed before: what the adapter does not change is kept bit for bit, the rest is packed as it was."""
    convert(base, tmp_path / "packed", bits=8, group_size=32)
    report = convert(tmp_path / "packed", tmp_path / "out", adapter=small, compare=TEXT)
    before, after = (
        dict(mlx_gemma3.load_model(tmp_path / name, dtype="float32").named_modules()) for name in ("packed", "out")
    )
    kept, changed = "language_model.layers.2.self_attn.k_proj", "language_model.layers.2.self_attn.q_proj"
    for part in ("weight", "scales", "biases"):
        assert mx.array_equal(before[kept][part], after[kept][part])
    assert not mx.array_equal(before[changed].weight, after[changed].weight)
    assert after[changed].bits == 8 and after[changed].group_size == 32
    melted = report.adapter
    assert melted is not None and 0.01 < melted.relative < 0.03
    # 8 bits move numbers by half a percent, a quarter of what this adapter does; 4 bits by several times as much.
    assert 0.1 < melted.cost < 1
    four = convert(base, tmp_path / "four", bits=4, adapter=small)
    assert four.adapter is not None and four.adapter.cost > 3
    assert f"moves them by {four.adapter.cost:.2%} of that change" in four.text()
    assert report.to_dict()["adapter"]["error_over_change"] == melted.cost
    plain = convert(tmp_path / "packed", tmp_path / "plain", adapter=small, dequantize=True, dtype="float32")
    assert plain.adapter is not None and plain.adapter.cost < 1e-4
    with pytest.raises(OptionError, match=r"got packed already.*leave out bits, group, mode and preset"):
        convert(tmp_path / "packed", tmp_path / "again", adapter=small, bits=4)


def test_the_command_names_what_it_makes(base: Path, receipts: Path, tmp_path: Path) -> None:
    done = invoke("convert", base, "--adapter", receipts, "--bits", "8", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the adapter receipts.adapter is in 20 matrices" in done.stdout
    assert (tmp_path / "tiny-it-receipts-8bit" / "config.json").is_file()


# --- other programs


def test_the_worker(base: Path, receipts: Path, answers: dict[Any, str]) -> None:
    numbers = itertools.count(1)
    with Worker() as worker:

        def ask(op: str, **values: Any) -> dict[str, Any]:
            return worker.ask({"id": next(numbers), "op": op, **values})

        loaded = ask("load", model=str(base), adapters={"receipts": str(receipts)})
        assert loaded["result"]["adapters"] == ["receipts"]
        for name in (None, "receipts"):
            options = {**GREEDY, **({"adapter": name} if name else {})}
            assert ask("generate", prompt="Why?", options=options)["text"] == answers[name]
        ask("session.open", session="s", adapter="receipts")
        assert ask("session.send", session="s", content="Why?", options=GREEDY)["text"] == answers["receipts"]
        assert ask("session.open", session="t", adapter="none")["message"].startswith("adapter: got 'none'")
        assert ask("generate", prompt="x", options={"adapter": "none"})["code"] == "option"
    with WorkerEngine(base, adapters={"receipts": receipts}) as engine:
        assert engine.generate("Why?", adapter="receipts", **GREEDY).text == answers["receipts"]
        assert engine.session(adapter="receipts").send("Why?", **GREEDY).reply.text == answers["receipts"]


def test_the_models_of_a_server() -> None:
    settings = Settings(
        models=("google/gemma-3-4b-it", "demo"),
        adapters=(("", "receipts", "a"), ("demo", "shapes", "b")),
        aliases={"gpt-4o": "google/gemma-3-4b-it", "fast": "demo:shapes"},
    )
    models = Models(settings, 1 << 30)
    assert models.names == ["google/gemma-3-4b-it", "demo", "google/gemma-3-4b-it:receipts", "demo:shapes"]
    assert [one.name for one in models.listed] == models.names and models.first.adapter is None
    for asked, name in {
        "gemma-3-4b-it:receipts": "google/gemma-3-4b-it:receipts",
        "Google/Gemma-3-4B-it:receipts:latest": "google/gemma-3-4b-it:receipts",
        "gpt-4o": "google/gemma-3-4b-it",
        "gpt-4o:receipts": "google/gemma-3-4b-it:receipts",
        "fast": "demo:shapes",
        "demo": "demo",
    }.items():
        assert models.find(asked).name == name
    adapted = models.find("demo:shapes")
    assert adapted.base is models.find("demo") and adapted.held is adapted.base.held
    assert adapted.base.adapters == {"shapes": "b"} and models.first.adapters == {"receipts": "a"}
    with pytest.raises(mlx_gemma3.Gemma3Error, match="no model of that name"):
        models.find("demo:receipts")
    for adapters, words in (
        ((("other", "x", "a"),), "got other:x, want one of google/gemma-3-4b-it, demo"),
        ((("", "x", "a"), ("", "x", "b")), "got google/gemma-3-4b-it:x twice"),
    ):
        with pytest.raises(OptionError, match=words):
            Models(Settings(models=settings.models, adapters=adapters), 1 << 30)

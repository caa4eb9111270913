"""Weights without the vision tower that config.json names: every program says what to do, and can do it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from places import TEMPLATE
from tiny_tokenizer import write_tokenizer
from worker_process import Worker

import mlx_gemma3 as g3
from mlx_gemma3.errors import CheckpointError

COMMAND = [sys.executable, "-W", "error", "-m", "mlx_gemma3.cli"]
SHORT = ["--max-tokens", "2"]


@pytest.fixture(scope="module")
def stripped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As fine-tuning programs write it: a vision_config, and the words' weights alone."""
    config = tiny.image_config()
    words = {name: x for name, x in tiny.random_tensors(config).items() if name.startswith("language_model.")}
    folder = tiny.write_folder(tmp_path_factory.mktemp("stripped") / "model", config, words)
    (folder / "tokenizer_config.json").write_text(TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")
    return write_tokenizer(folder)


def run(*words: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, words)], input=stdin, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", ["chat", "generate", "inspect", "bench", "evaluate", "convert"])
def test_commands(command: str, stripped: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the model is in the house and the user is not " * 4, encoding="utf-8")
    quick = ["--prompt-tokens", "4", "--context", "4", "--tokens", "2", "--repeat", "1"]
    words: dict[str, list[Any]] = {
        "chat": ["-m", stripped, *SHORT, "--quiet"],
        "generate": ["-m", stripped, *SHORT, "--session", tmp_path / "session", "hi"],
        "inspect": [stripped],
        "bench": ["-m", stripped, *quick],
        "evaluate": [stripped, "--text", text, "--against", stripped],
        "convert": [stripped, tmp_path / "out", "--bits", "4", "--group-size", "32"],
    }
    if command != "evaluate":  # which needs no tower for a text
        done = run(command, *words[command], stdin="hi\n")
        assert done.returncode == 1 and "it holds no vision tower; load its words alone with --text-only" in done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    done = run(command, *words[command], "--text-only", stdin="hi\n")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.strip()


def test_pictures_do_not_go_with_it(stripped: Path, tmp_path: Path) -> None:
    for words in (["generate", "hi"], ["chat"]):
        done = run(*words, "-m", stripped, "--text-only", "-i", TEMPLATE)
        assert done.returncode == 1 and "--image: got --text-only as well, want one or the other" in done.stderr
    done = run("bench", "-m", stripped, "--text-only", "--images", "2")
    assert done.returncode == 1 and "--images: got 2 and --text-only, want one or the other" in done.stderr
    done = run("evaluate", stripped, "--against", stripped, "--text-only", "-i", TEMPLATE)
    assert done.returncode == 1 and "pictures: got 1 and text_only, want one or the other" in done.stderr


def test_engine_and_worker(stripped: Path) -> None:
    with pytest.raises(CheckpointError, match=r"text_only=True"):
        g3.load(stripped)
    with g3.load(stripped, text_only=True) as engine:
        assert engine.generate("hi", max_tokens=2).tokens and not engine.about["vision"]
    load: dict[str, Any] = {"op": "load", "model": str(stripped)}
    with Worker() as worker:
        failed = worker.ask({"id": 1, **load})
        assert failed["code"] == "checkpoint" and "text_only=True" in failed["message"]
        loaded = worker.ask({"id": 2, **load, "text_only": True})
        assert loaded["result"]["vision"] is False and loaded["result"]["notes"] == []

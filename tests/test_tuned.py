"""Whether a checkpoint is tuned for chat: its files decide, then its name; what a person is told of it, and where."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_tokenizer
from places import TEMPLATE

import mlx_gemma3 as g3
from mlx_gemma3.checkpoint.load import Checkpoint, open_checkpoint
from mlx_gemma3.checkpoint.source import Source
from mlx_gemma3.errors import ConfigError
from mlx_gemma3.prompt.template import is_own_template

COMMAND = [sys.executable, "-W", "error", "-m", "mlx_gemma3.cli"]
OWN: str = json.loads(TEMPLATE.read_text(encoding="utf-8"))["chat_template"]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\\n{{ m.content }}<|im_end|>\\n{% endfor %}"
Give = Callable[[Path, str], None]


def as_jinja(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


def as_json(folder: Path, text: str) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": text}), encoding="utf-8")


def as_setting(folder: Path, text: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}), encoding="utf-8")


def as_named(folder: Path, text: str) -> None:
    as_setting(folder, [{"name": "rag", "template": "x"}, {"name": "default", "template": text}])


def opened(folder: Path, name: str) -> Checkpoint:
    return open_checkpoint(Source(name, folder))


@pytest.mark.parametrize("give", [as_jinja, as_json, as_setting, as_named])
@pytest.mark.parametrize("eos", [1, [1, 106], None])
def test_a_template_means_tuned_whatever_the_names_and_end_ids_are(give: Give, eos: Any, tmp_path: Path) -> None:
    for name in (
        "gemma-3-4b-it",
        "Gemma-3-Gaia-PT-BR-4b-it",
        "knowledge-base-gemma",
        "x/gemma-3-base",
        "gemma-3-4b-pt",
    ):
        folder = tmp_path / Path(name).name
        generation = None if eos is None else {"eos_token_id": eos}
        tiny.write_folder(folder, tiny.text_config(eos_token_id=eos), {}, generation=generation)
        give(folder, OWN)
        assert (opened(folder, name).instruct, opened(folder, name).notes) == (True, ()), name
        give(folder, CHATML)
        other = opened(folder, name)
        assert (other.instruct, other.notes) == (True, ()) and other.template is not None
        give(folder, "x")
        (note,) = opened(folder, name).notes
        assert name in note and "does not read the messages and is not used" in note


def test_without_a_template_the_name_decides_and_it_is_told(tmp_path: Path) -> None:
    tiny.write_folder(tmp_path, tiny.text_config(), {})
    as_setting(tmp_path, None)
    for name in ("google/gemma-3-4b-pt", "gemma-3-270m", "x/gemma-3-base", "gemma-3-1b-pt@main", "italian", "it/mine"):
        assert (opened(tmp_path, name).instruct, opened(tmp_path, name).notes) == (False, ()), name
    for name in ("mlx-community/gemma-3-4b-it-4bit", "gemma-3-1b-it@main", "my_instruct", "Some-Chat"):
        checkpoint = opened(tmp_path, name)
        assert checkpoint.instruct and len(checkpoint.notes) == 1, name
        assert name in checkpoint.notes[0] and "by its name" in checkpoint.notes[0]
    folder = tiny.write_folder(tmp_path / "gemma-3-4b-it", tiny.text_config(), {})
    assert opened(folder, "mine").instruct, "the folder's name counts too"


def test_an_empty_template_is_none_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    tiny.write_folder(tmp_path, tiny.text_config(), {})
    as_jinja(tmp_path, " \n")
    assert not opened(tmp_path, "x").instruct
    for value in (5, True, {"a": "b"}, [{"name": "default", "template": 1}], ["text"]):
        as_setting(tmp_path, value)
        with pytest.raises(ConfigError, match="chat_template: got"):
            opened(tmp_path, "x")
    (tmp_path / "tokenizer_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="a JSON object"):
        opened(tmp_path, "x")


def test_gemma_3s_own_text_is_known_however_it_is_laid_out() -> None:
    """Google's text is that of transformers' convert_gemma3_weights.py (Apache 2.0)."""
    google = (Path(__file__).parent / "templates" / "gemma-3.jinja").read_text(encoding="utf-8")
    escaped = re.sub(r"(?<=')\n+|\n+(?=')", lambda found: "\\n" * len(found[0]), google)
    for text in (
        google,
        escaped,
        escaped.replace("\n", ""),
        google.rstrip("\n"),
        google.replace("    ", "\t"),
        "{# mine #}" + google,
        OWN,
    ):
        assert is_own_template(text), text
    for text in (
        "",
        CHATML,
        OWN + " ",
        OWN.replace("%}{%", "%}\n{%"),  # new lines that it would write
        google.replace("'<start_of_image>'", "' <start_of_image>'"),
        google.replace(" | trim", "", 1),
        google.replace("messages[0]['content'] + '", "'You are Fred. ' + messages[0]['content'] + '"),
        google + "x" * 20_000,
        "{#" * 1_000_000,
    ):
        assert not is_own_template(text), text[:100]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A checkpoint with a template that is not Gemma 3's."""
    config = tiny.text_config()
    folder = tiny.write_folder(tmp_path / "other", config, tiny.random_tensors(config), style="text")
    as_jinja(tiny_tokenizer.write_tokenizer(folder), CHATML)
    return folder


def test_the_engine_and_the_commands_use_it(other: Path, tmp_path: Path) -> None:
    with g3.load(other) as engine:
        assert engine.about["instruct"] and not engine.about["notes"]
        written = "<|im_start|>user\\nhi<|im_end|>\\n"  # as its text spells it, outside of tags
        assert engine.count_tokens("hi") == 1 + len(engine.tokenizer.encode(written))
        assert engine.generate("hi", max_tokens=2).usage["prompt_tokens"] == engine.count_tokens("hi")
    done = subprocess.run([*COMMAND, "inspect", str(other)], capture_output=True, text=True, timeout=120)
    assert "chat_template.jinja: its own turns" in done.stdout and done.stderr == ""
    g3.convert(other, tmp_path / "out")
    again = opened(tmp_path / "out", "out").template
    assert again is not None and again.render([{"role": "user", "content": "hi"}]) == written


def test_convert_keeps_what_only_the_name_said(tmp_path: Path) -> None:
    config = tiny.text_config()
    for name, chat in (("gemma-3-1b-it", True), ("gemma-3-1b", False)):
        folder = tiny.write_folder(tmp_path / name, config, tiny.random_tensors(config), style="text")
        report = g3.convert(tiny_tokenizer.write_tokenizer(folder), tmp_path / f"{chat}-4bits", bits=4, group_size=32)
        small = opened(tmp_path / f"{chat}-4bits", "small")
        assert (small.instruct, small.notes) == (chat, ()) and len(report.notes) == chat
        assert (tmp_path / f"{chat}-4bits" / "chat_template.jinja").exists() == chat

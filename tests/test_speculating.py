"""Guessing as a user meets it: the engine, its usage, draft models, the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from endless import endless

import mlx_gemma3 as g3
from mlx_gemma3.commands.speculation import guessed_by
from mlx_gemma3.errors import MemoryNeedError, OptionError
from mlx_gemma3.generation.depth import Depth
from mlx_gemma3.runtime import speculating

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 60}


@pytest.fixture(autouse=True)
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Guesses whatever it costs."""

    def depths(self: Depth, odds: Any, rows: int, prices: Any = ()) -> list[int]:
        return [min(4, len(chances)) for chances in odds]

    monkeypatch.setattr(Depth, "depths", depths)
    yield


@pytest.fixture(scope="module")
def folder(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless(text_folder, tmp_path_factory.mktemp("endless"))


def test_an_answer_is_the_same_with_guesses_and_without(folder: Path) -> None:
    prompt = "the model of the user " * 12
    with g3.load(folder, speculation=False) as plain, g3.load(folder, draft=folder) as drafted, g3.load(folder) as own:
        for options in (GREEDY, {"temperature": 1.2, "seed": 5, "max_tokens": 40}):
            want = plain.generate(prompt, **options)
            assert want.usage["drafted_tokens"] == 0 and want.usage["passes"] >= len(want.tokens) - 1
            for engine in (drafted, own):
                reply = engine.generate(prompt, **options)
                assert reply.tokens == want.tokens and reply.text == want.text
                assert reply.usage["drafted_tokens"] >= reply.usage["accepted_tokens"] > 0
                assert reply.usage["passes"] < len(reply.tokens)
        replies = [stream.reply.tokens for stream in drafted.streams(prompt, n=5, seed=3, max_tokens=25)]
        assert replies == [plain.generate(prompt, seed=3 + n, max_tokens=25).tokens for n in range(5)]


def test_an_answer_may_end_within_a_guess_and_the_conversation_goes_on(chat_folder: Path) -> None:
    with g3.load(chat_folder, speculation=False) as plain, g3.load(chat_folder, draft=chat_folder) as drafted:
        assert drafted.about["weights_bytes"] > plain.about["weights_bytes"]
        talks = [engine.session(system="the model") for engine in (plain, drafted)]
        for turn in ("the user the user", "a question", "the user the user a question", "and"):
            texts = [talk.send(turn, temperature=0, max_tokens=40, stop=["e"]).reply.text for talk in talks]
            assert texts[0] == texts[1]
        assert talks[0].tokens == talks[1].tokens


def test_a_draft_has_the_same_vocabulary_and_fits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match=r"draft.*vocabulary"):
        monkeypatch.setattr(speculating, "same_vocabulary", lambda *_: False)
        g3.load(folder, draft=folder)
    monkeypatch.undo()
    monkeypatch.setattr(speculating, "loaded_bytes", lambda *_, **__: 1 << 60)
    with pytest.raises(MemoryNeedError, match="draft"):
        g3.load(folder, draft=folder)
    with pytest.raises(OptionError, match="speculation"):
        g3.load(folder, draft=folder, speculation=False)
    with pytest.raises(OptionError, match="--draft"):
        guessed_by("one", off=True)
    tokenizer = g3.Tokenizer.from_folder(folder)
    assert speculating.same_vocabulary(tokenizer, tokenizer)


def test_a_prompt_longer_than_the_drafts_context_is_answered_without_it(folder: Path, tmp_path: Path) -> None:
    config = tiny.text_config(max_position_embeddings=64)
    short = tiny.write_folder(tmp_path / "short", config, tiny.random_tensors(config))
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            (short / name).write_bytes((folder / name).read_bytes())
    prompt = "the model of the user " * 30
    with g3.load(folder, draft=short) as engine, g3.load(folder, speculation=False) as plain:
        assert engine.generate(prompt, **GREEDY).tokens == plain.generate(prompt, **GREEDY).tokens
        assert engine.generate("the", **GREEDY).tokens == plain.generate("the", **GREEDY).tokens


def test_the_command_line_says_how_many_were_right(folder: Path) -> None:
    words = ["the model of the user " * 12, "--temperature", "0", "--max-tokens", "60", "--stats"]
    flags = ([], ["--draft", str(folder)], ["--no-speculation"])
    found = [
        subprocess.run(
            [sys.executable, "-W", "error", "-m", "mlx_gemma3.cli", "generate", "-m", folder, *words, *more],
            capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
        )
        for more in flags
    ]  # fmt: skip
    assert [done.returncode for done in found] == [0, 0, 0], found
    assert len({done.stdout for done in found}) == 1
    assert "guessed right" not in found[2].stderr

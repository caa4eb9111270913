"""Conversations: what is processed again, what is kept, what a file gives back and what it refuses."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_tokenizer
from PIL import Image

import mlx_gemma3 as g3
from mlx_gemma3.errors import OptionError, OutputError, PromptError, SessionError


@pytest.fixture(scope="module")
def engine(chat_folder: Path) -> Iterator[g3.Engine]:
    with g3.load(chat_folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for name in ("red", "blue", "green"):
        Image.new("RGB", (80, 60), name).save(folder / f"{name}.png")
        paths.append(folder / f"{name}.png")
    return paths


LONG = "the user is in the model and the user is in the model " * 4
OPTIONS = {"max_tokens": 6, "temperature": 0.0}


def test_a_session_answers_as_an_engine_that_remembers_nothing(
    engine: g3.Engine, chat_folder: Path, pictures: list[Path]
) -> None:
    """The ids of a conversation are those of the whole message list, and so are the answers."""
    session = engine.session(system="terse")
    first = session.send(LONG, images=[pictures[0]], **OPTIONS).reply
    second = session.send("and the user", images=[pictures[1]], **OPTIONS).reply
    messages = session.messages
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[2]["content"] == first.text
    with g3.load(chat_folder) as fresh:
        again = fresh.session(system="terse")
        assert again.send(LONG, images=[pictures[0]], **OPTIONS).reply.tokens == first.tokens
        assert again.send("and the user", images=[pictures[1]], **OPTIONS).reply.tokens == second.tokens
        whole = fresh.generate(LONG, system="terse", images=[pictures[0]], **OPTIONS)
        assert whole.tokens == first.tokens


def test_an_image_token_that_the_model_wrote_is_text(engine: g3.Engine, pictures: list[Path]) -> None:
    image = engine._thread.loaded.config.image_token_id
    session = engine.session()
    for bias in ({image: 100.0}, {image: 100.0}, None):  # also read once more, and before a turn with a picture
        reply = session.send("the", logit_bias=bias, **OPTIONS).reply
        assert bias is None or reply.tokens == [image] * OPTIONS["max_tokens"]
    assert session.send("and this", images=[pictures[0]], **OPTIONS).reply.usage["images"] == 1
    session.undo()
    session.undo()
    session.undo()
    session.send("again", **OPTIONS).reply
    assert len(session.messages) == 4


def test_only_what_is_new_is_processed(engine: g3.Engine, pictures: list[Path]) -> None:
    session = engine.session()
    first = session.send(LONG, images=[pictures[2]], **OPTIONS).reply.usage
    assert (first["cached_tokens"], first["images_encoded"]) == (0, 1)
    second = session.send("is the user in", **OPTIONS).reply.usage
    new = second["prompt_tokens"] - first["prompt_tokens"] - first["completion_tokens"]
    assert second["processed_tokens"] <= new + 1 and second["images_encoded"] == 0
    retried = session.retry(**OPTIONS).reply.usage
    assert retried["processed_tokens"] == 0 and retried["prompt_tokens"] == second["prompt_tokens"]
    session.undo()
    edited = session.send("is the model in", **OPTIONS).reply.usage
    assert edited["processed_tokens"] <= new + 3


def test_stateless_callers_have_the_same_benefit(chat_folder: Path, pictures: list[Path]) -> None:
    with g3.load(chat_folder) as engine:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": LONG}]}]
        first = engine.generate(messages, images=[pictures[0]], **OPTIONS)
        assert first.usage["images_encoded"] == 1
        longer = [*messages, {"role": "assistant", "content": first.text}, {"role": "user", "content": "is it"}]
        second = engine.generate(longer, images=[pictures[0]], **OPTIONS)
        assert second.usage["images_encoded"] == 0 and second.usage["processed_tokens"] < 40
        other = engine.generate(messages, images=[pictures[1]], **OPTIONS)
        assert other.usage["images_encoded"] == 1
        assert other.usage["cached_tokens"] < 10  # the same words with another picture share only what is before it
        question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the user"}]}]
        third = engine.generate(question, images=[pictures[0]], **OPTIONS)
        assert third.usage["images_encoded"] == 0
        assert engine.generate(messages, images=[pictures[0]], **OPTIONS).tokens == first.tokens


def test_a_cancelled_answer_stays_as_far_as_it_came(engine: g3.Engine) -> None:
    session = engine.session()
    stream = session.send("the model", max_tokens=800, temperature=1.0, seed=3)
    while stream.next()["kind"] == "pending":
        pass
    stream.cancel()
    reply = stream.reply
    assert session.messages[-1]["content"] == reply.text
    assert session.send("the user", **OPTIONS).reply.usage["cached_tokens"] > 0


def test_a_turn_that_fails_was_not_said(engine: g3.Engine, tmp_path: Path) -> None:
    session = engine.session()
    session.send("the model", **OPTIONS).reply
    with pytest.raises(g3.Gemma3Error, match=r"none\.png"):
        session.send("look", images=[tmp_path / "none.png"], **OPTIONS).reply
    with pytest.raises(PromptError) as caught:
        session.send("the " * 3000, **OPTIONS).reply
    assert caught.value.code == "context"
    assert len(session.messages) == 2 and session.send("the user", **OPTIONS).reply.tokens
    for _ in range(2):
        session.undo()
    with pytest.raises(PromptError, match="no turn yet"):
        session.undo()
    with pytest.raises(PromptError, match="no turn yet"):
        session.retry().reply


def test_what_a_session_cannot_do_is_refused(engine: g3.Engine, text_folder: Path, tmp_path: Path) -> None:
    with g3.load(text_folder) as base, pytest.raises(OptionError, match="base checkpoint"):
        base.session()
    with pytest.raises(OptionError, match="system"):
        engine.session(system="x", resume=tmp_path / "y")
    with pytest.raises(OptionError, match="session"):
        engine.session().send("x", system="y").reply
    for settings in ({"kv_bits": 7}, {"max_context": 0}, {"kv_bits": 8}):  # head_dim 32 is no multiple of 64
        with pytest.raises(OptionError):
            g3.load(text_folder, **settings)  # type: ignore[arg-type]


def test_a_model_that_cannot_fit_is_refused_before_it_is_read(
    text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_gemma3.checkpoint.memory import Machine
    from mlx_gemma3.errors import MemoryNeedError

    small = Machine("a toaster", 300 << 20, 264 << 20, "a test", metal=False)
    monkeypatch.setattr("mlx_gemma3.runtime.fitting.this_machine", lambda: small)
    with pytest.raises(MemoryNeedError, match=r"at 1024 tokens.*--max-context.*--force") as caught:
        g3.load(text_folder)
    assert "\n" not in str(caught.value) and caught.value.code == "memory"
    with g3.load(text_folder, force=True) as engine:
        assert engine.generate("the", max_tokens=1).tokens


def test_max_context_ends_an_answer(chat_folder: Path) -> None:
    with g3.load(chat_folder, max_context=30) as engine:
        count = engine.generate("the", **OPTIONS).usage["prompt_tokens"]
        reply = engine.generate("the", max_tokens=500, temperature=1.5, seed=4, stop=["\0"])
        assert len(reply.tokens) <= 30 - count + 1
        with pytest.raises(PromptError, match="at most 30"):
            engine.generate(LONG)


RESUME = """
import json, sys
import mlx_gemma3 as g3
with g3.load(sys.argv[1]) as engine:
    session = engine.session(resume=sys.argv[2])
    reply = session.send("is the user in", max_tokens=6, temperature=0).reply
    print(json.dumps([reply.tokens, reply.usage, session.messages]))
"""


def test_a_saved_conversation_goes_on_in_another_process(
    engine: g3.Engine, chat_folder: Path, pictures: list[Path], tmp_path: Path
) -> None:
    session = engine.session(system="terse")
    session.send(LONG, images=[pictures[0]], **OPTIONS).reply
    path = tmp_path / "talk.safetensors"
    session.save(path)
    session.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["talk.safetensors"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RESUME, str(chat_folder), str(path)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    tokens, usage, messages = json.loads(done.stdout)
    here = session.send("is the user in", **OPTIONS).reply
    assert tokens == here.tokens and messages == session.messages
    assert usage["processed_tokens"] == here.usage["processed_tokens"] < 40 and usage["images_encoded"] == 0
    # an earlier turn of a resumed conversation is read again from its kept picture rows
    resumed = engine.session(resume=path)
    resumed.undo()
    assert resumed.send("the", images=[pictures[1]], **OPTIONS).reply.tokens


def test_a_long_answer_is_given_again_after_a_resume_with_nothing_read(engine: g3.Engine, tmp_path: Path) -> None:
    """The local layers have moved on by more than they can go back: the file keeps them as they were."""
    session = engine.session()
    options = {"max_tokens": 80, "temperature": 0.0}
    first = session.send(LONG, **options).reply
    assert len(first.tokens) > 40, "an answer that leaves the window"
    session.save(tmp_path / "long.session")
    resumed = engine.session(resume=tmp_path / "long.session")
    again = resumed.retry(**options).reply
    assert again.usage["processed_tokens"] == 0 and again.tokens == first.tokens


@pytest.fixture(scope="module")
def saved(engine: g3.Engine, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "talk"
    session = engine.session()
    session.send("the model", **OPTIONS).reply
    session.save(path)
    return path.read_bytes()


def test_a_file_that_was_cut_or_changed_is_refused(engine: g3.Engine, saved: bytes, tmp_path: Path) -> None:
    path, rng = tmp_path / "talk", random.Random(0)
    places = [0, 3, 9, 60, len(saved) - 1, *(rng.randrange(len(saved)) for _ in range(60))]
    for place in places:
        changed = bytearray(saved)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(SessionError) as caught:
            engine.session(resume=path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    for length in (0, 5, 100, len(saved) // 2, len(saved) - 1):
        path.write_bytes(saved[:length])
        with pytest.raises(SessionError):
            engine.session(resume=path)
    path.write_bytes(saved)
    assert engine.session(resume=path).messages


def test_another_model_or_other_settings_are_refused(
    engine: g3.Engine, saved: bytes, tmp_path: Path, chat_folder: Path
) -> None:
    path = tmp_path / "talk"
    path.write_bytes(saved)
    other = shutil.copytree(chat_folder, tmp_path / "other")
    values = tiny.image_config()
    tiny.write_folder(other, values, tiny.random_tensors(values, seed=5))
    tiny_tokenizer.write_tokenizer(other)
    with g3.load(other) as second, pytest.raises(SessionError, match="another model"):
        second.session(resume=path)
    with g3.load(chat_folder, dtype="bfloat16") as third, pytest.raises(SessionError, match="dtype float32"):
        third.session(resume=path)
    moved = shutil.copytree(chat_folder, tmp_path / "moved")
    with g3.load(moved) as fourth:
        assert fourth.session(resume=path).messages
    newer = saved.replace(b'\\"version\\": 1', b'\\"version\\": 9')
    assert newer != saved
    path.write_bytes(newer)
    with pytest.raises(SessionError, match="version 9"):
        engine.session(resume=path)
    for wrong in (tmp_path / "none", tmp_path, chat_folder / "model.safetensors"):
        with pytest.raises(SessionError):
            engine.session(resume=wrong)


def test_a_place_that_cannot_be_written_keeps_the_session(engine: g3.Engine, tmp_path: Path) -> None:
    session = engine.session()
    session.send("the model", **OPTIONS).reply
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        session.save(tmp_path / "file" / "talk")
    with pytest.raises(OutputError):
        session.save(tmp_path)
    assert session.send("the user", **OPTIONS).reply.tokens
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


SAVE = """
import sys
import mlx_gemma3 as g3
with g3.load(sys.argv[1]) as engine:
    session = engine.session(resume=sys.argv[2])
    print("ready", flush=True)
    while True:
        session.send("the", max_tokens=1, temperature=0).reply
        session.save(sys.argv[2])
"""


@pytest.mark.slow
def test_killed_while_saving_the_file_is_the_old_or_the_new_one(
    engine: g3.Engine, saved: bytes, chat_folder: Path, tmp_path: Path
) -> None:
    path, rng = tmp_path / "talk", random.Random(2)
    path.write_bytes(saved)
    lengths = set()
    for _ in range(100):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVE, str(chat_folder), str(path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        lengths.add(len(engine.session(resume=path).messages))
    engine.session(resume=path).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["talk"], "what the killed ones left is cleared"
    assert len(lengths) > 3 and np.all(np.array(sorted(lengths)) % 2 == 0)


def test_generate_goes_on_with_a_session_file(chat_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk"
    command = [sys.executable, "-W", "error", "-m", "mlx_gemma3.cli", "generate", "-m", str(chat_folder), "--json"]
    command += ["--temperature", "0", "--max-tokens", "5", "--session", str(path)]

    def say(*words: str) -> dict:
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout.splitlines()[-1])["usage"]

    first, second = say("--system", "terse", LONG), say("is the user in")
    assert second["prompt_tokens"] > first["prompt_tokens"] and second["processed_tokens"] < 40

"""The file of a conversation as a file: where it may be, who may replace it, what is refused as one."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer

import mlx_gemma3 as g3
from mlx_gemma3.errors import OutputError, SessionError

OPTIONS = {"max_tokens": 3, "temperature": 0.0}


@pytest.fixture(scope="module")
def engine(chat_folder: Path) -> Iterator[g3.Engine]:
    with g3.load(chat_folder) as engine:
        yield engine


@pytest.fixture
def session(engine: g3.Engine) -> g3.Session:
    session = engine.session()
    session.send("the model", **OPTIONS).reply
    return session


def said(engine: g3.Engine, path: Path) -> list[str]:
    messages = engine.session(resume=path).messages
    return [message["content"][-1]["text"] for message in messages if message["role"] == "user"]


def test_of_two_with_one_file_the_second_is_told(engine: g3.Engine, session: g3.Session, tmp_path: Path) -> None:
    path = tmp_path / "talk"
    session.save(path)
    first, second = engine.session(resume=path), engine.session(resume=path)
    first.send("first", **OPTIONS).reply
    second.send("second", **OPTIONS).reply
    first.save(path)
    with pytest.raises(OutputError, match=r"changed since it was read.*nothing was overwritten"):
        second.save(path)
    with pytest.raises(OutputError, match="changed"):  # the one that made the file, too
        session.save(path)
    assert said(engine, path) == ["the model", "first"]
    first.save(path)
    second.save(tmp_path / "other")
    assert said(engine, tmp_path / "other") == ["the model", "second"]
    path.unlink()
    second.save(path)  # nothing is lost
    assert said(engine, path) == ["the model", "second"]


def test_a_file_that_was_never_read_is_replaced_unless_that_is_refused(
    engine: g3.Engine, session: g3.Session, tmp_path: Path
) -> None:
    path = tmp_path / "talk"
    session.save(path, replace=False)
    session.save(path, replace=False)
    other = engine.session()
    other.send("other", **OPTIONS).reply
    with pytest.raises(OutputError, match="not been read from"):
        other.save(path, replace=False)
    assert said(engine, path) == ["the model"]
    other.save(path)
    assert said(engine, path) == ["other"]


def test_a_race_loses_nothing_without_a_word(engine: g3.Engine, session: g3.Session, tmp_path: Path) -> None:
    """Eight that read the same file and save at the same time: one of them does."""
    path = tmp_path / "talk"
    session.save(path)
    talks = [engine.session(resume=path) for _ in range(8)]
    for number, talk in enumerate(talks):
        talk.send(f"number {number}", **OPTIONS).reply
    saved: list[int] = []

    def save(number: int) -> None:
        with contextlib.suppress(OutputError):
            talks[number].save(path)
            saved.append(number)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said(engine, path) == ["the model", f"number {saved[0]}"] and len(saved) == 1


def test_every_turn_that_generate_says_was_kept_is_in_the_file(
    engine: g3.Engine, chat_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "talk"
    command = [sys.executable, "-m", "mlx_gemma3.cli", "generate", "-m", str(chat_folder), "--max-tokens", "2"]
    command += ["--session", str(path), "--quiet"]
    running = [
        subprocess.Popen(
            [*command, f"turn {n}"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for n in range(4)
    ]
    ends = [(process.communicate(timeout=120)[1].decode(), process.returncode) for process in running]
    kept = said(engine, path)
    assert sorted(kept) == sorted(f"turn {n}" for n, (_, status) in enumerate(ends) if status == 0) and kept
    for error, status in ends:
        assert (status, error) == (0, "") or (status == 1 and "nothing was overwritten" in error)
    assert [file.name for file in tmp_path.iterdir()] == ["talk"]


def test_what_a_killed_save_left_is_cleared_by_the_next(session: g3.Session, tmp_path: Path) -> None:
    (tmp_path / ".talk.0123456789abcdef.writing").write_bytes(b"half")
    session.save(tmp_path / "talk")
    assert [file.name for file in tmp_path.iterdir()] == ["talk"]


def test_a_full_disk_is_called_that(session: g3.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="no space left"):
        session.save(tmp_path / "talk")
    assert not list(tmp_path.iterdir())


def test_a_link_stays_a_link_and_the_file_is_for_its_owner_alone(
    engine: g3.Engine, session: g3.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("talk")
    session.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "talk").stat().st_mode & 0o777 == 0o600
    talk = engine.session(resume=tmp_path / "link")
    session.send("meanwhile", **OPTIONS).reply
    session.save(tmp_path / "talk")
    talk.send("more", **OPTIONS).reply
    with pytest.raises(OutputError, match="changed"):
        talk.save(tmp_path / "link")
    monkeypatch.setenv("HOME", str(tmp_path))
    session.save("~/home")
    assert said(engine, "~/home") == said(engine, tmp_path / "home")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["home", "link", "talk"]


@pytest.mark.parametrize(("kv_bits", "local_kv_bits"), [(8, 16), (4, 8)])
def test_packed_rows_come_back_as_they_were(kv_bits: int, local_kv_bits: int, tmp_path: Path) -> None:
    values = tiny.image_config(head_dim=64)
    folder = tiny.write_folder(tmp_path / "model", values, tiny.random_tensors(values, seed=3))
    tiny_tokenizer.write_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "…"}', encoding="utf-8")
    with g3.load(folder, kv_bits=kv_bits, local_kv_bits=local_kv_bits) as packed:
        here = packed.session()
        here.send("the user is in the model " * 4, max_tokens=40, temperature=1.0, seed=1, stop=["\0"]).reply
        here.save(tmp_path / "talk")
        there = packed.session(resume=tmp_path / "talk")
        wanted, reply = (talk.send("is it", **OPTIONS).reply for talk in (here, there))
        assert reply.tokens == wanted.tokens and reply.usage["processed_tokens"] == wanted.usage["processed_tokens"]
    with g3.load(folder) as plain, pytest.raises(SessionError, match="kv_bits"):
        plain.session(resume=tmp_path / "talk")


@pytest.mark.parametrize("count", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_whatever_was_said_and_taken_back_is_read_again(
    engine: g3.Engine, count: int, tmp_path: Path, folder: Path
) -> None:
    """Random turns, pictures, edits and cancels: what writing gives, reading takes, and it says the same."""
    path = tmp_path / "talk"
    for seed in range(count):
        rng = random.Random(seed)
        talk = engine.session(system=rng.choice((None, "terse")))
        for _ in range(rng.randint(1, 6)):
            match rng.randrange(6):
                case 0 if talk.messages and talk.messages[-1]["role"] != "system":
                    talk.undo()
                case 1 if talk.messages and talk.messages[-1]["role"] != "system":
                    talk.retry(max_tokens=rng.choice((1, 50)), seed=seed).reply
                case 2:
                    stream = talk.send("the model is in " * rng.randint(1, 30), max_tokens=900, temperature=1.5)
                    for _ in range(rng.randint(0, 12)):
                        stream.next()
                    stream.cancel()
                    _ = stream.reply
                case _:
                    images = [folder / "triangle.png"] * rng.choice((0, 0, 1, 2))
                    wide = {"pan_and_scan": rng.random() < 0.5}
                    talk.send("the user", images=images, max_tokens=rng.choice((1, 60)), seed=seed, **wide).reply
            talk.save(path)
            again = engine.session(resume=path)
            assert again.messages == talk.messages and again.tokens == talk.tokens
            if rng.random() < 0.5:
                talk = again


def test_only_regular_files_are_read_and_written(engine: g3.Engine, session: g3.Session, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", "/dev/null", tmp_path / "pipe", tmp_path, "~nobody-of-that-name/x", "a\0b"):
        with pytest.raises(OutputError):
            session.save(path)
        with pytest.raises(SessionError) as caught:
            engine.session(resume=path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", [["generate", "hello"], ["chat"]])
def test_a_session_that_cannot_be_written_is_told_before_the_model_loads(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    program = [sys.executable, "-m", "mlx_gemma3.cli"]
    done = subprocess.run(
        [*program, *command, "-m", "no-such-model", "--session", str(tmp_path / "file" / "x")],
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert "file/x" in done.stderr and "can be written" in done.stderr and done.stderr.count("\n") == 1


def test_a_chat_whose_file_was_taken_meanwhile_is_saved_beside(chat_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlx_gemma3.cli", "chat", "-m", str(chat_folder), "--session", "talk.chat"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*command, "--max-tokens", "3"], cwd=tmp_path, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as chat:
        assert chat.stdin is not None and chat.stdout is not None
        chat.stdin.write("the user\n")
        chat.stdin.flush()
        chat.stdout.read(1)
        (tmp_path / "talk.chat").write_text("somebody else's")
        _, said = chat.communicate(timeout=60)
    assert "talk-2.chat" in said and (tmp_path / "talk.chat").read_text() == "somebody else's"
    with g3.load(chat_folder) as engine:
        assert engine.session(resume=tmp_path / "talk-2.chat").messages[0]["content"][-1]["text"] == "the user"

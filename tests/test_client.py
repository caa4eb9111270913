"""The Python client of the worker: an Engine elsewhere, whose end is told and not waited for."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from endless import endless
from PIL import Image

import mlx_gemma3 as g3
from mlx_gemma3.errors import ClosedError, ImageError, OptionError, RequestError, SourceNotFound, WorkerError
from mlx_gemma3.worker import client
from mlx_gemma3.worker.client import WorkerEngine

ENDLESS: dict[str, Any] = {"max_tokens": 900, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def chat_folder(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless(chat_folder, tmp_path_factory.mktemp("endless"))


@pytest.fixture(scope="module")
def engine(chat_folder: Path) -> Iterator[g3.Engine]:
    with g3.load(chat_folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def remote(chat_folder: Path) -> Iterator[WorkerEngine]:
    with WorkerEngine(chat_folder, kv_bits=16) as remote:
        yield remote


def started(stream: g3.Stream) -> g3.Stream:
    while stream.next()["kind"] != "text":
        pass
    return stream


def test_it_answers_as_the_engine_does(engine: g3.Engine, remote: WorkerEngine, tmp_path: Path) -> None:
    image = Image.new("RGB", (50, 50), "purple")
    path = tmp_path / "purple.png"
    image.save(path)
    for picture in (path, str(path), path.read_bytes(), image):
        wanted = engine.generate("hi", images=[picture], **GREEDY)
        reply = remote.generate("hi", images=[picture], **GREEDY)
        assert (reply.text, reply.tokens, reply.finish_reason) == (wanted.text, wanted.tokens, wanted.finish_reason)
        assert reply.usage.keys() == wanted.usage.keys()
    messages = [{"role": "user", "content": "hi"}]
    with remote.stream(messages, **GREEDY) as stream:
        assert "".join(piece.text for piece in stream) == stream.reply.text
    assert stream.reply.tokens == engine.generate(messages, **GREEDY).tokens


def test_its_sessions_are_the_engines(engine: g3.Engine, remote: WorkerEngine, tmp_path: Path) -> None:
    here, there = engine.session(system="brief"), remote.session(system="brief")
    for said in ("hi", "and"):
        assert there.send(said, **GREEDY).reply.tokens == here.send(said, **GREEDY).reply.tokens
    assert there.messages == here.messages and there.tokens == here.tokens
    there.undo()
    here.undo()
    there.save(tmp_path / "there.session")
    resumed = engine.session(resume=tmp_path / "there.session")
    assert resumed.retry(**GREEDY).reply.tokens == there.retry(**GREEDY).reply.tokens
    again = remote.session(resume=tmp_path / "there.session")
    assert again.messages == there.messages
    assert len(remote.status()["sessions"]) == 2
    del there, again
    gc.collect()
    remote.generate("a", max_tokens=1)
    assert remote.status()["sessions"] == [], "what nobody holds is closed"


def test_its_errors_are_the_engines(remote: WorkerEngine, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.png"):
        remote.generate("hi", images=[tmp_path / "none.png"])
    with pytest.raises(OptionError, match="warmth"):
        remote.generate("hi", warmth=1)
    event = remote.stream("hi", top_k=-1).next()
    assert (event["kind"], event["code"]) == ("error", "option")
    with pytest.raises(RequestError, match="bytes"):
        remote.generate("a" * (65 << 20))
    assert remote.generate("hi", max_tokens=1).tokens


def test_cancelled_and_abandoned_answers_end(remote: WorkerEngine) -> None:
    stream = started(remote.stream("the", **ENDLESS))
    stream.cancel()
    stream.cancel()
    assert stream.reply.finish_reason == "cancelled"
    left = started(remote.stream("the", **ENDLESS))
    begun = remote.status()["running"]
    del left
    while remote.status()["running"] == begun:
        time.sleep(0.01)


def test_many_threads_share_it(remote: WorkerEngine) -> None:
    wanted = remote.generate("the", **GREEDY).tokens
    replies: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: replies.append(remote.generate("the", **GREEDY).tokens)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert replies == [wanted] * 8


def test_a_worker_killed_in_mid_answer_is_told_at_once_and_can_be_restarted(chat_folder: Path, tmp_path: Path) -> None:
    with WorkerEngine(chat_folder) as remote:
        wanted = remote.generate("hi", **GREEDY).tokens
        session = remote.session()
        first, second = started(remote.stream("the", **ENDLESS)), remote.stream("the", **ENDLESS)
        os.kill(remote.status()["pid"], signal.SIGKILL)
        began = time.monotonic()
        for stream in (first, second):
            with pytest.raises(WorkerError, match=r"killed by SIGKILL.*restart"):
                list(stream)
            assert stream.next()["code"] == "worker"
        assert time.monotonic() - began < 20
        for broken in (lambda: remote.generate("hi"), remote.status, lambda: session.messages, lambda: session.undo()):
            with pytest.raises(WorkerError):
                broken()
        remote.restart()
        assert remote.generate("hi", **GREEDY).tokens == wanted
        with pytest.raises(WorkerError):
            session.send("hi").reply
        assert remote.session().send("hi", max_tokens=1).reply.tokens


def test_closing_cancels_what_is_in_work(chat_folder: Path) -> None:
    remote = WorkerEngine(chat_folder)
    stream = started(remote.stream("the", **ENDLESS))
    process = remote.process._process
    remote.close()
    remote.close()
    assert process.returncode == 0 and stream.reply.finish_reason == "cancelled"
    with pytest.raises(ClosedError):
        remote.generate("hi")


def test_one_that_nobody_holds_ends(chat_folder: Path) -> None:
    process = WorkerEngine(chat_folder).process._process
    gc.collect()
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("command", "source", "error", "why"),
    [
        (client.COMMAND, "gemma-9", SourceNotFound, "gemma-9"),
        (("/nowhere/worker",), "any", WorkerError, "/nowhere/worker"),
        ((sys.executable, "-c", ""), "any", WorkerError, "protocol None"),
        ((sys.executable, "-c", 'print(\'{"kind": "hello", "protocol": 9}\')'), "any", WorkerError, "protocol 9"),
    ],
)
def test_one_that_cannot_start_says_why(
    command: tuple[str, ...], source: str, error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        WorkerEngine(source, command=command)


def test_the_program_ends_cleanly_with_an_open_worker(chat_folder: Path) -> None:
    code = (
        "from mlx_gemma3.worker.client import WorkerEngine\n"
        f"remote = WorkerEngine({str(chat_folder)!r})\n"
        f"stream = remote.stream('the', **{ENDLESS!r})\n"
        "while stream.next()['kind'] != 'text': pass\n"
        "import sys\n"
        "assert not any(name.startswith('mlx.') for name in sys.modules), 'the client needs no MLX'\n"
    )
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")

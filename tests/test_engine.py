"""The engine under pressure: many threads, cancels, ends of all kinds, errors nobody foresaw, asyncio."""

from __future__ import annotations

import asyncio
import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from endless import endless

import mlx_gemma3 as g3
from mlx_gemma3.errors import ClosedError, SourceNotFound
from mlx_gemma3.model.runner import Runner
from mlx_gemma3.prompt.processor import Processor
from mlx_gemma3.runtime import loading, thread, timeline

ENDLESS: dict[str, Any] = {"max_tokens": 900, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
LONG = "the model " * 12  # about 50 tokens


@pytest.fixture(scope="module")
def text_folder(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless(text_folder, tmp_path_factory.mktemp("endless"))


@pytest.fixture(scope="module")
def chat_folder(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless(chat_folder, tmp_path_factory.mktemp("endless"))


@pytest.fixture(scope="module")
def base(text_folder: Path) -> Iterator[g3.Engine]:
    with g3.load(text_folder, speculation=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def chat(chat_folder: Path) -> Iterator[g3.Engine]:
    with g3.load(chat_folder, speculation=False) as engine:
        yield engine


class Work:
    """Counts the steps and prefill chunks that were begun; `at_each` is called, in the engine's thread, before one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = 0
        self.at_each: Callable[[int], None] = lambda _: None
        for name in ("step", "read"):
            monkeypatch.setattr(Runner, name, self._counting(getattr(Runner, name)))

    def _counting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.begun += 1
            self.at_each(self.begun)
            return method(*args, **options)

        return counted


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    monkeypatch.setattr(timeline, "usual_chunk", lambda *_: 8)  # many chunks in a short prompt
    return Work(monkeypatch)


def gone(held: threading.Thread, seconds: float = 20) -> bool:
    held.join(seconds)
    return not held.is_alive()


def test_after_a_cancel_at_most_one_step_or_chunk_is_begun(base: g3.Engine, work: Work) -> None:
    """From another thread, at 50 random moments, half of them while the prompt is read."""
    chance, cut_short = random.Random(5), 0
    for turn in range(50):
        wait = chance.randrange(6) if turn % 2 else chance.randrange(9, 16)
        stream = base.stream(f"{turn} {LONG}", **ENDLESS)
        for _ in range(wait):
            stream.next()
        stream.cancel()
        begun = work.begun
        reply = stream.reply
        cut_short += reply.finish_reason == "cancelled"
        assert work.begun - begun <= 1, turn
        assert reply.usage["processed_tokens"] + reply.usage["cached_tokens"] <= reply.usage["prompt_tokens"]
    assert cut_short == 50


def test_a_cancel_at_the_begin_of_a_step_is_the_last_step(base: g3.Engine, work: Work) -> None:
    for number in (1, 3, 12, 16):  # chunks of the prompt, then steps
        work.begun = 0
        stream = base.stream(f"number {number} {LONG}", **ENDLESS)
        work.at_each = lambda begun, stop=stream, last=number: stop.cancel() if begun == last else None  # type: ignore[misc]
        assert stream.reply.finish_reason == "cancelled" and work.begun == number
        work.at_each = lambda _: None


def test_a_cancel_stops_between_two_pictures(chat: g3.Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from PIL import Image

    encode, seen = Runner.encode_images, []

    def encoding(model: Runner, *given: Any) -> Any:
        seen.append(stream.cancel())
        return encode(model, *given)

    monkeypatch.setattr(Runner, "encode_images", encoding)
    stream = chat.stream("compare", images=[Image.new("RGB", (30, 30), (60 * n, 0, 9)) for n in range(4)])
    reply = stream.reply
    assert (reply.finish_reason, reply.tokens, len(seen)) == ("cancelled", [], 1)
    assert reply.usage["images"] == 4 and reply.usage["images_encoded"] == 1
    again = chat.session()
    stream = again.send("compare", images=[Image.new("RGB", (30, 30), (9, 60 * n, 9)) for n in range(3)])
    assert stream.reply.finish_reason == "cancelled" and len(seen) == 2
    monkeypatch.undo()
    again.save(tmp_path / "cancelled.session")
    usage = again.retry(max_tokens=2, temperature=0).reply.usage
    assert (usage["images"], usage["images_encoded"]) == (3, 0)  # to save it, the others were encoded
    resumed = chat.session(resume=tmp_path / "cancelled.session")
    assert resumed.retry(max_tokens=2, temperature=0).reply.usage["prompt_tokens"] == usage["prompt_tokens"]


def test_what_is_cancelled_or_abandoned_in_the_queue_is_never_begun(
    base: g3.Engine, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, prepared = Processor.prepare, []
    monkeypatch.setattr(
        Processor, "prepare", lambda self, text, *a, **k: (prepared.append(text), prepare(self, text, *a, **k))[1]
    )
    go = threading.Event()
    work.at_each = lambda _: go.wait(20) and None
    first = base.stream("first", max_tokens=2)
    cancelled, abandoned = base.stream("cancelled", **ENDLESS), base.stream("abandoned", **ENDLESS)
    last = base.stream("last", max_tokens=2)
    cancelled.cancel()
    del abandoned
    go.set()
    assert first.reply.usage["completion_tokens"] > 0 and last.reply.usage["completion_tokens"] > 0
    assert prepared == ["first", "last"]
    reply = cancelled.reply
    assert (reply.finish_reason, reply.text, reply.tokens) == ("cancelled", "", [])
    assert reply.usage.keys() == last.reply.usage.keys()


def test_eight_threads_that_cancel_and_abandon_at_random_all_get_their_answers(base: g3.Engine) -> None:
    wanted = {n: base.generate(f"the {n}", max_tokens=6, temperature=0).tokens for n in range(8)}
    ends: list[str] = []

    def ask(number: int) -> None:
        chance = random.Random(number)
        for _ in range(12):
            stream = base.stream(f"the {number}", max_tokens=6, temperature=0)
            kind = chance.choice(["read", "read", "cancel", "drop"])
            if kind == "drop":
                stream.next(timeout=chance.random() / 100)
                ends.append("dropped")
                continue
            if kind == "cancel":
                stream.next(timeout=chance.random() / 100)
                stream.cancel()
            reply = stream.reply
            whole = wanted[number]
            assert reply.tokens == (whole if reply.finish_reason != "cancelled" else whole[: len(reply.tokens)])
            ends.append(reply.finish_reason)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for one in threads:
        one.start()
    assert all(gone(one, 120) for one in threads)
    assert len(ends) == 96


def test_engines_side_by_side_do_not_disturb_each_other(chat_folder: Path, text_folder: Path) -> None:
    with g3.load(chat_folder) as one, g3.load(text_folder) as two, g3.load(text_folder) as three:
        alone = [engine.generate("the model", max_tokens=20, temperature=0).tokens for engine in (one, two, three)]
        assert alone[1] == alone[2] != alone[0]
        for _ in range(3):
            streams = [engine.stream("the model", max_tokens=20, temperature=0) for engine in (one, two, three)]
            assert [stream.reply.tokens for stream in streams] == alone
        two.close()
        assert three.generate("the model", max_tokens=20, temperature=0).tokens == alone[1]


def test_several_threads_may_wait_on_one_stream(base: g3.Engine) -> None:
    stream, ends = base.stream("the", max_tokens=30), []

    def read() -> None:
        while (event := stream.next())["kind"] != "done":
            pass
        ends.append(event)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for one in readers:
        one.start()
    assert all(gone(one) for one in readers)
    assert len(ends) == 4 and len(ends[0]["tokens"]) == ends[0]["usage"]["completion_tokens"]


def test_a_timeout_of_any_size_is_one(base: g3.Engine, work: Work) -> None:
    go = threading.Event()
    work.at_each = lambda _: go.wait(20) and None
    stream = base.stream("a question of time", max_tokens=1)
    assert "stage" in stream.next()  # then nothing, until it may go on
    for timeout in (-1, 0, 1e-9):
        assert stream.next(timeout=timeout) == {"kind": "pending"}
    go.set()
    while (event := stream.next(timeout=1e30))["kind"] != "done":
        pass
    assert event["usage"]["completion_tokens"] == 1


def test_an_error_nobody_foresaw_ends_one_answer_and_leaves_right_caches(
    chat: g3.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = chat.generate("the model is", max_tokens=12, temperature=0).tokens
    session = chat.session()
    first = session.send("the model is", max_tokens=12, temperature=0).reply
    said = session.messages
    step, left = Runner.step, iter(range(2))

    def failing(*args: Any) -> Any:
        if next(left, None) is None:
            raise RuntimeError("the device is on fire")
        return step(*args)

    monkeypatch.setattr(Runner, "step", failing)
    for stream in (chat.stream("the model is", temperature=0), session.send("and", temperature=0), session.retry()):
        while (event := stream.next())["kind"] not in ("done", "error"):
            pass
        assert (event["kind"], event["code"]) == ("error", "error") and "on fire" in event["message"]
        with pytest.raises(g3.Gemma3Error, match="RuntimeError in the engine") as caught:
            list(stream)
        assert "in failing" in caught.value.__notes__[0]
    assert session.messages == said  # a turn that failed was not said, and the answer before a retry stays
    monkeypatch.undo()
    assert chat.generate("the model is", max_tokens=12, temperature=0).tokens == wanted
    assert session.retry(max_tokens=12, temperature=0).reply.tokens == first.tokens


def test_requests_wait_while_the_model_loads(text_folder: Path) -> None:
    with g3.load(text_folder, wait=False) as engine:
        stream = engine.stream("the", max_tokens=3, temperature=0)
        assert stream.reply.usage["completion_tokens"] == 3
        assert engine.wait_until_loaded(timeout=0)
        about = engine.about
        assert about["name"] == str(text_folder) and not about["instruct"] and not about["vision"]
        assert about["weights_bytes"] > 1000 and about["max_context"] > 100


@pytest.mark.parametrize("fails", [False, True])
def test_an_idle_engine_warms_up_and_answers_the_same(
    base: g3.Engine, text_folder: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    wanted = base.generate("the", max_tokens=5, temperature=0).tokens
    warm_up, step, warmed = loading.warm_up, Runner.step, threading.Event()
    steps = 0

    def counted(*given: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(*given)

    def watched(loaded: Any, runner: Runner) -> None:
        runner.ahead = True  # as on a GPU
        warm_up(loaded, runner)
        warmed.set()
        if fails:
            raise MemoryError

    monkeypatch.setattr(Runner, "step", counted)
    monkeypatch.setattr(thread, "warm_up", watched)
    with g3.load(text_folder) as engine:
        assert warmed.wait(20) and steps == 1
        assert engine.generate("the", max_tokens=5, temperature=0).tokens == wanted
    warmed.clear()
    monkeypatch.setattr(thread, "IDLE", 60)
    with g3.load(text_folder, wait=False) as engine:
        assert engine.generate("the", max_tokens=5, temperature=0).tokens == wanted
    assert not warmed.is_set()


def test_a_model_that_cannot_load_says_so_wherever_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    go, resolve = threading.Event(), thread.resolve
    monkeypatch.setattr(thread, "resolve", lambda *a, **k: (go.wait(20), resolve(*a, **k))[1])
    engine = g3.load("gemma-9", wait=False)
    before = engine.stream("the")
    assert not engine.wait_until_loaded(timeout=0)
    go.set()
    assert (before.next()["kind"], before.next()["code"]) == ("error", "not_found")
    with pytest.raises(SourceNotFound):
        engine.wait_until_loaded()
    assert engine.stream("the").next()["code"] == "not_found"
    with pytest.raises(SourceNotFound):
        engine.about
    engine.close()
    with pytest.raises(ClosedError):
        engine.stream("the")


def test_close_does_not_wait_for_a_download(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, resolve = threading.Event(), thread.resolve
    monkeypatch.setattr(thread, "resolve", lambda *a, **k: (go.wait(20), resolve(*a, **k))[1])
    engine = g3.load(text_folder, wait=False)
    stream = engine.stream("the")
    engine.close()
    assert engine._thread.is_alive()
    go.set()
    assert gone(engine._thread) and stream.next()["code"] == "closed"
    with pytest.raises(ClosedError, match="while it was loading"):
        engine.wait_until_loaded()


def test_close_stops_the_reading_of_weights(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, go = threading.Event(), threading.Event()
    check = loading._check_open

    def checking(closing: Callable[[], bool]) -> None:
        reading.set()
        go.wait(20)
        check(closing)

    monkeypatch.setattr(loading, "_check_open", checking)
    engine = g3.load(text_folder, wait=False)
    assert reading.wait(20)
    threading.Timer(0.05, go.set).start()
    engine.close()
    assert not engine._thread.is_alive()
    with pytest.raises(ClosedError):
        engine.wait_until_loaded()


def test_an_interrupted_load_ends_its_thread(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    others = set(threading.enumerate())
    monkeypatch.setattr(thread.EngineThread, "wait_until_loaded", interrupt)
    with pytest.raises(KeyboardInterrupt):
        g3.load(text_folder)
    assert all(gone(one) for one in set(threading.enumerate()) - others)


def test_a_dropped_engine_ends_and_a_held_answer_holds_it(chat_folder: Path) -> None:
    def load() -> tuple[g3.Engine, threading.Thread]:
        engine = g3.load(chat_folder)
        return engine, engine._thread

    engine, held = load()
    stream = engine.stream("hi", max_tokens=4, temperature=0)
    del engine
    assert stream.reply.usage["completion_tokens"] == 4
    assert gone(held), "an answer that has ended holds nothing"
    engine, held = load()
    session = engine.session()
    del engine
    assert session.send("hi", max_tokens=2).reply.tokens
    del session
    assert gone(held)
    engine, held = load()
    ring: list[Any] = [engine]
    ring.append(ring)
    del engine, ring
    gc.collect()
    assert gone(held)


def test_close_from_many_threads_at_once_ends_everything(text_folder: Path) -> None:
    engine = g3.load(text_folder)
    streams = [engine.stream("the", **ENDLESS) for _ in range(5)]
    streams[0].next()
    closers = [threading.Thread(target=engine.close) for _ in range(4)]
    for one in closers:
        one.start()
    assert all(gone(one) for one in closers) and not engine._thread.is_alive()
    assert {stream.reply.finish_reason for stream in streams} == {"cancelled"}


ENDINGS = {
    "while sampling": "engine = g3.load({0!r}); s = engine.stream('the', **ENDLESS); s.next(); s.next()",
    "while loading": "engine = g3.load({0!r}, wait=False)",
    "in a daemon thread": (
        "def talk():\n    for piece in g3.load({0!r}).stream('the', **ENDLESS): said.set()\n"
        "said = threading.Event(); threading.Thread(target=talk, daemon=True).start(); said.wait(30)"
    ),
    "closed at exit": (
        "import atexit; engine = g3.load({0!r}); atexit.register(engine.close); s = engine.stream('the', **ENDLESS)"
    ),
    "by an error": "engine = g3.load({0!r}); s = engine.stream('the', **ENDLESS); s.next(); raise SystemExit(3)",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_process_ends_cleanly_whatever_the_engine_does(text_folder: Path, ending: str) -> None:
    code = f"import threading, mlx_gemma3 as g3\nENDLESS = {ENDLESS!r}\n" + ENDINGS[ending].format(str(text_folder))
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (3 if ending == "by an error" else 0, "")


def test_async_for_is_the_stream_and_leaves_the_loop_free(base: g3.Engine, work: Work) -> None:
    work.at_each = lambda _: time.sleep(0.02)
    wanted = base.generate("the", max_tokens=10, temperature=0)

    async def talk() -> tuple[str, int, int]:
        ticks, polls = 0, 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.002)
                ticks += 1

        ticking = asyncio.create_task(tick())
        stream = base.astream("the", max_tokens=10, temperature=0)
        inner = stream._stream
        take = inner.next

        def counted(timeout: float | None = None) -> dict[str, Any]:
            nonlocal polls
            polls += 1
            assert timeout == 0 or inner._end, "would hold up the loop"
            return take(timeout)

        inner.next = counted  # type: ignore[method-assign]
        text = "".join([piece.text async for piece in stream])
        ticking.cancel()
        assert inner.reply.tokens == wanted.tokens
        return text, ticks, polls

    text, ticks, polls = asyncio.run(talk())
    assert text == wanted.text and ticks > 20
    assert polls < 80, "a few for each event, none while nothing comes"


def test_cancelling_the_task_cancels_the_answer(base: g3.Engine, work: Work) -> None:
    work.at_each = lambda _: time.sleep(0.01)

    async def talk() -> None:
        stream = base.astream("the", **ENDLESS)

        async def read() -> None:
            async for _ in stream:
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await asyncio.wait_for(stream.reply(), 5)).finish_reason == "cancelled"
        async for _ in base.astream("the", **ENDLESS):  # left early: dropped, and so cancelled
            break
        async with base.astream("the", **ENDLESS) as left:
            assert (await left.next())["kind"] in ("pending", "text")
        assert (await left.reply()).finish_reason == "cancelled"
        many = await asyncio.gather(*(base.astream(f"{n}", max_tokens=2).reply() for n in range(5)))
        assert all(reply.usage["completion_tokens"] for reply in many)

    asyncio.run(talk(), debug=False)


def test_an_answer_outlives_the_loop_that_waited_for_it(chat: g3.Engine, work: Work) -> None:
    work.at_each = lambda _: time.sleep(0.005)
    stream = chat.session().send("hi", max_tokens=20, temperature=0)
    pieces = aiter(stream)

    async def wait_a_little() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(pieces.reply())), 0.02)

    asyncio.run(wait_a_little())
    assert stream.reply.finish_reason == "cancelled"  # the task that waited was cancelled with its loop
    with pytest.raises(g3.Gemma3Error):
        asyncio.run(chat.astream("hi", images=["none.png"]).reply())

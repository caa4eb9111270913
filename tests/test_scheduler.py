"""Several answers at once through the engine: each as alone, nobody waits for another, what goes wrong concerns one."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from endless import endless

import mlx_gemma3 as g3
from mlx_gemma3.errors import BusyError, Gemma3Error, OptionError, PromptError
from mlx_gemma3.generation import prefill
from mlx_gemma3.generation.constraint import Constraint
from mlx_gemma3.model.cache import Caches
from mlx_gemma3.model.runner import Runner
from mlx_gemma3.runtime import scheduler as scheduling
from mlx_gemma3.runtime import timeline
from mlx_gemma3.runtime.options import Options
from mlx_gemma3.runtime.request import Request
from mlx_gemma3.runtime.scheduler import Scheduler
from mlx_gemma3.runtime.stream import Stream

GREEDY: dict[str, Any] = {"temperature": 0}


@pytest.fixture(scope="module")
def base(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[g3.Engine]:
    """Without guesses, so that every token is a step, with the same logits to the last bit."""
    with g3.load(endless(text_folder, tmp_path_factory.mktemp("endless")), speculation=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def chat(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[g3.Engine]:
    with g3.load(endless(chat_folder, tmp_path_factory.mktemp("endless"))) as engine:
        yield engine


class Steps:
    """How many sequences were in each step; slows it down, or fails in it, when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.chunks: list[int] = []
        self.seconds, self.failing = 0.0, False
        step, read = Runner.step, Runner.read

        def counted(runner: Runner, tokens: mx.array, rows: Sequence[Caches]) -> mx.array:
            self.rows.append(len(rows))
            time.sleep(self.seconds)
            if self.failing:
                self.failing = False
                raise RuntimeError("the device is on fire")
            return step(runner, tokens, rows)

        def reading(runner: Runner, tokens: Any, *rest: Any, **named: Any) -> mx.array:
            self.chunks.append(np.shape(tokens)[1])
            return read(runner, tokens, *rest, **named)

        monkeypatch.setattr(Runner, "step", counted)
        monkeypatch.setattr(Runner, "read", reading)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def test_eight_answers_are_written_together_and_each_is_what_it_is_alone(chat: g3.Engine, steps: Steps) -> None:
    settings = [GREEDY if n % 2 else {"temperature": 1.5, "seed": n} for n in range(8)]
    alone = [chat.generate(f"the {n}", max_tokens=30, **each).tokens for n, each in enumerate(settings)]
    steps.rows.clear()
    streams = [chat.stream(f"the {n}", max_tokens=30, **each) for n, each in enumerate(settings)]
    assert [stream.reply.tokens for stream in streams] == alone
    assert max(steps.rows) == 8 and len(steps.rows) < 8 * 29 / 3


def test_no_more_than_parallel_are_written_and_the_queue_has_an_end(text_folder: Path, steps: Steps) -> None:
    with g3.load(text_folder, parallel=2, queue=3) as engine:
        steps.seconds = 0.02
        streams = [engine.stream("the", max_tokens=20, seed=n) for n in range(5)]
        with pytest.raises(BusyError, match="wait"):
            for n in range(6):
                streams.append(engine.stream("the", max_tokens=20, seed=n))
        assert all(stream.reply.finish_reason in ("length", "stop") for stream in streams)
        assert max(steps.rows) == 2
    for wrong in ({"parallel": 0}, {"queue": -1}, {"parallel": "many"}):
        with pytest.raises(OptionError):
            g3.load(text_folder, **wrong)  # type: ignore[arg-type]


def test_a_long_prompt_is_read_between_the_tokens_of_the_others(
    base: g3.Engine, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeline, "usual_chunk", lambda *_: 64)
    monkeypatch.setattr(scheduling, "SHORTEST_CHUNK", 4)
    steps.seconds = 0.002
    first = base.stream("the", max_tokens=900, **GREEDY)
    for _ in range(5):
        first.next()
    steps.rows.clear()
    long = base.stream("the model " * 200, max_tokens=2, **GREEDY)
    short = base.stream("a question", max_tokens=2, **GREEDY)
    began, order = time.monotonic(), []
    threads = [
        threading.Thread(target=lambda name=name, one=one: (one.reply, order.append(name)))
        for name, one in (("long", long), ("short", short))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert order == ["short", "long"] and time.monotonic() - began < 60
    assert len(steps.rows) > 10  # the first one wrote on meanwhile
    first.cancel()
    assert first.reply.finish_reason == "cancelled"


def test_a_lone_prompt_is_built_ahead_and_its_errors_are_its_own(
    base: g3.Engine, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the next chunk's graph is built while one is computed. Its errors are nobody else's."""
    monkeypatch.setattr(timeline, "usual_chunk", lambda *_: 16)
    prompt = "the model of a question " * 30
    wanted = base.generate("no prompt like it: " + prompt, max_tokens=5, logprobs=1, **GREEDY)
    base._thread.call(lambda scheduler: scheduler.pool.timelines.clear())
    monkeypatch.setattr(base._thread._scheduler.runner, "ahead", True)
    order: list[str] = []
    read, settle = Runner.read, prefill.settle

    def reading(*given: Any, **named: Any) -> mx.array:
        order.append("built")
        time.sleep(0.02)
        return read(*given, **named)

    def settling(caches: Caches) -> None:
        if caches.unsettled is not None:
            order.append("waited")
        settle(caches)

    monkeypatch.setattr(Runner, "read", reading)
    monkeypatch.setattr(prefill, "settle", settling)
    monkeypatch.setattr(timeline, "settle", settling)
    reply = base.generate("no prompt like it: " + prompt, max_tokens=5, logprobs=1, **GREEDY)
    assert reply.logprobs == wanted.logprobs and reply.usage["cached_tokens"] == 0
    assert order[:4] == ["built", "built", "waited", "built"] and order.count("built") == order.count("waited") > 10
    assert order[-2:] == ["waited", "waited"]  # the last chunk waits for itself

    def failing(caches: Caches) -> None:
        if caches.unsettled is not None and len(order) > 3:
            caches.unsettled = None
            raise RuntimeError("the device is on fire")
        settle(caches)

    order.clear()
    monkeypatch.setattr(timeline, "settle", failing)  # what is waited for when another comes
    long = base.stream("another prompt: " + prompt, max_tokens=5, **GREEDY)
    while len(order) < 5:
        assert long.next(timeout=0.01)["kind"] == "pending"
    assert len(base.generate("the", max_tokens=4, **GREEDY).tokens) == 4
    with pytest.raises(Gemma3Error, match="on fire"):
        list(long)


def test_an_error_of_mlx_ends_the_step_and_the_engine_lives(chat: g3.Engine, steps: Steps) -> None:
    wanted = chat.generate("the", max_tokens=5, **GREEDY).tokens
    session = chat.session()
    session.send("hello", max_tokens=3, **GREEDY).reply
    said = session.messages
    steps.seconds = 0.01
    streams = [chat.stream(f"the {n}", max_tokens=50) for n in range(3)] + [session.send("and", max_tokens=50)]
    while len({*steps.rows} & {4}) == 0:
        time.sleep(0.01)
    steps.failing = True
    for stream in streams:
        with pytest.raises(Gemma3Error, match="on fire"):
            list(stream)
    assert session.messages == said
    assert chat.generate("the", max_tokens=5, **GREEDY).tokens == wanted
    assert session.send("and", max_tokens=3).reply.finish_reason == "length"


class OnlyEven(Constraint):
    """A constraint: even ids, at most `most` of them; then it fails."""

    def __init__(self, vocabulary: int, most: int = 1 << 30) -> None:
        self.words = np.full(-(-vocabulary // 32), 0x55555555, np.uint32)
        self.most, self.taken = most, list[int]()

    def allowed(self) -> Any:
        return self.words if self.taken or self.most else None

    def accept(self, token: int) -> None:
        self.taken.append(token)
        if len(self.taken) >= self.most:
            raise ValueError("no word left")


@pytest.mark.parametrize("ahead", [False, True])
def test_a_constraint_binds_its_row_and_its_fault_ends_it_alone(chat: g3.Engine, ahead: bool) -> None:
    chat._thread._scheduler.runner.ahead = ahead  # type: ignore[union-attr]
    free = chat.generate("the", max_tokens=20, **GREEDY).tokens
    vocabulary = chat._thread.loaded.config.text.vocab_size
    options = Options(temperature=1.0, max_tokens=20, seed=3)
    bound = [OnlyEven(vocabulary), OnlyEven(vocabulary, most=5)]
    requests = [Request("the", [], options, constraint=one) for one in bound]
    chat._thread.submit(*requests)
    beside = chat.stream("the", max_tokens=20, **GREEDY)
    good, bad = (Stream(request, chat) for request in requests)
    assert all(token % 2 == 0 for token in good.reply.tokens) and good.reply.tokens == bound[0].taken
    with pytest.raises(Gemma3Error, match="no word left"):
        list(bad)
    assert beside.reply.tokens == free and len(bound[1].taken) == 5
    chat._thread._scheduler.runner.ahead = False  # type: ignore[union-attr]


def test_n_answers_read_their_prompt_once(base: g3.Engine) -> None:
    prompt = "another model " * 40
    replies = base.generate(prompt, n=4, max_tokens=20, temperature=1.5, seed=11)
    count = replies[0].usage["prompt_tokens"]
    assert sum(reply.usage["processed_tokens"] for reply in replies) == count
    assert len({tuple(reply.tokens) for reply in replies}) == 4
    again = base.generate(prompt, n=4, max_tokens=20, temperature=1.5, seed=11)
    assert [reply.tokens for reply in again] == [reply.tokens for reply in replies]
    assert base.generate(prompt, max_tokens=20, temperature=1.5, seed=13).tokens == replies[2].tokens
    assert isinstance(base.generate("the", n=1, max_tokens=2), list)
    with pytest.raises(OptionError, match="n"):
        base.generate("the", n=0)


def test_pictures_of_n_answers_are_looked_at_once(chat: g3.Engine) -> None:
    from PIL import Image

    replies = chat.generate("what", images=[Image.new("RGB", (40, 40), "teal")], n=3, max_tokens=3, seed=1)
    assert sum(reply.usage["images_encoded"] for reply in replies) == 1
    assert all(reply.usage["images"] == 1 for reply in replies)


def test_logprobs_are_of_the_model_before_its_settings(base: g3.Engine) -> None:
    with base.stream("the model", max_tokens=8, logprobs=3, temperature=0.3, logit_bias={7: -100}) as stream:
        while (event := stream.next())["kind"] != "text":
            pass
        reply = stream.reply
    assert (
        event["logprobs"] == (reply.logprobs or [])[: len(event["tokens"])]
        and reply.logprobs is not None
        and len(reply.logprobs) == len(reply.tokens) == 8
    )
    for token, one in zip(reply.tokens, reply.logprobs, strict=True):
        assert one["token"] == token and one["logprob"] <= 0 and len(one["top"]) == 3
        assert [each["logprob"] for each in one["top"]] == sorted((e["logprob"] for e in one["top"]), reverse=True)
        assert one["top"][0]["logprob"] >= one["logprob"]
    assert base.generate("the model", max_tokens=2).logprobs is None
    bare = base.generate("the model", max_tokens=2, logprobs=0).logprobs
    assert bare is not None and all(one["top"] == [] for one in bare)


def test_prompt_logprobs_and_token_ids(base: g3.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "usual_chunk", lambda *_: 64)
    loaded = base._thread.loaded
    ids = loaded.tokenizer.encode("the model of a question " * 25, bos=True)
    assert len(ids) > 70
    text = base.generate("the model of a question " * 25, max_tokens=3, **GREEDY)
    reply = base.generate(ids, max_tokens=3, prompt_logprobs=2, **GREEDY)
    assert reply.tokens == text.tokens and reply.usage["cached_tokens"] == 0
    assert base.generate(ids, max_tokens=3, **GREEDY).usage["cached_tokens"] == len(ids)

    logits = np.array(g3.load_model(loaded.checkpoint.path, dtype="float32")(mx.array([ids])))[0].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logprobs -= logits.max(-1, keepdims=True)
    found = reply.prompt_logprobs
    assert found is not None and found[0] is None and len(found) == len(ids)
    for place, (token, one) in enumerate(zip(ids[1:], found[1:], strict=True)):
        assert one is not None and one["token"] == token
        assert one["logprob"] == pytest.approx(logprobs[place, token], abs=1e-3)
        assert one["top"][0]["logprob"] == pytest.approx(logprobs[place].max(), abs=1e-3) and len(one["top"]) == 2
    with pytest.raises(PromptError, match="vocabulary"):
        base.generate([1 << 30])
    with pytest.raises(PromptError, match="alone"):
        base.generate(ids, images=[b"picture"])
    with pytest.raises(OptionError, match="prompt_logprobs"):
        base.generate(ids, prompt_logprobs=21)


def test_penalties_and_biases_work_and_are_checked(base: g3.Engine) -> None:
    plain = base.generate("the", max_tokens=30, **GREEDY).tokens
    forced = base.generate("the", max_tokens=30, logit_bias={"9": 100}, **GREEDY).tokens
    assert forced == [9] * 30 != plain
    many = base.generate("the", max_tokens=30, frequency_penalty=2, presence_penalty=2, **GREEDY).tokens
    assert len(set(many)) >= len(set(plain))
    for wrong in (
        {"logit_bias": {10**6: 1}},
        {"logit_bias": {1: 101}},
        {"logit_bias": [1]},
        {"presence_penalty": 3},
        {"frequency_penalty": "much"},
        {"logprobs": 21},
        {"logprobs": -1},
    ):
        with pytest.raises(OptionError):
            base.generate("the", **wrong)  # type: ignore[arg-type]


def test_about_and_counting_never_wait(base: g3.Engine, steps: Steps) -> None:
    steps.seconds = 0.2
    streams = [base.stream("the", max_tokens=900, seed=n) for n in range(8)]
    while not steps.rows:
        time.sleep(0.01)
    for _ in range(5):
        began = time.perf_counter()
        about = base.about
        assert time.perf_counter() - began < 0.05 and about["max_context"] > 1
    assert base.count_tokens("the model") == base._thread.loaded.processor.prepare("the model").tokens.__len__()
    steps.seconds = 0
    for stream in streams:
        stream.cancel()


def test_turns_of_one_session_come_in_order_and_those_of_others_beside_them(chat: g3.Engine, steps: Steps) -> None:
    one, two = chat.session(), chat.session()
    steps.seconds = 0.005
    first, second = one.send("the", max_tokens=40), one.send("again", max_tokens=4)
    other = two.send("the", max_tokens=4)
    assert other.reply.usage["completion_tokens"] == 4
    assert first.next(timeout=0)["kind"] != "done"
    assert len(one.messages) == 4  # waits for both
    assert second.reply.usage["cached_tokens"] > 40
    undone = one.send("more", max_tokens=4)
    one.undo()
    assert undone.reply.finish_reason == "length" and len(one.messages) == 4


def test_memory_lets_in_as_many_as_it_lasts_for(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with g3.load(text_folder) as engine:
        engine.generate("the", max_tokens=1)
        scheduler: Scheduler = engine._thread._scheduler  # type: ignore[assignment]
        seen: list[int] = []
        monkeypatch.setattr(Scheduler, "_write_all", _watching(Scheduler._write_all, seen))
        job = scheduling.Job(Request("the", [], Options(max_tokens=60)))
        kv = scheduler._kv_bytes(job, timeline.Tokens((2, 5)))
        alone = scheduling.estimate(scheduler.loaded.config, engine.about["weights_bytes"], context=62, dtype_bytes=4)
        monkeypatch.setattr(scheduler, "budget", alone.total + int(1.5 * kv))
        streams = [engine.stream(f"the {n}", max_tokens=60, seed=n, temperature=1.5) for n in range(4)]
        assert all(stream.reply.finish_reason in ("length", "stop") for stream in streams)
        assert max(seen) == 2 and not [one for one in scheduler.pool.timelines if one.caches.offset > 70]


def _watching(write: Any, seen: list[int]) -> Any:
    def watched(self: Scheduler) -> None:
        seen.append(len(self.running))
        write(self)

    return watched


@pytest.mark.parametrize(
    ("threads", "requests"), [(8, 5), pytest.param(64, 10, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_threads_that_cancel_and_close_at_random_all_see_an_end(text_folder: Path, threads: int, requests: int) -> None:
    ends: list[str] = []
    with g3.load(text_folder) as engine:
        wanted = {n: engine.generate(f"the {n}", max_tokens=12, **GREEDY).tokens for n in range(5)}

        def ask(number: int) -> None:
            chance = random.Random(number)
            for _ in range(requests):
                which = chance.randrange(5)
                with engine.stream(f"the {which}", max_tokens=12, **GREEDY) as stream:
                    if chance.random() < 0.3:
                        stream.next(timeout=chance.random() / 20)
                        stream.cancel()
                    reply = stream.reply
                whole = wanted[which]
                assert reply.tokens == (whole if reply.finish_reason != "cancelled" else whole[: len(reply.tokens)])
                ends.append(reply.finish_reason)

        several = [threading.Thread(target=ask, args=(n,)) for n in range(threads)]
        for one in several:
            one.start()
        for one in several:
            one.join(300)
    assert len(ends) == threads * requests

"""Prompts kept on disk: found again and exact, while others are answered."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_tokenizer
from kept import LONG, OPTIONS, cache_of, files, keep_one
from PIL import Image
from worker_process import Worker

import mlx_gemma3 as g3
from mlx_gemma3.runtime import prompt_cache, state_file
from mlx_gemma3.runtime.prompt_cache import PromptCache
from mlx_gemma3.runtime.scheduler import Scheduler
from mlx_gemma3.runtime.timeline import Tokens

PLAIN: dict[str, Any] = {"speculation": False}  # a pass over several tokens rounds its logits otherwise than a step


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.mark.parametrize("answer", [3, 60])  # within the window's slack, and far past it
def test_a_restart_finds_what_was_read_and_answers_as_memory_does(chat_folder: Path, kept: Path, answer: int) -> None:
    options = {"temperature": 0.0, "stop": ["\0"], "logprobs": 4}
    with g3.load(chat_folder, prompt_cache=kept, **PLAIN) as engine:
        assert engine.generate(LONG, max_tokens=answer, **options).usage["cached_from"] == ""
        assert files(kept) == []
    assert len(files(kept)) == 1
    with g3.load(chat_folder, **PLAIN) as memory, g3.load(chat_folder, prompt_cache=kept, **PLAIN) as disk:
        first = memory.generate(LONG, max_tokens=answer, **options)
        messages = [
            {"role": "user", "content": LONG},
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "and now"},
        ]
        for prompt in (LONG, LONG + "is it", messages):
            here, there = (one.generate(prompt, max_tokens=20, **options) for one in (memory, disk))
            assert here.tokens == there.tokens and here.usage["cached_from"] == "memory"
            again = here.usage["cached_tokens"] - there.usage["cached_tokens"]
            assert again == (prompt is LONG and answer == 3)  # what comes after a prompt is kept with its snapshot
            assert again or here.logprobs == there.logprobs
        assert there.usage["cached_from"] == "memory"  # it is in memory again
    with g3.load(chat_folder, prompt_cache=kept, **PLAIN) as engine:
        usage = engine.generate(LONG + "is it", **OPTIONS).usage
        assert usage["cached_from"] == "disk" and usage["processed_tokens"] < 40
        assert usage["first_token_seconds"] >= usage["prompt_seconds"] > 0


def test_what_disk_has_no_more_of_than_memory_is_not_read(chat_folder: Path, kept: Path) -> None:
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        engine.generate(LONG, **OPTIONS)
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        assert engine.generate("the user " * 90, **OPTIONS).usage["cached_from"] == ""
        assert engine.generate(LONG, **OPTIONS).usage["cached_from"] == "disk"
        assert engine.generate(LONG, **OPTIONS).usage["cached_from"] == "memory"
        before = {path: path.stat().st_mtime_ns for path in files(kept)}
    assert {path: path.stat().st_mtime_ns for path in files(kept)}.items() >= before.items()  # not written again


def test_a_picture_is_part_of_it(chat_folder: Path, kept: Path) -> None:
    red, blue = (Image.new("RGB", (60, 60), name) for name in ("red", "blue"))
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        first = engine.generate(LONG, images=[red], **OPTIONS)
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        other = engine.generate(LONG, images=[blue], **OPTIONS).usage
        assert (other["cached_from"], other["cached_tokens"], other["images_encoded"]) == ("", 0, 1)
        again = engine.generate(LONG, images=[red], **OPTIONS)
        assert (again.usage["cached_from"], again.usage["images_encoded"]) == ("disk", 0)
        assert again.tokens == first.tokens
        more = engine.generate(LONG + "and", images=[red], **OPTIONS)
    assert len(files(kept)) >= 2
    with g3.load(chat_folder) as engine:
        assert engine.generate(LONG + "and", images=[red], **OPTIONS).tokens == more.tokens


@pytest.mark.parametrize("settings", [{"kv_bits": 8}, {"kv_bits": 4, "local_kv_bits": 8}, {"dtype": "bfloat16"}])
def test_packed_caches_and_other_dtypes_come_back_bit_by_bit(
    tmp_path: Path, kept: Path, settings: dict[str, Any]
) -> None:
    folder, config = tmp_path / "packed", tiny.text_config(head_dim=64, query_pre_attn_scalar=64)
    tiny.write_folder(folder, config, tiny.random_tensors(config, seed=3))
    tiny_tokenizer.write_tokenizer(folder)
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "logprobs": 3}
    with g3.load(folder, prompt_cache=kept, **PLAIN, **settings) as engine:
        engine.generate(LONG, **options)
        wanted = engine.generate(LONG + "the", **options)
    with g3.load(folder, prompt_cache=kept, **PLAIN, **settings) as engine:
        found = engine.generate(LONG + "the", **options)
        assert found.usage["cached_from"] == "disk"
        assert (found.tokens, found.logprobs) == (wanted.tokens, wanted.logprobs)
    with g3.load(folder, prompt_cache=kept) as engine:  # 16 bits, float32: nothing of it serves here
        assert engine.generate(LONG + "the", **options).usage["cached_from"] == ""


def test_prompts_that_share_a_beginning_are_read_from_where_they_part(chat_folder: Path, kept: Path) -> None:
    """Their ends are longer than the local layers can go back: the place where they part is kept apart."""
    ends = [f"{letter} question of the user " + "is it in the model or the user " * 3 for letter in "abcd"]
    with g3.load(chat_folder) as engine:
        wanted = [engine.generate(LONG + end, **OPTIONS) for end in ends]
        assert [reply.usage["cached_tokens"] > 250 for reply in wanted] == [False, False, True, True]
    for number, end in enumerate(ends):
        with g3.load(chat_folder, prompt_cache=kept) as engine:
            reply = engine.generate(LONG + end, **OPTIONS)
        assert reply.tokens == wanted[number].tokens
        assert (reply.usage["cached_from"] == "disk") == (number > 1)
        assert number < 2 or reply.usage["cached_tokens"] > 250


def test_what_a_header_promises_is_what_the_file_does(chat_folder: Path, kept: Path) -> None:
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        engine.generate(LONG, max_tokens=60, stop=["\0"], temperature=0.0)
        scheduler: Scheduler = engine._thread._scheduler  # type: ignore[assignment]
        (timeline,) = scheduler.pool.timelines
        whole = timeline.tokens
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        engine.generate("the", **OPTIONS)
        cache = cache_of(engine)
        (one,) = cache.files._kept.values()
        contents = cache.files.read(one)
        assert contents is not None

        def promised_and_done(scheduler: Scheduler) -> list[tuple[int, int]]:
            timeline = scheduler.new_timeline()
            state_file.restore(contents, timeline)
            prompts = [whole.head(cut) + Tokens((9, 8, 7)) for cut in range(256, len(whole))]
            return [(one.reusable(prompt), timeline.reusable(prompt)) for prompt in prompts]

        pairs = engine._thread.call(promised_and_done)
    assert all(promised == done for promised, done in pairs)
    assert {done > 0 for _, done in pairs} == {True, False} and len({done for _, done in pairs}) > 20


def test_two_engines_share_a_folder(chat_folder: Path, kept: Path) -> None:
    with g3.load(chat_folder, prompt_cache=kept) as new:
        with g3.load(chat_folder, prompt_cache=kept) as old:
            wanted = old.generate(LONG, **OPTIONS).tokens
            assert new.generate("the", **OPTIONS).tokens
        found = new.generate(LONG, **OPTIONS)  # what the old one has written as it ended
        assert found.usage["cached_from"] == "disk" and found.tokens == wanted
    ends: list[list[int]] = []

    def use() -> None:
        for _ in range(3):
            with g3.load(chat_folder, prompt_cache=kept, prompt_cache_bytes=10**6) as engine:
                keep_one(engine)
                replies = [engine.generate(letter + LONG, **OPTIONS).tokens for letter in "abc"]
            ends.append([token for tokens in replies for token in tokens])

    both = [threading.Thread(target=use) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join(120)
    assert len(ends) == 6 and all(end == ends[0] for end in ends)
    assert all(path.suffix == ".prompt" for path in files(kept))


def test_answers_go_on_while_a_file_is_written_and_the_end_waits_for_a_while(
    chat_folder: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = threading.Event()

    def slow(self: PromptCache) -> None:
        writing.set()
        while not self._stopped:
            time.sleep(0.01)
        raise prompt_cache.Stopped

    monkeypatch.setattr(PromptCache, "_check", slow)
    monkeypatch.setattr(prompt_cache, "HELD_BYTES", 1)
    monkeypatch.setattr(prompt_cache, "CLOSE_SECONDS", 0.3)
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        keep_one(engine)
        engine.generate(LONG, **OPTIONS)
        engine.generate("a" + LONG, **OPTIONS)  # the first one leaves
        assert writing.wait(20)
        held = cache_of(engine).held
        for letter in "bcd":
            assert engine.generate(letter + LONG, **OPTIONS).tokens
        assert cache_of(engine).held == held > 0, "no more than one waits"
        began = time.monotonic()
    assert time.monotonic() - began < 5 and files(kept) == []


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_timelines_go_out_and_come_back_while_eight_are_answered(chat_folder: Path, kept: Path, seed: int) -> None:
    heads = [f"{letter} {LONG}" for letter in "abcdef"]
    rng = random.Random(seed)
    asked = [rng.choice(heads) + rng.choice(("", " is it", " or the user")) for _ in range(40)]
    with g3.load(chat_folder) as engine:
        alone = {prompt: engine.generate(prompt, **OPTIONS).tokens for prompt in sorted(set(asked))}
    with g3.load(chat_folder, prompt_cache=kept, prompt_cache_bytes=4 * 10**6) as engine:
        keep_one(engine)
        for head in heads:
            engine.generate(head, **OPTIONS)
        sources = []
        left = iter(asked)
        lock = threading.Lock()

        def ask() -> None:
            while True:
                with lock:
                    prompt = next(left, None)
                if prompt is None:
                    return
                with engine.stream(prompt, **OPTIONS) as stream:
                    if rng.random() < 0.15:
                        stream.cancel()
                    reply = stream.reply
                whole = alone[prompt]
                assert reply.tokens == (whole[: len(reply.tokens)] if reply.finish_reason == "cancelled" else whole)
                sources.append(reply.usage["cached_from"])

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(120)
        assert len(sources) == 40 and sources.count("disk") >= 3
        assert engine.about["notes"] == []
    assert all(path.suffix == ".prompt" for path in files(kept))


def test_a_session_is_as_it_was(chat_folder: Path, kept: Path) -> None:
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        engine.generate(LONG, **OPTIONS)
        talk = engine.session()
        talk.send(LONG + "and", **OPTIONS).reply
    assert len(files(kept)) == 1  # of the prompt, none of the session
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        talk = engine.session()
        assert talk.send(LONG, **OPTIONS).reply.usage["cached_tokens"] == 0
        assert talk.send("and", **OPTIONS).reply.usage["cached_from"] == "memory"


def test_a_worker_keeps_prompts(chat_folder: Path, kept: Path) -> None:
    sources = []
    for _ in range(2):
        with Worker("--prompt-cache", str(kept), "--prompt-cache-size", "1GB") as worker:
            assert worker.ask({"id": 1, "op": "load", "model": str(chat_folder)})["kind"] == "ok"
            done = worker.ask({"id": 2, "op": "generate", "prompt": LONG, "options": {"max_tokens": 2}})
            sources.append(done["usage"]["cached_from"])
            assert worker.close() == 0
    assert sources == ["", "disk"]

"""Prompts kept on disk: found again and exact, never an error, and never more than their folder may hold."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import safetensors.numpy
import tiny
import tiny_tokenizer
from PIL import Image
from worker_process import Worker

import mlx_gemma3 as g3
from mlx_gemma3.boundary.sizes import read_size
from mlx_gemma3.errors import OptionError
from mlx_gemma3.model.cache_state import state_of
from mlx_gemma3.runtime import prompt_cache, state_file
from mlx_gemma3.runtime.prompt_cache import PromptCache
from mlx_gemma3.runtime.scheduler import Scheduler
from mlx_gemma3.runtime.timeline import Tokens

sys.path.insert(0, str(Path(__file__).resolve().parent / "fuzz"))
from mutate import mutate_bytes
from test_sessions import forged

LONG = "the user is in the model and the user is in the model " * 13  # over 256 tokens; the window is 16
OPTIONS: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def cache_of(engine: g3.Engine) -> PromptCache:
    scheduler = engine._thread._scheduler
    assert scheduler is not None and scheduler.prompts is not None
    return scheduler.prompts


def wait_for(happened: Callable[[], object], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.005)


def keep_one(engine: g3.Engine) -> None:
    """Of the timelines nobody uses only the last one stays in memory."""
    scheduler: Scheduler = engine._thread._scheduler  # type: ignore[assignment]
    scheduler.pool.budget = 0


@pytest.mark.parametrize("answer", [3, 60])  # within the window's slack, and far past it
def test_a_restart_finds_what_was_read_and_answers_as_memory_does(chat_folder: Path, kept: Path, answer: int) -> None:
    options = {"temperature": 0.0, "stop": ["\0"], "logprobs": 4}
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        assert engine.generate(LONG, max_tokens=answer, **options).usage["cached_from"] == ""
        assert files(kept) == []
    assert len(files(kept)) == 1
    with g3.load(chat_folder) as memory, g3.load(chat_folder, prompt_cache=kept) as disk:
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
    with g3.load(chat_folder, prompt_cache=kept) as engine:
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
    with g3.load(folder, prompt_cache=kept, **settings) as engine:
        engine.generate(LONG, **options)
        wanted = engine.generate(LONG + "the", **options)
    with g3.load(folder, prompt_cache=kept, **settings) as engine:
        found = engine.generate(LONG + "the", **options)
        assert found.usage["cached_from"] == "disk"
        assert (found.tokens, found.logprobs) == (wanted.tokens, wanted.logprobs)
    with g3.load(folder, prompt_cache=kept) as engine:  # 16 bits, float32: nothing of it serves here
        assert engine.generate(LONG + "the", **options).usage["cached_from"] == ""


def test_the_file_is_what_other_programs_call_safetensors(chat_folder: Path, kept: Path) -> None:
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        engine.generate(LONG, **OPTIONS)
        timeline = engine._thread._scheduler.pool.timelines[0]  # type: ignore[union-attr]
        wanted = {name: mx.array(rows) for name, rows in state_of(timeline.caches, first=256).arrays.items()}
        mx.eval(wanted)
    (path,) = files(kept)
    for arrays in (safetensors.numpy.load_file(path), mx.load(str(path), format="safetensors")):
        assert isinstance(arrays, dict) and arrays.keys() == wanted.keys()
        assert all(mx.array_equal(mx.array(arrays[name]), rows) for name, rows in wanted.items())


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


def test_short_ones_and_prefixes_of_others_are_not_written(chat_folder: Path, kept: Path) -> None:
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        engine.generate("the user", **OPTIONS)
    assert files(kept) == []
    for words in ("", "", "and then"):
        with g3.load(chat_folder, prompt_cache=kept) as engine:
            engine.generate(LONG + words, max_tokens=1)
    assert len(files(kept)) == 2
    with g3.load(chat_folder, prompt_cache=kept) as engine:  # goes on by a few tokens: it can do all that the first can
        first = engine.generate(LONG, **OPTIONS)
        wait_for(lambda: not cache_of(engine).held)
    assert first.usage["cached_from"] == "disk" and len(files(kept)) == 2
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        assert engine.generate(LONG, **OPTIONS).usage["processed_tokens"] <= 1


def test_the_folder_has_a_budget_and_what_was_used_last_stays(chat_folder: Path, kept: Path) -> None:
    kept.mkdir()
    others = {kept / name: b"x" * 9 for name in ("notes.txt", "gemma3-.prompt", ".hidden", "model.safetensors")}
    for path, raw in others.items():
        path.write_bytes(raw)
    prompts = [letter + LONG for letter in "abcd"]
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        engine.generate(prompts[0], **OPTIONS)
    (one,) = (path for path in files(kept) if path not in others)
    size = one.stat().st_size
    with g3.load(chat_folder, prompt_cache=kept, prompt_cache_bytes=int(3.5 * size)) as engine:
        keep_one(engine)
        for prompt in (*prompts[1:3], prompts[0], "the user"):
            engine.generate(prompt, **OPTIONS)
            wait_for(lambda: not cache_of(engine).held)
            time.sleep(0.02)
        engine.generate(prompts[3], **OPTIONS)
    ours = [path for path in files(kept) if path not in others]
    assert len(ours) == 3 and sum(path.stat().st_size for path in ours) <= 3.5 * size
    assert all(path.read_bytes() == raw for path, raw in others.items())
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        found = [engine.generate(prompt, **OPTIONS).usage["cached_from"] for prompt in prompts]
        assert found == ["disk", "", "disk", "disk"]  # the second was not used for longest
    shutil.rmtree(kept)
    with g3.load(chat_folder, prompt_cache=kept, prompt_cache_bytes=int(2.5 * size)) as engine:
        for prompt in prompts:
            engine.generate(prompt, **OPTIONS)
    with g3.load(chat_folder, prompt_cache=kept) as engine:  # written as it closed: again those used last stay
        found = [engine.generate(prompt, **OPTIONS).usage["cached_from"] for prompt in prompts]
        assert found == ["", "", "disk", "disk"]
    shutil.rmtree(kept)
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        for prompt in prompts:
            engine.generate(prompt, **OPTIONS)
    with g3.load(chat_folder, prompt_cache=kept, prompt_cache_bytes=int(1.5 * size)) as engine:  # a smaller one now
        assert [engine.generate(prompt, **OPTIONS).usage["cached_from"] for prompt in prompts] == ["", "", "", "disk"]
    for path, raw in others.items():
        path.write_bytes(raw)
    with g3.load(chat_folder, prompt_cache=kept, prompt_cache_bytes=1) as engine:
        engine.generate(prompts[0], **OPTIONS)
    assert set(files(kept)) == set(others)
    with pytest.raises(OptionError, match="prompt_cache_bytes"):
        g3.load(chat_folder, prompt_cache_bytes=0)


def test_what_was_damaged_cut_or_forged_is_passed_over(chat_folder: Path, kept: Path) -> None:
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        wanted = engine.generate(LONG, **OPTIONS).tokens
    (path,) = files(kept)
    raw, rng = path.read_bytes(), random.Random(1)
    damaged = [raw[:length] for length in (0, 7, 3000, len(raw) // 2, len(raw) - 1)]
    damaged += [mutate_bytes(raw, rng, head=rng.choice((None, 9000))) for _ in range(12)]
    notes = set()
    for number, bad in enumerate(damaged):
        path.write_bytes(bad)
        with g3.load(chat_folder, prompt_cache=kept) as engine:
            reply = engine.generate(LONG, **OPTIONS)
            assert reply.tokens == wanted, number
            assert reply.usage["cached_from"] == ("disk" if bad == raw else ""), number
            assert len(engine.about["notes"]) <= 1
            notes |= set(engine.about["notes"])
        assert path.read_bytes() == raw, "a good one takes its place"
    assert any("damaged" in note for note in notes)
    for _ in range(10):  # with a digest that fits: whatever it says, nobody is told an error
        path.write_bytes(forged(raw, rng))
        with g3.load(chat_folder, prompt_cache=kept) as engine:
            assert engine.generate(LONG, **OPTIONS).finish_reason in ("stop", "length")
            assert engine.generate("the user", **OPTIONS).tokens


def test_damage_that_comes_while_it_is_open_is_told_once(chat_folder: Path, kept: Path) -> None:
    prompts = [letter + LONG for letter in "abc"]
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        wanted = [engine.generate(prompt, **OPTIONS).tokens for prompt in prompts]
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        engine.generate("the", **OPTIONS)  # the files' headers are known now
        assert len(cache_of(engine).files._kept) == 3
        (one, two, three) = files(kept)
        one.write_bytes(one.read_bytes()[:-1])
        two.write_bytes(two.read_bytes()[:-9] + b"123456789")
        three.unlink()
        assert [engine.generate(prompt, **OPTIONS).tokens for prompt in prompts] == wanted
        assert len(engine.about["notes"]) == 1 and "damaged" in engine.about["notes"][0]
        assert files(kept) == []


def test_another_model_finds_nothing_and_deletes_nothing(chat_folder: Path, tmp_path: Path, kept: Path) -> None:
    other = shutil.copytree(chat_folder, tmp_path / "other")
    tiny.write_folder(other, tiny.image_config(), tiny.random_tensors(tiny.image_config(), seed=9))
    for _ in range(2):
        for folder in (chat_folder, other):
            with g3.load(folder, prompt_cache=kept) as engine:
                engine.generate(LONG, **OPTIONS)
    assert len(files(kept)) == 2
    first, second = files(kept)
    first.write_bytes(second.read_bytes())  # under a name of the other one
    for folder in (chat_folder, other):
        with g3.load(folder, prompt_cache=kept) as engine, g3.load(folder) as plain:
            assert engine.generate(LONG, **OPTIONS).tokens == plain.generate(LONG, **OPTIONS).tokens


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


def test_a_folder_that_cannot_be_written_is_a_note(chat_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "in it", "nul\0", "~nobody-of-that-name/\0"):
        with g3.load(chat_folder, prompt_cache=place) as engine:
            (note,) = engine.about["notes"]
            assert note.startswith("prompts are not kept on disk: ") and "can be written" in note
            assert engine.generate(LONG, **OPTIONS).tokens and len(engine.about["notes"]) == 1
    with pytest.raises(OptionError, match="prompt_cache"):
        g3.load(chat_folder, prompt_cache=7)  # type: ignore[arg-type]


def test_a_full_disk_is_told_once_and_leaves_nothing(
    chat_folder: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def full(*_: Any, **__: Any) -> str:
        tries.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state_file, "write", full)
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        keep_one(engine)
        for letter in "abcd":
            assert engine.generate(letter + LONG, **OPTIONS).tokens
            wait_for(lambda: not cache_of(engine).held)
        (note,) = engine.about["notes"]
        assert "full disk" in note and "\n" not in note
    assert len(tries) == 1 and files(kept) == []


def test_the_folder_and_its_files_are_their_owners_alone(chat_folder: Path, kept: Path) -> None:
    mask = os.umask(0)
    try:
        with g3.load(chat_folder, prompt_cache=kept / "deep") as engine:
            engine.generate(LONG, **OPTIONS)
    finally:
        os.umask(mask)
    (path,) = files(kept / "deep")
    assert stat.S_IMODE((kept / "deep").stat().st_mode) == 0o700 and stat.S_IMODE(path.stat().st_mode) == 0o600


WRITE = """
import sys, time
import mlx_gemma3 as g3
from mlx_gemma3.runtime.prompt_cache import PromptCache
def slow(self):
    print("writing", flush=True)
    time.sleep(60)
PromptCache._check = slow
with g3.load(sys.argv[1], prompt_cache=sys.argv[2]) as engine:
    engine.generate(sys.argv[3], max_tokens=1)
"""


def test_killed_while_it_writes_nothing_is_left(chat_folder: Path, kept: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(chat_folder), str(kept), LONG], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "writing\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert [path.suffix for path in files(kept)] == [".writing"]
    with g3.load(chat_folder, prompt_cache=kept) as engine:
        assert files(kept) == []
        assert engine.generate(LONG, **OPTIONS).usage["cached_from"] == ""


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


@pytest.mark.parametrize("seed", [0, 1])
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


def test_sizes_are_read_as_people_write_them() -> None:
    sizes = {"20GB": 20 * 10**9, "1.5 MiB": 3 << 19, "7": 7, "12b": 12, "3k": 3000, "2tb": 2 * 10**12}
    assert {text: read_size("x", text) for text in sizes} == sizes
    for wrong in ("", "GB", "-1GB", "0", "0.1", "20 gigs", "1e9", "nan", "9" * 16, "1.2.3MB"):
        with pytest.raises(OptionError, match="20GB"):
            read_size("x", wrong)

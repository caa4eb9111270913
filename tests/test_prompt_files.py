"""The folder of prompts on disk: what is written, what goes, what is passed over, what is told."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import safetensors.numpy
import tiny

import mlx_gemma3 as g3
from mlx_gemma3.boundary.sizes import read_size
from mlx_gemma3.errors import OptionError
from mlx_gemma3.model.cache_state import state_of
from mlx_gemma3.runtime import state_file

sys.path.insert(0, str(Path(__file__).resolve().parent / "fuzz"))
from kept import LONG, OPTIONS, cache_of, files, keep_one, wait_for
from mutate import mutate_bytes
from test_sessions import forged


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept"


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


def test_sizes_are_read_as_people_write_them() -> None:
    sizes = {"20GB": 20 * 10**9, "1.5 MiB": 3 << 19, "7": 7, "12b": 12, "3k": 3000, "2tb": 2 * 10**12}
    assert {text: read_size("x", text) for text in sizes} == sizes
    for wrong in ("", "GB", "-1GB", "0", "0.1", "20 gigs", "1e9", "nan", "9" * 16, "1.2.3MB"):
        with pytest.raises(OptionError, match="20GB"):
            read_size("x", wrong)

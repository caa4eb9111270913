"""One schedule for several machines: everything that an engine does, on 2 and 4 of them, as on one. No network."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_adapter
import tiny_tokenizer
from machines import Meeting, Threads, engine_on, together
from places import PICTURES, TEMPLATE

import mlx_gemma3 as g3
from mlx_gemma3.checkpoint.load import load_model
from mlx_gemma3.errors import DeviceLost, OptionError, SessionError
from mlx_gemma3.model.runner import Runner, on_device
from mlx_gemma3.model.shard import Shard
from mlx_gemma3.runtime.engine import Engine
from mlx_gemma3.runtime.follow import Follower, LeadingRunner, Log
from mlx_gemma3.runtime.machines import Machines

GREEDY: dict[str, Any] = {"temperature": 0.0}
LONG = "one two three four five six seven eight nine ten " * 3
HEART, TRIANGLE = str(PICTURES / "heart.png"), str(PICTURES / "triangle.png")


def written(folder: Path, **changes: Any) -> Path:
    """A checkpoint that is tuned for chat and sees; the second of its three layers is global."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = tiny.image_config(num_hidden_layers=3, layer_types=kinds, **changes)
    tiny.write_folder(folder, config, tiny.random_tensors(config, seed=4))
    tiny_tokenizer.write_tokenizer(folder)
    shutil.copy(TEMPLATE, folder / "tokenizer_config.json")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("machines") / "tiny-it")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[Engine]:
    with g3.load(folder, parallel=4) as engine:
        yield engine


def talk(engine: Engine, place: Path) -> list[Any]:
    """What an engine does in a day: pictures, joins, leaves, cancels, rewinds, forks, sessions. Greedy ids."""
    found: list[Any] = []
    found.append(engine.generate("What is this?", images=[HEART], max_tokens=8, **GREEDY).tokens)
    found.append(engine.generate("What is this?", images=[TRIANGLE], max_tokens=8, **GREEDY).tokens)  # rewinds
    streams = [engine.stream(f"{number} {LONG * number}", max_tokens=6 + 3 * number, **GREEDY) for number in range(3)]
    endless = engine.stream("And you?", max_tokens=500, **GREEDY)
    found.append(streams[0].reply.tokens)
    endless.cancel()
    found += [stream.reply.tokens for stream in streams]
    found.append(endless.reply.finish_reason)
    found.append([reply.tokens for reply in engine.generate(LONG, n=3, max_tokens=4, temperature=1.0, seed=5)])  # forks
    found.append(engine.generate(f"2 {LONG * 2}", max_tokens=5, **GREEDY).tokens)
    session = engine.session(system="Be brief.")
    found.append(session.send("A picture", images=[HEART], max_tokens=6, **GREEDY).reply.tokens)
    found.append(session.send(LONG, max_tokens=6, **GREEDY).reply.tokens)
    session.undo()
    found.append(session.send("Something else", max_tokens=6, **GREEDY).reply.tokens)
    found.append(session.retry(max_tokens=4, **GREEDY).reply.tokens)
    session.save(place)
    resumed = engine.session(resume=place)
    found.append(resumed.send("Go on", max_tokens=6, **GREEDY).reply.tokens)
    held = engine.generate("Yes or no?", choices=["yes", "no"], **GREEDY)
    found.append(held.text)
    found.append(engine.generate(list(range(10, 40)), max_tokens=3, logprobs=2, **GREEDY).tokens)
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_an_engine_on_several_machines_says_what_it_says_on_one(
    folder: Path, alone: Engine, tmp_path: Path, size: int
) -> None:
    wanted = talk(alone, tmp_path / "one")
    with engine_on(size, folder, parallel=4) as engine:
        assert talk(engine, tmp_path / "several") == wanted


@pytest.mark.parametrize(
    ("bits", "sizes"),
    [({"kv_bits": 4, "local_kv_bits": 8}, (2, 4)), pytest.param({"kv_bits": 8}, (4, 2), marks=pytest.mark.slow)],
)
def test_packed_caches_and_sessions_go_from_any_number_of_machines_to_any_other(
    tmp_path: Path, bits: dict[str, int], sizes: tuple[int, ...]
) -> None:
    folder = written(tmp_path / "model", head_dim=64)
    saved = tmp_path / "saved"

    def begin(engine: Engine) -> None:
        session = engine.session()
        session.send(LONG, images=[HEART], max_tokens=20, **GREEDY).reply
        session.send("More", max_tokens=6, **GREEDY).reply
        session.save(saved)

    def go_on(engine: Engine) -> tuple[list[int], bool]:
        session = engine.session(resume=saved)
        reply = session.send("And now?", max_tokens=8, **GREEDY).reply
        session.undo()  # the border before it came with the file, or is kept
        other = session.send("Or now?", max_tokens=4, **GREEDY).reply
        return [*reply.tokens, *other.tokens], reply.usage["cached_tokens"] > 60

    with g3.load(folder, **bits) as engine:
        begin(engine)
        wanted = go_on(engine)
    assert wanted[1]
    for size in sizes:
        with engine_on(size, folder, **bits) as engine:
            assert go_on(engine) == wanted
            begin(engine)
        with g3.load(folder, **bits) as engine:
            assert go_on(engine) == wanted


def test_adapters_and_prompts_on_disk(folder: Path, tmp_path: Path) -> None:
    config = tiny.image_config(num_hidden_layers=3)
    adapters = {"a": tiny_adapter.write(tmp_path / "adapter", config, dora=True)}
    prompts = LONG * 6

    def ask(engine: Engine) -> list[list[int]]:
        streams = [engine.stream(prompts, max_tokens=5, adapter=name, **GREEDY) for name in (None, "a")]
        return [stream.reply.tokens for stream in streams]

    with g3.load(folder, adapters=adapters) as engine:
        wanted = ask(engine)
    for _ in range(2):
        with engine_on(2, folder, adapters=adapters, prompt_cache=tmp_path / "prompts") as engine:
            assert ask(engine) == wanted
    with g3.load(folder, adapters=adapters, prompt_cache=tmp_path / "prompts") as engine:
        reply = engine.generate(prompts, max_tokens=5, **GREEDY)
        assert reply.tokens == wanted[0] and reply.usage["cached_tokens"] > 100


def test_a_single_key_value_head_is_repeated(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", num_key_value_heads=1)
    with g3.load(folder) as engine:
        wanted = engine.generate(LONG, max_tokens=6, **GREEDY).tokens
    with engine_on(4, folder) as engine:
        session = engine.session()
        assert session.send(LONG, max_tokens=6, **GREEDY).reply.tokens == wanted
        session.save(tmp_path / "saved")
    with g3.load(folder) as engine:
        assert len(engine.session(resume=tmp_path / "saved").send("More", max_tokens=3, **GREEDY).reply.tokens) == 3


def test_what_is_refused_is_refused_on_all_machines_and_they_go_on(folder: Path, tmp_path: Path) -> None:
    with engine_on(2, folder) as engine:
        with pytest.raises(OptionError, match="models on several machines: got a second one, want one at a time"):
            g3.load(folder)
        with pytest.raises(g3.Gemma3Error):
            engine.generate(LONG * 200, max_tokens=2)
        (tmp_path / "torn").write_bytes(b"torn")
        with pytest.raises(SessionError):
            engine.session(resume=tmp_path / "torn")
        assert engine.generate("Hello", max_tokens=2, **GREEDY).usage["completion_tokens"] == 2
    with pytest.raises(OptionError, match="machines: got 3, want 1 or 2 or 4"), engine_on(3, folder):
        pass


def test_a_machine_that_lacks_the_model_says_so_and_the_others_too() -> None:
    def work(shard: Shard) -> str:
        machines = Machines(shard.group, shard.rank, shard.size)

        def opened() -> None:
            if shard.rank == 1:
                raise OptionError("model", got="nothing")

        with pytest.raises(g3.Gemma3Error) as found:
            machines.agree(opened)
        return str(found.value)

    said = together(3, work)
    assert said[1] == "model: got nothing"
    assert said[0] == said[2] == "machine 2 of 3: got an error, want the model there too; it says which"


def test_the_log_carries_commands_of_any_length() -> None:
    commands: list[list[Any]] = [["beat", 0.0], ["read", list(range(5000))], ["x", "y" * 507], ["step", ["ä", None]]]

    def work(shard: Shard) -> list[list[Any]]:
        assert shard.group is not None
        log = Log(shard.group)
        if shard.rank:
            return [log.read() for _ in commands]
        for command in commands:
            log.write(command)
        return commands

    assert together(3, work) == [commands] * 3


def test_guesses_are_verified_and_taken_back_on_all_machines(folder: Path) -> None:
    """Runner.verify and take_back, several tokens of two sequences at once."""

    def ask(runner: Runner) -> list[np.ndarray]:
        one, two = runner.make_caches(), runner.make_caches()
        for caches, length in ((one, 30), (two, 9)):
            runner.read([list(range(5, 5 + length))], None, caches, last_only=True)
        found = [runner.verify(mx.array([7, 8, 9, 10]), [one, two], [3, 1], [3, 1])]
        runner.take_back([one, two], [2, 0])
        found.append(runner.verify(mx.array([11, 12, 13]), [one, two], [1, 2], [1, 1]))
        found.append(runner.step(mx.array([14, 15]), [one, two]))
        return [np.array(logits) for logits in found]

    def work(shard: Shard) -> list[np.ndarray]:
        assert shard.group is not None
        model, log = load_model(folder, shard=shard), Log(shard.group)
        if shard.rank:
            Follower(on_device(model), log).follow()
            return []
        runner = on_device(model, kind=LeadingRunner)
        assert isinstance(runner, LeadingRunner)
        runner.lead(log, 1.0, lambda error: DeviceLost("test"), lambda: None)
        found = ask(runner)
        runner.close()
        return found

    wanted = ask(on_device(load_model(folder)))
    for logits, other in zip(together(2, work)[0], wanted, strict=True):
        assert np.abs(logits - other).max() < 1e-4


def test_a_machine_that_falls_silent_ends_the_answers_with_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum that never ends: those that wait are told by the thread beside."""
    from mlx_gemma3.runtime import machines as module

    left: list[g3.Gemma3Error] = []
    monkeypatch.setattr(Machines, "leave", staticmethod(left.append))
    monkeypatch.setattr(Machines, "_beat", lambda machines: None)
    monkeypatch.setattr(module, "LIMIT", 1.0)
    monkeypatch.setattr(module, "GRACE", 0.0)
    machines = Machines(Threads(Meeting(2), 0), 0, 2)
    machines.limit = 1.0
    told: list[g3.Gemma3Error] = []
    machines._tell = told.append
    machines.watch()
    while not left:
        time.sleep(0.05)
    assert told == left and isinstance(left[0], DeviceLost)
    assert "machine 1 of 2: got nothing from the others for 1 seconds, want to hear from all the others" in str(left[0])

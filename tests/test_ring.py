"""Several processes over MLX's ring: the same answers, and what becomes of the others when one dies or hangs."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer
from places import PICTURES, TEMPLATE
from ranks import Rank, ranks

import mlx_gemma3 as g3

HEART = str(PICTURES / "heart.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, one of each kind."""
    folder = tmp_path_factory.mktemp("ring") / "tiny-it"
    kinds = ["sliding_attention", "full_attention"]
    config = tiny.image_config(num_hidden_layers=2, layer_types=kinds, max_position_embeddings=100_000)
    tiny.write_folder(folder, config, tiny.random_tensors(config, seed=4))
    tiny_tokenizer.write_tokenizer(folder)
    shutil.copy(TEMPLATE, folder / "tokenizer_config.json")
    return folder


@pytest.mark.parametrize("size", [2, 4])
def test_generate_over_the_ring_answers_as_alone(folder: Path, size: int) -> None:
    asked = ("What is this?", "-m", str(folder), "-i", HEART, "--max-tokens", "5", "--temperature", "0")
    with g3.load(folder) as engine:
        wanted = engine.generate("What is this?", images=[HEART], max_tokens=5, temperature=0, logprobs=3)
    with ranks(size, "generate", *asked, "--json", "--logprobs", "3") as processes:
        assert [process.wait() for process in processes] == [0] * size
        assert [process.told for process in processes] == [[]] * size
        assert [process.out for process in processes[1:]] == [[]] * (size - 1)
        done = json.loads(processes[0].out[-1])
    assert done["tokens"] == wanted.tokens
    assert wanted.logprobs is not None
    for one, other in zip(done["logprobs"], wanted.logprobs, strict=True):
        assert abs(one["logprob"] - other["logprob"]) < 1e-3
        assert [token for token, *_ in one["top"]] == [token for token, *_ in other["top"]]


def answering(first: Rank) -> None:
    """Wait for the first lines of its answer."""
    while len(first.out) < 3:
        assert first.process.poll() is None, first.told
        time.sleep(0.05)


ENDLESS = ("generate", "Hello", "--json", "--temperature", "0", "--max-tokens", "90000", "--logit-bias", "1=-100")


def end_one(folder: Path, size: int, victim: int, number: int, limit: float) -> float:
    """Send a signal to a rank while the first one answers; seconds until all others have ended, as they should."""
    with ranks(size, *ENDLESS, "--logit-bias", "106=-100", "-m", str(folder), limit=limit) as processes:
        answering(processes[0])
        processes[victim].process.send_signal(number)
        began = time.monotonic()
        for one in processes:
            if one.rank == victim:
                continue
            assert one.wait(limit + 30) == 1, (one.rank, one.told)
            if one.rank == 0:
                last = json.loads(one.out[-1])
                assert (last["kind"], last["code"]) == ("error", "device_lost"), last
            assert len(one.told) == 1, one.told
            assert one.told[0].startswith(f"mlx-gemma3: machine {one.rank + 1} of {size}: got "), one.told
        return time.monotonic() - began


def test_the_others_end_when_one_is_killed(folder: Path) -> None:
    assert end_one(folder, 2, 1, signal.SIGKILL, 60) < 30


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_any_rank_may_be_killed_at_any_time(folder: Path, size: int) -> None:
    """20 times, each rank in turn."""
    for turn in range(20):
        assert end_one(folder, size, turn % size, signal.SIGKILL, 60) < 30


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_when_one_hangs(folder: Path, victim: int) -> None:
    assert end_one(folder, 2, victim, signal.SIGSTOP, 20) < 30


@pytest.mark.slow
def test_the_others_end_when_mlx_launch_does(folder: Path) -> None:
    with ranks(2, *ENDLESS, "--logit-bias", "106=-100", "-m", str(folder)) as processes:
        answering(processes[0])
        processes[1].close_stdin()
        assert processes[1].wait(30) == processes[0].wait(30) == 1
        assert "got the end of mlx.launch" in processes[1].told[0]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_the_270m_answers_as_alone(size: int) -> None:
    """With its single key-value head, from a GGUF."""
    asked = "The capital of France is"
    with g3.load("gemma-3-270m") as engine:
        wanted = engine.generate(asked, max_tokens=16, temperature=0, logprobs=1)
    words = ("generate", asked, "-m", "gemma-3-270m", "--max-tokens", "16", "--temperature", "0", "--json")
    with ranks(size, *words, "--logprobs", "1") as processes:
        assert processes[0].wait(400) == 0, processes[0].told
        done = json.loads(processes[0].out[-1])
    assert done["tokens"] == wanted.tokens
    assert wanted.logprobs is not None
    for one, other in zip(done["logprobs"], wanted.logprobs, strict=True):
        assert abs(one["logprob"] - other["logprob"]) < 1e-3

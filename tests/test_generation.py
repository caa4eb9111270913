"""Chunks, sampling and the decode loop, each against a plain restatement."""

from __future__ import annotations

import shutil
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_model import random_model, tiny_config

from mlx_gemma3.errors import ContextError, OptionError
from mlx_gemma3.generation import sampling
from mlx_gemma3.generation.batch import decode
from mlx_gemma3.generation.prefill import prefill, prefill_chunks
from mlx_gemma3.generation.sampling import Sampling, penalise, sample, top_candidates
from mlx_gemma3.model.runner import Runner


@pytest.fixture(scope="module")
def model() -> Runner:
    return Runner(random_model(tiny_config()))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=6), st.integers(0, 20), st.integers(1, 40))
def test_chunks_cover_everything_and_cut_no_block(plan: list[tuple[int, int]], tail: int, chunk: int) -> None:
    """`plan`: some text, then a picture, again and again; pictures with no text between them are one block."""
    spans, at = [], 0
    for text, picture in plan:
        spans.append((at + text, at + text + picture))
        at = spans[-1][1]
    length = at + tail
    chunks = prefill_chunks(length, spans, chunk)
    assert [0, *(end for _, end in chunks)] == [*(begin for begin, _ in chunks), length]
    joined = {b for (_, b), (c, _) in pairwise(spans) if b == c}
    for _, end in chunks[:-1]:
        assert end not in joined and not any(start < end < stop for start, stop in spans)
    for begin, end in chunks:
        assert begin < end
        if end - begin > chunk:  # only a block that is longer than a chunk, and it alone
            assert not any(start > begin for start, stop in spans if stop <= end and start not in joined)


def test_chunks_keep_the_size_and_prefer_to_stop_before_a_block() -> None:
    assert prefill_chunks(10, [], 4) == [(0, 4), (4, 8), (8, 10)]
    assert prefill_chunks(12, [(3, 7)], 4) == [(0, 3), (3, 7), (7, 11), (11, 12)]
    assert prefill_chunks(12, [(0, 6)], 4) == [(0, 6), (6, 10), (10, 12)]
    assert prefill_chunks(9, [(1, 3), (3, 5)], 3) == [(0, 1), (1, 5), (5, 8), (8, 9)]
    with pytest.raises(OptionError, match="chunk"):
        prefill_chunks(3, [], 0)


@pytest.mark.parametrize("size", [100, 2048, 2049, 4095, 5000, 262_144, 262_208])
@pytest.mark.parametrize("count", [1, 5, 64])
def test_top_candidates_are_the_sorted_best(size: int, count: int) -> None:
    rng = np.random.default_rng(size)
    logits = mx.array(np.array([rng.permutation(size) for _ in range(3)], dtype=np.float32))  # no two are equal
    logits[0, size - 1] = size  # in the rest that fills no block
    values, ids = top_candidates(logits, count)
    order = np.argsort(-np.array(logits), axis=-1)[:, :count]
    assert np.array_equal(np.array(ids), order)
    assert np.array_equal(np.array(values), np.take_along_axis(np.array(logits), order, axis=-1))


def allowed(logits: np.ndarray, sampling: Sampling) -> set[int]:
    """The ids that may be drawn, restated in NumPy from the rules of transformers' logits processors."""
    scores = logits / sampling.temperature
    kept = np.ones(scores.size, bool)
    if sampling.top_k:
        kept &= scores >= np.sort(scores)[-min(sampling.top_k, scores.size)]
    if sampling.top_p < 1:
        masked = np.where(kept, scores, -np.inf)
        order = np.argsort(masked)
        probabilities = np.exp(masked[order] - masked.max())
        probabilities /= probabilities.sum()
        removed = np.cumsum(probabilities) <= 1 - sampling.top_p
        removed[-1] = False
        kept[order[removed]] = False
    if sampling.min_p:
        masked = np.where(kept, scores, -np.inf)
        probabilities = np.exp(masked - masked.max())
        kept &= probabilities >= sampling.min_p * probabilities.max()
    return set(np.flatnonzero(kept).tolist())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7, top_k=5, top_p=1.0),
        Sampling(temperature=1.5, top_k=0, top_p=0.8),
        Sampling(temperature=2.0, top_k=20, top_p=0.6, min_p=0.1),
        Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.2),
        Sampling(temperature=1.0, top_k=1000, top_p=0.05),
    ],
    ids=str,
)
def test_every_allowed_id_is_drawn_and_no_other(sampling: Sampling) -> None:
    logits = np.random.default_rng(3).normal(0, 2, 60).astype(np.float32)
    rows = mx.array(np.tile(logits, (8_000, 1)))
    drawn = np.array(sample(rows, sampling, mx.random.split(mx.random.key(5), len(rows))))
    want = allowed(logits, sampling)
    assert set(drawn.tolist()) <= want
    scores = np.exp(logits[sorted(want)] / sampling.temperature)
    expected = scores / scores.sum()
    counts = np.array([(drawn == token).mean() for token in sorted(want)])
    assert np.abs(counts - expected).max() < 0.03  # 8,000 draws: five standard deviations of the largest share


def test_greedy_takes_the_best_and_needs_no_key() -> None:
    logits = mx.array([[0.0, 3.0, 2.9], [5.0, -1.0, 4.0]])
    assert sample(logits, Sampling(temperature=0), ()).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [9.9e-7, 1e-7, 1e-20, 1e-37, 1e-38, 1e-45, 1e-300, 5e-324])
@pytest.mark.parametrize("top_k", [0, 64])
def test_temperatures_next_to_nothing_are_greedy(temperature: float, top_k: int) -> None:
    """Also where dividing by them would overflow, or round the likeliest two to one."""
    logits = np.random.default_rng(3).normal(0, 3, (1, 5000)).astype(np.float32)
    logits[0, 777], logits[0, 4001] = 31.999998, 32.0
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=1.0)
    for seed in range(20):
        assert sample(mx.array(logits), sampling, [mx.random.key(seed)]).tolist() == [4001]


def test_the_least_temperature_that_draws_and_the_least_share() -> None:
    logits = mx.zeros((1, 100))
    drawn = {int(sample(logits, Sampling(temperature=1e-6), [mx.random.key(seed)]).item()) for seed in range(40)}
    assert len(drawn) > 5
    for share in (1e-30, 1e-45, 1e-300):
        best = mx.array([[0.0, 3.0, 1.0]])
        assert sample(best, Sampling(top_p=share, top_k=0), [mx.random.key(1)]).item() == 1


def test_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    got = penalise(mx.array([[2.0, -2.0, 2.0, -2.0]]), mx.array([[True, True, False, False]]), 2.0)
    assert got.tolist() == [[1.0, -4.0, 2.0, -2.0]]


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0), ("top_p", 1.1), ("min_p", 2),
     ("repetition_penalty", 0), ("seed", -1)],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"^{name}: got"):
        Sampling(**{name: value})  # type: ignore[arg-type]


def naive(model: Runner, ids: list[int], count: int, penalty: float = 1.0) -> list[int]:
    """Uncached greedy generation: what the loop must equal."""
    out: list[int] = []
    for _ in range(count):
        logits = np.array(model.model([ids + out], last_only=True))[0, 0]
        for token in set(ids + out):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        out.append(int(logits.argmax()))
    return out


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_the_pipelined_loop_is_naive_generation(model: Runner, penalty: float) -> None:
    ids = [2, 9, 17, 33, 5]
    caches = model.make_caches()
    logits = prefill(model, ids, caches, chunk=2)
    greedy = Sampling(temperature=0, repetition_penalty=penalty)
    got = list(decode(model, logits, caches, prompt=ids, sampling=greedy, max_tokens=40))
    assert got == naive(model, ids, 40, penalty)


def test_a_seed_repeats_an_answer_and_another_seed_gives_another(model: Runner) -> None:
    def run(seed: int | None) -> list[int]:
        caches = model.make_caches()
        logits = prefill(model, [2, 9], caches)
        return list(decode(model, logits, caches, sampling=Sampling(seed=seed, temperature=2), max_tokens=20))

    assert run(1) == run(1) != run(2)
    assert run(None) != run(None)


def test_the_context_is_a_border(model: Runner) -> None:
    limit = model.config.text.max_position_embeddings
    with pytest.raises(ContextError, match=f"{limit + 1} tokens, want at most {limit}"):
        prefill(model, [5] * (limit + 1), model.make_caches())
    caches = model.make_caches()
    logits = prefill(model, [5] * (limit - 3), caches)
    assert len(list(decode(model, logits, caches, sampling=Sampling(temperature=0), max_tokens=99))) == 3


@pytest.mark.skipif(shutil.which("g++") is None, reason="without it MLX compiles nothing on a CPU")
@pytest.mark.parametrize("settings", [{}, {"top_p": 1.0}, {"min_p": 0.05, "temperature": 0.7}, {"top_k": 0}])
def test_a_draw_in_one_kernel_is_the_same_draw(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = 3 * mx.random.normal((3, 5000), key=mx.random.key(5))
    options, keys = Sampling(**settings), [[mx.random.key(3 * turn + row) for row in range(3)] for turn in range(20)]
    plain = [sample(logits, options, three).tolist() for three in keys]
    monkeypatch.setattr(sampling, "_draw", mx.compile(sampling._draw.__wrapped__))
    assert [sample(logits, options, three).tolist() for three in keys] == plain

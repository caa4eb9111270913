"""Several sequences in one forward pass: each is what it would be alone, whoever joins or leaves beside it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
import pytest
from random_model import random_model, random_pictures, tiny_config, tokens_with_pictures

from mlx_gemma3.generation.batch import Batch, Row, decode
from mlx_gemma3.generation.choice import Chooser
from mlx_gemma3.generation.prefill import prefill
from mlx_gemma3.generation.sampling import Sampling
from mlx_gemma3.model import cache, cache_state, cpu
from mlx_gemma3.model.cache import Caches
from mlx_gemma3.model.fused import gpu_kernels
from mlx_gemma3.model.gemma3 import Gemma3
from mlx_gemma3.model.runner import Runner
from mlx_gemma3.runtime.timeline import FeatureCache, Timeline, Tokens, digest

NEAR = 1e-3
LIMIT = 4096
KINDS = ("plain", "gpu", "cpu")
SETTINGS = (
    Sampling(temperature=0),
    Sampling(temperature=0, repetition_penalty=1.3),
    Sampling(temperature=2.0, top_k=20),
    Sampling(temperature=1.5, top_k=0, top_p=0.9),
    Sampling(temperature=2.0, top_k=20, presence_penalty=0.7, frequency_penalty=0.2, logit_bias={9: 3.0}),
)


@pytest.fixture(autouse=True)
def small_slack(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The window is 8: with the usual slack nothing would ever leave it."""
    monkeypatch.setattr(cache, "SLACK", 4)
    yield


class Watched(Runner):
    """Keeps the logits of the last step."""

    def step(self, tokens: mx.array, rows: Sequence[Caches]) -> mx.array:
        logits = super().step(tokens, rows)
        self.last = dict(zip(map(id, rows), logits, strict=True))
        return logits


def runner_of(kind: str, model: Gemma3) -> Watched:
    if kind == "plain":
        return Watched(model)
    return Watched(model, cpu.kernels() if kind == "cpu" else gpu_kernels(compiled=False))


class Writer:
    """A conversation of ids and pictures that is asked again and again, and what must come of it."""

    def __init__(self, runner: Runner, seed: int, *, greedy: bool = False) -> None:
        self.random, self.settings = random.Random(seed), SETTINGS[:2] if greedy else SETTINGS
        self.runner, self.timeline = runner, Timeline(runner, runner.make_caches(), snapshot_bytes=1 << 30)
        self.prompt, self.pictures = Tokens(()), dict[str, np.ndarray]()
        self.row: Row | None = None
        self.written: list[int] = []
        self.sampling = SETTINGS[0]

    def say(self) -> None:
        plan = "".join(self.random.choice("ttttttI") for _ in range(self.random.randint(1, 25)))
        ids, spans = tokens_with_pictures(plan, seed=self.random.randrange(10**6))
        views = [random_pictures(1, seed=self.random.randrange(5))[0] for _ in spans]
        self.pictures |= {digest(view): view for view in views}
        if self.random.random() < 0.3 or len(self.prompt) > 200:  # an edit: from some turn on it was said otherwise
            self.prompt = Tokens(())
        answer = [token for token in self.written if token not in (58, 60)]
        self.prompt += Tokens(tuple(answer)) + Tokens(tuple(ids), tuple(spans), tuple(map(digest, views)))

    def start(self, features: FeatureCache) -> tuple[Row, mx.array]:
        if not len(self.prompt) or self.random.random() < 0.7:
            self.say()
        self.timeline.open(self.prompt)
        while self.timeline.logits is None:
            self.timeline.read_chunk(
                lambda n: features.get(self.runner, name := self.prompt.digests[n], self.pictures[name]),
                self.random.choice([3, 7, 100]),
            )
        chosen = self.random.choice(self.settings)
        self.sampling = Sampling(
            temperature=chosen.temperature,
            top_k=chosen.top_k,
            top_p=chosen.top_p,
            repetition_penalty=chosen.repetition_penalty,
            presence_penalty=chosen.presence_penalty,
            frequency_penalty=chosen.frequency_penalty,
            logit_bias=chosen.logit_bias,
            seed=self.random.randrange(10**6),
        )
        self.row = Row(self.timeline.caches, Chooser(self.sampling, self.prompt.ids), self.random.randint(1, 30))
        self.written = []
        return self.row, self.timeline.logits

    def check(self, model: Gemma3, last: mx.array | None) -> None:
        """What was written is what the same model writes alone, from the same prompt."""
        solo = runner_of("plain", model)
        caches = solo.make_caches()
        features = [solo.encode_images(self.pictures[name][None])[0] for name in self.prompt.digests]
        logits = prefill(solo, self.prompt.ids, caches, features=features, spans=self.prompt.spans)
        alone = list(
            decode(solo, logits, caches, prompt=self.prompt.ids, sampling=self.sampling, max_tokens=len(self.written))
        )
        assert self.written == alone
        if last is not None:
            read = self.timeline.caches.offset - len(self.prompt)
            pixels = np.stack([self.pictures[name] for name in self.prompt.digests]) if self.prompt.digests else None
            ids = [*self.prompt.ids, *[token if token not in (58, 59, 60) else -1 for token in self.written[:read]]]
            if -1 not in ids:
                assert mx.abs(model([ids], pixels, last_only=True)[0, 0] - last).max() < NEAR


def run(kind: str, seed: int, turns: int) -> None:
    model, chance = random_model(tiny_config(max_position_embeddings=LIMIT), seed=seed % 7), random.Random(seed)
    runner = runner_of(kind, model)
    features, batch = FeatureCache(), Batch(runner)
    writers = [Writer(runner, seed * 100 + number) for number in range(8)]
    for _ in range(turns):
        idle = [writer for writer in writers if writer.row is None]
        if idle and chance.random() < 0.6:
            writer = chance.choice(idle)
            batch.join(*writer.start(features))
        by_row = {id(writer.row): writer for writer in writers if writer.row is not None}
        if not by_row:
            continue
        for one in batch.next():
            by_row[id(one.row)].written.append(one.token)
        for writer in by_row.values():
            assert writer.row is not None
            if not writer.row.left or chance.random() < 0.05:  # its end, or a cancel
                last = runner.last.get(id(writer.row.caches)) if hasattr(runner, "last") else None
                batch.leave(writer.row)
                writer.row = None
                writer.timeline.wrote(tuple(writer.written))
                writer.check(model, last)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 3, 6, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4, 5))])
def test_every_row_is_what_it_is_alone(kind: str, seed: int) -> None:
    run(kind, seed, 40)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_of_a_hundred_sequences_is_what_it_is_alone(kind: str) -> None:
    for seed in range(100, 200):
        run(kind, seed, 60)


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles with it on a CPU")
def test_the_compiled_graph_of_several_rows_is_that_of_each() -> None:
    model = random_model(tiny_config())
    compiled, plain = Runner(model, gpu_kernels()), Runner(model)
    for lengths in ((3,), (3, 21), (40, 9, 3)):
        rows = [[runner.make_caches() for _ in lengths] for runner in (compiled, plain)]
        for runner, mine in zip((compiled, plain), rows, strict=True):
            for caches, length in zip(mine, lengths, strict=True):
                prefill(runner, list(range(4, 4 + length)), caches)
        tokens = mx.array([5, 9, 11][: len(lengths)])
        assert mx.abs(compiled.step(tokens, rows[0]) - plain.step(tokens, rows[1])).max() < 1e-4


@pytest.mark.parametrize("bits", [16, 8])
def test_a_fork_goes_its_own_way(bits: int) -> None:
    model = random_model(tiny_config(head_dim=64, query_pre_attn_scalar=64))
    runner = Runner(model)
    caches = runner.make_caches(kv_bits=bits, local_kv_bits=bits)
    logits = prefill(runner, list(range(4, 50)), caches)
    want = list(decode(runner, logits, caches.fork(), sampling=SETTINGS[0], max_tokens=30))
    one, two = caches.fork(), caches.fork()
    seeded = list(decode(runner, logits, one, sampling=Sampling(temperature=3, seed=1), max_tokens=30))
    assert list(decode(runner, logits, two, sampling=SETTINGS[0], max_tokens=30)) == want != seeded
    assert caches.offset == 46 and two.offset > 46
    assert list(decode(runner, logits, caches, sampling=SETTINGS[0], max_tokens=30)) == want


def test_a_state_makes_the_same_caches() -> None:
    runner = Runner(random_model(tiny_config()))
    caches = runner.make_caches()
    logits = prefill(runner, list(range(4, 40)), caches)
    caches.take_snapshot(logits, budget=1 << 30)
    for token in range(30):
        runner.step(mx.array([token + 4]), [caches])
    other = runner.make_caches()
    cache_state.restore(other, cache_state.state_of(caches))
    assert other.offset == caches.offset and other.reach(36) == caches.reach(36) == 36
    assert mx.array_equal(runner.step(mx.array([7]), [caches]), runner.step(mx.array([7]), [other]))
    assert mx.array_equal(other.rewind(36), logits)

"""Reuse changes nothing: whatever was said, edited or cancelled before, the logits are the uncached ones."""

from __future__ import annotations

import random
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from random_model import PER_IMAGE, WINDOW, random_model, random_pictures, tiny_config, tokens_with_pictures

from mlx_gemma3.errors import ContextError
from mlx_gemma3.generation.batch import decode
from mlx_gemma3.generation.sampling import Sampling
from mlx_gemma3.model import cache
from mlx_gemma3.model.runner import Runner
from mlx_gemma3.runtime.timeline import FeatureCache, Timeline, Tokens, digest

NEAR = 1e-3
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model() -> Runner:
    return Runner(random_model(tiny_config(max_position_embeddings=4096)))


@pytest.fixture(autouse=True)
def small_slack(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The window is 8: with the usual slack nothing would ever leave it."""
    monkeypatch.setattr(cache, "SLACK", 4)
    yield


class Talk:
    """A prompt as a list of turns, each of ids and pictures, and the timeline that reads it."""

    def __init__(self, model: Runner, seed: int, *, snapshot_bytes: int) -> None:
        self.model, self.random = model, random.Random(seed)
        self.timeline = Timeline(model, model.make_caches(), snapshot_bytes=snapshot_bytes)
        self.cache = FeatureCache(1 << 30)
        self.turns: list[tuple[list[int], list[tuple[int, int]], list[np.ndarray]]] = []

    def say(self, *, pictures: bool) -> None:
        letters = [self.random.choice("ttttttI" if pictures else "t") for _ in range(self.random.randint(1, 25))]
        ids, spans = tokens_with_pictures("".join(letters), seed=self.random.randrange(10**6))
        count = len(spans)
        self.turns.append((ids, spans, [random_pictures(1, seed=self.random.randrange(5))[0] for _ in range(count)]))

    def prompt(self) -> tuple[Tokens, list[np.ndarray]]:
        tokens, pictures = Tokens(()), []
        for ids, spans, views in self.turns:
            tokens += Tokens(tuple(ids), tuple(spans), tuple(map(digest, views)))
            pictures += views
        return tokens, pictures

    def read(self, *, cancel_after: int | None = None) -> mx.array | None:
        tokens, pictures = self.prompt()
        self.timeline.open(tokens)
        chunk, read = self.random.choice([3, 7, 100]), 0
        while self.timeline.logits is None and read != cancel_after:
            self.timeline.read_chunk(lambda n: self.cache.get(self.model, tokens.digests[n], pictures[n]), chunk)
            read += 1
        return self.timeline.logits

    def check(self, logits: mx.array) -> None:
        tokens, pictures = self.prompt()
        whole = self.model.model([list(tokens.ids)], np.stack(pictures) if pictures else None, last_only=True)
        assert mx.abs(logits - whole[:, 0]).max() < NEAR

    def act(self) -> str:
        action = self.random.choice(["say", "say", "say", "retry", "edit", "cancel", "swap", "again"])
        if not self.turns:
            self.say(pictures=True)
        elif action == "edit":  # another turn instead of one, and nothing after it
            del self.turns[self.random.randrange(len(self.turns)) :]
            self.say(pictures=True)
        elif action == "retry" and len(self.turns) > 1:  # the model's own turn is forgotten
            self.turns.pop()
        elif action == "swap":  # the same text with another picture
            for ids, spans, views in self.turns:
                if views:
                    views[self.random.randrange(len(views))] = random_pictures(1, seed=self.random.randrange(5, 9))[0]
                    assert len(spans) == len(views) and ids
                    break
        elif action == "cancel":
            self.say(pictures=True)
            if self.read(cancel_after=self.random.randint(0, 3)) is not None:
                action = "say"
        elif action != "again":
            self.say(pictures=True)
        if sum(len(ids) for ids, _, _ in self.turns) > 400:
            del self.turns[1:]
        return action

    def run(self, actions: int) -> None:
        for _ in range(actions):
            self.act()
            logits = self.read()
            assert logits is not None
            self.check(logits)
            if self.random.random() < 0.6:  # an answer, of which the last token need not be in the caches
                written = []
                for token in write(self.timeline, self.random.randint(1, 12)):
                    written.append(token)
                    if self.random.random() < 0.1:
                        break
                if 58 not in written and 60 not in written and self.random.random() < 0.8:
                    self.turns.append((written, [], []))


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_of_actions_gives_the_uncached_logits(model: Runner, seed: int) -> None:
    Talk(model, seed, snapshot_bytes=[0, 30_000, 1 << 30][seed % 3]).run(6)


@pytest.mark.slow
def test_a_thousand_sequences_give_the_uncached_logits() -> None:
    for seed in range(1000):
        if seed % 50 == 0:
            model = Runner(random_model(tiny_config(max_position_embeddings=4096), seed=seed))
        Talk(model, 1000 + seed, snapshot_bytes=[0, 30_000, 1 << 30][seed % 3]).run(6)


def text(count: int, seed: int) -> Tokens:
    return Tokens(tuple(np.random.default_rng(seed).integers(4, 58, count).tolist()))


def nothing(_: int) -> mx.array:
    raise AssertionError("no picture to read")


def processed(timeline: Timeline, prompt: Tokens) -> int:
    """Tokens that reading a prompt has cost."""
    reused = timeline.open(prompt)
    while timeline.logits is None:
        timeline.read_chunk(nothing)
    return timeline.caches.offset - reused


def write(timeline: Timeline, count: int) -> Iterator[int]:
    """A greedy answer after the prompt that was read; what was written is kept whenever it is left."""
    assert timeline.logits is not None
    written: list[int] = []
    try:
        steps = decode(timeline.runner, timeline.logits, timeline.caches, sampling=GREEDY, max_tokens=count)
        for token in steps:
            written.append(token)
            yield token
    finally:
        timeline.wrote(tuple(written))


def test_work_is_the_new_tokens_only_far_beyond_the_window(model: Runner) -> None:
    timeline = Timeline(model, model.make_caches())
    prompt = text(200, 0)
    assert processed(timeline, prompt) == 200
    answer = []
    for turn in range(5):
        answer = list(write(timeline, 30))
        before = prompt
        prompt = prompt + Tokens(tuple(answer)) + text(10, turn)
        assert processed(timeline, prompt) == 11  # the last token written was never read
    assert processed(timeline, prompt) == 0  # the answer once more: its first logits are known
    edited = before + Tokens(tuple(answer)) + text(10, 99)
    assert processed(timeline, edited) <= 11
    assert processed(timeline, text(30, 7)) == 30


def test_what_left_the_window_without_a_snapshot_is_read_again(model: Runner) -> None:
    timeline = Timeline(model, model.make_caches(), snapshot_bytes=0)
    prompt = text(100, 0)
    processed(timeline, prompt)
    assert timeline.caches.reach(99) == 99 and timeline.caches.reach(60) == 0
    assert processed(timeline, prompt.head(50) + text(20, 1)) == 70


def test_snapshots_stay_within_their_budget_and_the_oldest_goes_first(model: Runner) -> None:
    timeline = Timeline(model, model.make_caches())
    prompt = text(20, 0)
    for turn in range(8):
        processed(timeline, prompt)
        prompt = prompt + text(20, turn)
    one = timeline.caches.snapshots[-1].nbytes
    positions = [snapshot.position for snapshot in timeline.caches.snapshots]
    timeline.snapshot_bytes = 3 * one
    processed(timeline, prompt)
    assert [snapshot.position for snapshot in timeline.caches.snapshots] == [*positions[-2:], len(prompt)]


def test_a_border_is_never_inside_an_image_block() -> None:
    block = Tokens((1, 60, 60, 60, 60, 2), ((1, 5),), ("a" * 32,))
    other = Tokens((1, 60, 60, 60, 60, 2), ((1, 5),), ("b" * 32,))
    touching = Tokens((1, *[60] * 8, 2), ((1, 5), (5, 9)), ("a" * 32, "b" * 32))
    assert block.shared(block) == 6 and block.shared(other) == 1
    assert touching.shared(Tokens((1, *[60] * 8, 2), ((1, 5), (5, 9)), ("a" * 32, "c" * 32))) == 1
    assert touching.shared(Tokens(touching.ids, touching.spans, touching.digests)) == 10
    longer = Tokens((1, 7), ()) + block
    assert longer.spans == ((3, 7),) and longer.head(7).spans == ((3, 7),) and not longer.head(3).spans


def test_the_tower_runs_once_for_each_picture_and_again_after_its_rows_were_dropped(model: Runner) -> None:
    rows = FeatureCache()
    views = random_pictures(3)
    for view in (views[0], views[1], views[0], views[2], views[1]):
        rows.get(model, digest(view), view)
    assert rows.encoded == 3
    small = FeatureCache(budget=1)
    for view in (views[0], views[0], views[1], views[0]):
        small.get(model, digest(view), view)
    assert small.encoded == 3


def test_a_prompt_too_long_is_refused_and_nothing_is_lost(model: Runner) -> None:
    timeline = Timeline(model, model.make_caches())
    prompt = text(50, 0)
    processed(timeline, prompt)
    with pytest.raises(ContextError, match="61 tokens, want at most 60"):
        timeline.open(prompt + text(11, 1), limit=60)
    assert processed(timeline, prompt + text(5, 1)) == 5


def test_local_caches_do_not_grow_and_a_step_copies_none(model: Runner) -> None:
    timeline = Timeline(model, model.make_caches())
    processed(timeline, text(20, 0))
    sizes, peaks = set(), []
    for count, _ in enumerate(write(timeline, 600)):
        local = [layer for layer in timeline.caches if isinstance(layer, cache.WindowCache)]
        sizes.add(sum(layer.nbytes for layer in local))
        if count in (250, 500):
            mx.synchronize()
            peaks.append(mx.get_active_memory())
    assert len(sizes) == 1 and len(local) == 7
    assert local[0].capacity == WINDOW - 1 + 2 * 4 and PER_IMAGE == 4
    assert peaks[1] - peaks[0] < 200_000  # two steps of the one global layer


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("local", [16, 8])
def test_packed_keys_and_values_are_near_and_small(bits: int, local: int) -> None:
    model = random_model(tiny_config(head_dim=64, query_pre_attn_scalar=64))
    ids, spans = tokens_with_pictures("t" * 30 + "I" + "t" * 30)
    pixels = random_pictures(len(spans))
    plain, packed = model.make_caches(), model.make_caches(kv_bits=bits, local_kv_bits=local)
    want = model([ids], pixels, plain, last_only=True)
    got = model([ids], pixels, packed, last_only=True)
    for token in (5, 9, 30):
        want, got = (Runner(model).step(mx.array([token]), [caches])[:, None] for caches in (plain, packed))
    spread = mx.sqrt(mx.var(want)).item()
    error = mx.sqrt(((want - got) ** 2).mean()).item()
    assert 0 < error < {8: 0.05, 4: 0.5}[min(bits, local)] * spread  # type: ignore[operator]
    far = [index for index in range(8) if model.config.text.is_global(index)]
    sizes = [caches[far[0]].nbytes for caches in (plain, packed)]
    assert sizes[1] / sizes[0] == pytest.approx({8: (1 + 8 / 64) / 4, 4: (0.5 + 8 / 64) / 4}[bits])


def test_room_for_what_is_expected_is_made_once() -> None:
    """Growing by steps would copy all keys and values each time."""
    runner = Runner(random_model(tiny_config()))
    caches = runner.make_caches()
    caches.expect(700)
    room = set()
    for start in range(0, 700, 100):
        runner.read([[4 + (start + n) % 40 for n in range(100)]], None, caches)
        room |= {layer.parts[0].shape[2] for layer in caches if layer.window is None}
    assert room == {768}
    caches.expect(0)
    runner.read([[5] * 100], None, caches)
    assert {layer.parts[0].shape[2] for layer in caches if layer.window is None} == {1024}

"""Speculative decoding changes no token: whatever is guessed, and however far, an answer is plain decoding's."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
from random_model import random_model, tiny_config
from test_batch import LIMIT, Writer, runner_of

from mlx_gemma3.generation.batch import Batch, Row, decode
from mlx_gemma3.generation.choice import Chooser
from mlx_gemma3.generation.depth import Depth
from mlx_gemma3.generation.prefill import prefill
from mlx_gemma3.generation.speculation import DraftModel, LookUp, Proposer
from mlx_gemma3.model import cache
from mlx_gemma3.model.runner import Runner
from mlx_gemma3.runtime.timeline import FeatureCache, Tokens


@pytest.fixture(autouse=True)
def small_slack(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The window is 8: with the usual slack nothing would ever leave it."""
    monkeypatch.setattr(cache, "SLACK", 4)
    yield


class AnyDepth(Depth):
    """Guesses as far as chance has it, whatever it costs."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)

    def depths(self, odds: Sequence[Sequence[float]], rows: int, prices: Sequence[float] = ()) -> list[int]:
        return [self.random.choice([0, len(chances), self.random.randint(0, len(chances))]) for chances in odds]


def draft_model(runner: Runner, prompt: Tokens, chooser: Chooser) -> DraftModel:
    """One that has yet to read the prompt, without its pictures, in small pieces."""
    left = [token for token in prompt.ids if token != 60]
    caches = runner.make_caches()

    def read() -> bool:
        some = left[:11]
        del left[:11]
        prefill(runner, some, caches)
        return bool(left)

    return DraftModel(runner, caches, chooser, read)


class Guess:
    """Guesses what another model would write, mostly; and now and then anything."""

    def __init__(self, truth: Sequence[int], seed: int, wrong: float = 0.2) -> None:
        self.truth, self.random, self.wrong = list(truth), random.Random(seed), wrong
        self.at, self.price = 0, 0.0

    def odds(self) -> Sequence[float]:
        return [0.8] * 31

    def propose(self, count: int) -> list[int]:
        found = self.truth[self.at : self.at + count]
        return [token if self.random.random() > self.wrong else self.random.randrange(64) for token in found]

    def wrote(self, token: int) -> None:
        self.at += 1


def alone(writer: Writer, row: Row) -> list[int]:
    """What the row writes without guesses."""
    solo = writer.runner
    caches = row.caches.fork()
    logits = writer.timeline.logits
    assert logits is not None
    return list(decode(solo, logits, caches, prompt=writer.prompt.ids, sampling=writer.sampling, max_tokens=row.left))


def run(kind: str, seed: int, sequences: int, bits: int = 16) -> tuple[int, int, int]:
    """So many answers, up to 6 at once, each guessing; returns how many, tokens drafted, accepted."""
    config = tiny_config(max_position_embeddings=LIMIT, head_dim=64, query_pre_attn_scalar=64)
    model, chance = random_model(config, seed=seed % 5), random.Random(seed)
    runner = runner_of(kind, model)
    other = runner_of(kind, random_model(config, seed=seed % 5 + 1))
    features, batch = FeatureCache(), Batch(runner, AnyDepth(seed))
    writers = [Writer(runner, seed * 100 + number) for number in range(6)]
    for writer in writers:
        writer.timeline.caches = runner.make_caches(kv_bits=bits, local_kv_bits=bits)
    done = drafted = right = 0
    wanted: dict[int, list[int]] = {}
    while done < sequences:
        idle = [writer for writer in writers if writer.row is None]
        if idle and chance.random() < 0.6:
            writer = chance.choice(idle)
            row, logits = writer.start(features)
            wanted[id(writer)] = alone(writer, row)
            proposers: list[list[Proposer]] = [
                [LookUp(writer.prompt.ids, skip=[60], remembered=64)],
                [Guess(wanted[id(writer)], seed, chance.choice([0.0, 0.2, 1.0]))],
                [LookUp(writer.prompt.ids, skip=[60]), Guess(wanted[id(writer)], seed)],
                [draft_model(runner, writer.prompt, row.chooser)],
                [LookUp(writer.prompt.ids), draft_model(other, writer.prompt, row.chooser)],
                [],
            ]
            row.proposers = chance.choice(proposers)
            batch.join(row, logits)
        by_row = {id(writer.row): writer for writer in writers if writer.row is not None}
        if not by_row:
            continue
        together = dict.fromkeys(by_row, 0)
        for one in batch.next():
            by_row[id(one.row)].written.append(one.token)
            together[id(one.row)] += 1
        for writer in by_row.values():
            assert writer.row is not None
            if not writer.row.left or chance.random() < 0.03:  # its end, or a cancel
                batch.leave(writer.row)
                drafted, right = drafted + writer.row.drafted, right + writer.row.accepted
                if (count := together[id(writer.row)]) > 1:  # it ended within what one pass wrote
                    del writer.written[len(writer.written) - chance.randrange(count) :]
                writer.row = None
                assert writer.written == wanted[id(writer)][: len(writer.written)]
                if bits == 16:
                    writer.check(model, None)
                writer.timeline.wrote(tuple(writer.written))
                done += 1
    return done, drafted, right


@pytest.mark.parametrize(("kind", "bits"), [("plain", 16), ("gpu", 16), ("cpu", 16), ("gpu", 8), ("cpu", 4)])
def test_guessing_changes_no_token(kind: str, bits: int) -> None:
    """30 answers in all: greedy and sampled, with penalties, pictures, cancels, conversations past the window."""
    _, drafted, right = run(kind, 1, 6, bits)
    assert drafted > right > 0


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bits"), [("plain", 16), ("gpu", 16), ("cpu", 16), ("gpu", 8), ("cpu", 4)])
def test_guessing_changes_no_token_of_500_answers(kind: str, bits: int) -> None:
    _, drafted, right = run(kind, 2, 100, bits)
    assert drafted > right > 500

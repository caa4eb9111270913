"""Speculative decoding: cheap guesses of the tokens to come, which one pass of the model checks together.

    written … t │ d1 d2 d3     t and the draft are read in one pass: logits after each of t, d1, d2, d3
                │ x1 x2 x3 x4  chosen from them, each as if the tokens before it were written
                  =  =  ≠      x1 = d1, x2 = d2: x1, x2, x3 are written; d3 is taken back out of the caches

A token is always chosen by `choose`'s rule from the model's own logits, with the key that plain decoding would use for
it; a draft only decides how many are chosen in one pass. So the answer is plain decoding's, token for token and seed
for seed, whatever is drafted, and its distribution is the model's after all penalties and filters. For a draft that is
certain of its tokens (look-up) this is rejection sampling: d is accepted with probability p(d), and what is chosen
in its place has p without d. A draft model draws with the same noise as the model (Gumbel coupling: Daliri, Musco and
Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding", 2024), so that the two agree
about as often as their distributions overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import mlx.core as mx
import numpy as np

from ..model.cache import Caches
from ..model.runner import Runner
from .choice import Chooser
from .depth import MOST
from .sampling import sample
from .suffixes import Suffixes

REMEMBERED = 1 << 15  # tokens that a look-up knows: 13 MB
FED = 2048  # tokens of a prompt that it takes up for each token of the answer: a few milliseconds
LEAST = 0.02  # a token that survives more seldom is not worth a thought


class Proposer(Protocol):
    """Guesses how one sequence goes on."""

    price: float  # seconds that a token of a guess takes

    def odds(self) -> Sequence[float]:
        """The probability that the first n tokens of a guess made now are right, n = 1, 2, …; empty for no guess."""

    def propose(self, count: int) -> list[int]:
        """At most `count` tokens, a guess at those that come next."""

    def wrote(self, token: int) -> None:
        """The sequence went on."""


@dataclass
class Record:
    """How often a look-up was right, by how many tokens matched before: 1, 2 to 3, 4 to 7, …, 32 and more."""

    right: list[float] = field(default_factory=lambda: [0.0] * 6)
    asked: list[float] = field(default_factory=lambda: [0.0] * 6)

    def add(self, matched: int, right: bool) -> None:
        bucket = _bucket(matched)
        self.right[bucket] = FORGET * self.right[bucket] + right
        self.asked[bucket] = FORGET * self.asked[bucket] + 1

    def chance(self, bucket: int, before: float) -> float:
        """Of being right, where `before` was thought without this record."""
        return (self.right[bucket] + WEIGHT * before) / (self.asked[bucket] + WEIGHT)


FORGET = 0.98
WEIGHT = 6.0  # asks that what was thought before counts as
BEFORE = (0.2, 0.4, 0.65, 0.82, 0.92, 0.96)  # by bucket, before anything was asked


class LookUp:
    """Guesses that what followed the last time follows again: in the prompt, or in the answer.

    How often that is so is watched while nothing is drafted too: each token that is written shows whether it was the
    one that followed. So a text that begins to repeat is known as such before anything was staked on it.

    Args:
        prompt: its ids.
        skip: ids that match nothing (of pictures).
        record: of other sequences; this one's is added to it.
        remembered: tokens that are kept in mind; of a longer text the newest.
    """

    price = 0.0

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        skip: Collection[int] = (),
        record: Record | None = None,
        remembered: int = REMEMBERED,
    ) -> None:
        self._skip, self._remembered = frozenset(skip), remembered
        self._waiting = list(prompt[-remembered // 2 :])
        self._at = 0  # how much of it was taken up
        self._suffixes = Suffixes()
        self._all = record or Record()
        self._own = Record()

    def odds(self) -> Sequence[float]:
        """See Proposer."""
        matched = self._suffixes.matched
        if self._waiting or not matched:
            return ()
        found, survives = [], 1.0
        for place in range(MOST):
            bucket = _bucket(matched + place)
            survives *= self._own.chance(bucket, self._all.chance(bucket, BEFORE[bucket]))
            if survives < LEAST:
                break
            found.append(survives)
        return found

    def propose(self, count: int) -> list[int]:
        """See Proposer."""
        found = [] if self._waiting else self._suffixes.following(count)
        return found[: next((at for at, token in enumerate(found) if token < 0), len(found))]

    def wrote(self, token: int) -> None:
        """See Proposer."""
        if self._waiting:
            self._waiting.append(token)
            self._take_up()
            return
        suffixes = self._suffixes
        if suffixes.matched:
            right = suffixes.follower() == token
            self._own.add(suffixes.matched, right)
            self._all.add(suffixes.matched, right)
        self._push(token)
        if len(suffixes.text) >= self._remembered:
            self._waiting, self._at = suffixes.text[-self._remembered // 2 :], 0
            self._suffixes = Suffixes()

    def _take_up(self) -> None:
        for token in self._waiting[self._at : self._at + FED]:
            self._push(token)
        self._at += FED
        if self._at >= len(self._waiting):
            self._waiting, self._at = [], 0

    def _push(self, token: int) -> None:
        if token in self._skip:
            if self._suffixes.text and self._suffixes.text[-1] < 0:
                return
            token = -1 - len(self._suffixes.text)  # no other is like it
        self._suffixes.push(token)


LIKELY = 0.75  # that a draft model's token is right, before any was asked for
PIECE = 512  # tokens that it reads at once
DRIFT = 0.995  # of what is known of it is left after a token that it was not asked for


class DraftModel:
    """A smaller model of the same vocabulary writes on, on caches of its own, with the noise of the sequence's draws.

    Args:
        caches: of the draft model; they hold what `read` has read.
        chooser: the sequence's own.
        read: reads some more of the prompt; False when that was the last of it. None when all of it was read.
    """

    def __init__(self, runner: Runner, caches: Caches, chooser: Chooser, read: Callable[[], bool] | None) -> None:
        self._runner, self._caches, self._chooser, self._read = runner, caches, chooser, read
        self._waiting: list[int] = []  # were written, and are not in the caches
        self._beyond: list[int] = []  # were guessed, and are in the caches
        self._guess: list[int] = []  # of which the sequence has not come to yet
        self._right = self._asked = 0.0
        self.price = 0.0
        self._most = runner.config.text.max_position_embeddings
        self._over = False  # a token came that it does not know

    def odds(self) -> Sequence[float]:
        """See Proposer."""
        if self._over or self._caches.offset + len(self._waiting) + MOST > self._most:
            return ()
        chance = (self._right + WEIGHT * LIKELY) / (self._asked + WEIGHT)
        return [chance**place for place in range(1, min(MOST, self._caches.slack) + 1)]

    def propose(self, count: int) -> list[int]:
        """See Proposer. Reads first, and only that, where there is much to read."""
        if self._read is not None:
            self._read = self._read if self._read() else None
            return []
        if not self._waiting:
            return []
        runner, caches, began = self._runner, self._caches, perf_counter()
        if len(self._waiting) > PIECE:
            mx.eval(runner.read([self._waiting[:PIECE]], None, caches, last_only=True, spans=()), caches.arrays)
            del self._waiting[:PIECE]
            return []
        if len(self._waiting) > MOST:
            logits = runner.head(runner.read([self._waiting], None, caches, last_only=True, spans=()))[:, 0]
        else:
            logits = runner.verify(mx.array(self._waiting), [caches], [len(self._waiting)], [1])
        self._waiting = []
        sampling, tokens = self._chooser.sampling, list[mx.array]()
        for key in self._chooser.coming_keys(count):
            if tokens:
                logits = runner.step(tokens[-1], [caches])
            tokens.append(sample(logits, sampling, [] if key is None else [key]))
        found: list[int] = np.array(mx.concatenate(tokens)).tolist()
        seconds = (perf_counter() - began) / count
        self.price = seconds if not self.price else 0.7 * self.price + 0.3 * seconds
        self._guess, self._beyond = list(found), found[:-1]
        return found

    def wrote(self, token: int) -> None:
        """See Proposer."""
        self._over = self._over or token >= self._runner.config.text.vocab_size
        if self._guess:
            right = self._guess.pop(0) == token
            self._right, self._asked = FORGET * self._right + right, FORGET * self._asked + 1
            if not right:
                self._guess = []
        else:
            self._right, self._asked = DRIFT * self._right, DRIFT * self._asked
        if self._beyond and self._beyond[0] == token and not self._waiting:
            del self._beyond[0]
            return
        if self._beyond:
            self._runner.take_back([self._caches], [len(self._beyond)])
            self._beyond = []
        self._waiting.append(token)


def _bucket(matched: int) -> int:
    return min(matched.bit_length(), 6) - 1


def accepted(draft: Sequence[int], chosen: Sequence[int]) -> int:
    """How many tokens of a draft are right.

    Args:
        chosen: what the model chose at each of its places, one more at its end. From the first place on where the two
            differ, the choices follow a text that was not written.
    """
    return next((at for at, (one, other) in enumerate(zip(draft, chosen, strict=False)) if one != other), len(draft))

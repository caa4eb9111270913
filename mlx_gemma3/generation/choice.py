"""The one door for logits: what each sequence asks of its next token, and the choice of it.

    logits ─ penalties ─ bias ─ constraint ─ temperature and filters ─ token
       └──── log-probabilities, of what the model said

A forward pass and a choice are two steps, so that the host can work out a constraint while the device computes.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..model.runner import Runner
from .constraint import Constraint
from .sampling import Sampling, penalise, sample, top_candidates


@dataclass(frozen=True)
class Likelihood:
    """Log-probabilities at one token, of the logits as the model gave them, before penalties, bias and temperature."""

    logprob: float  # of the token that was chosen
    top: tuple[tuple[int, float], ...]  # the likeliest tokens and theirs, likeliest first


class Score:
    """The likelihood of each token of a text that is read, given those before it; collected chunk by chunk.

    Args:
        count: of the likeliest tokens at each place, as many.
    """

    ROWS = 64  # logits at once: 64 MiB

    def __init__(self, count: int) -> None:
        self.count = count
        self.found: list[Likelihood] = []

    def add(self, runner: Runner, hidden: mx.array, following: Sequence[int]) -> None:
        """Take a chunk: (1, L, D) normed hidden states, and the tokens after each; at the text's end one less."""
        for begin in range(0, len(following), self.ROWS):
            tokens = mx.array(list(following[begin : begin + self.ROWS]))
            logits = runner.head(hidden[:, begin : begin + tokens.size])[0]
            self.found += _on_host(_likelihood(logits, tokens, self.count))


class Chooser:
    """How one sequence chooses: its settings, its key, what it has already."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = (), constraint: Constraint | None = None) -> None:
        """
        Args:
            prompt: the ids before the answer, for the repetition penalty.
        """
        self.sampling, self.constraint = sampling, constraint
        self._prompt = prompt if sampling.repetition_penalty != 1 else ()
        self._key: mx.array | None = None
        if not sampling.greedy:
            seed = sampling.seed if sampling.seed is not None else secrets.randbits(64)
            self._key = mx.random.key(seed)
        self._seen: mx.array | None = None  # (1, V) bool, of the prompt and the answer
        self._counts: mx.array | None = None  # (1, V) float32, of the answer
        self._bias: mx.array | None = None  # (1, V) float32
        self.allowed: NDArray[np.uint32] | None = None  # by the constraint, now
        self._early: list[int] = []  # of the answer, forced before there were such arrays
        self._counts_needed = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self.adjusts = (
            sampling.repetition_penalty != 1
            or self._counts_needed
            or bool(sampling.logit_bias)
            or constraint is not None
        )
        self.takes_back = _takes_back(constraint)  # so that a guess can be tried on it
        self.look_up()

    def look_up(self) -> None:
        """Ask the constraint what may come next."""
        if self.constraint is not None and not self.complete:
            self.allowed = self.constraint.allowed()

    @property
    def complete(self) -> bool:
        """Whether the constraint lets nothing follow."""
        return self.constraint is not None and self.constraint.complete

    def accept(self, token: int, most: int = 0) -> list[int]:
        """The token is known on the host. Returns those that are forced to follow it, at most so many: accepted."""
        if self.constraint is None:
            return []
        self.constraint.accept(token)
        forced = self.forced(most)
        self.look_up()
        return forced

    def forced(self, most: int) -> list[int]:
        """Tokens that come next without a choice, accepted; none where the likelihood of each is asked for."""
        if self.constraint is None or self.sampling.logprobs is not None or most < 1 or self.complete:
            return []
        found = list(self.constraint.forced())[:most]
        for token in found:
            self.constraint.accept(token)
        if found and self._seen is None and self._counts is None:
            self._early += found
        elif found:
            self.chose(mx.array(found))
        return found

    def fitting(self, draft: Sequence[int]) -> tuple[list[int], list[NDArray[np.uint32] | None]]:
        """As much of a draft as the constraint lets through, short of a token that ends the answer or forces others.

        Returns:
            it, and what is allowed at each place of it and after it; no masks without a constraint.
        """
        if self.constraint is None:
            return list(draft), []
        fits: list[int] = []
        masks = [self.allowed]
        try:
            for token in draft:
                mask = masks[-1]
                if mask is not None and not mask[token // 32] >> token % 32 & 1:
                    break
                self.constraint.accept(token)
                fits.append(token)
                forces = self.sampling.logprobs is None and self.constraint.forced()
                if self.constraint.complete or forces:
                    fits.pop()
                    self.constraint.rewind(1)
                    break
                masks.append(self.constraint.allowed())
        finally:
            self.constraint.rewind(len(fits))
        return fits, masks

    def along(self, logits: mx.array, draft: Sequence[int], masks: Sequence[NDArray[np.uint32] | None]) -> Along:
        """The choice at each place of a draft and after it, each as if the draft were written up to there.

        Args:
            logits: (k + 1, V) float32, as the model gave them.
            draft: k tokens.
            masks: from `fitting`.
        """
        rows, states = logits, []
        if self.adjusts:
            parts = []
            for place in range(len(draft) + 1):
                if place:
                    self.chose(mx.array([draft[place - 1]]))
                if masks:
                    self.allowed = masks[place]
                parts.append(self.adjust(logits[place : place + 1]))
                states.append((self._seen, self._counts))
            rows = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        keys: list[mx.array] = []
        after = [self._key]
        if not self.sampling.greedy:
            for _ in range(len(draft) + 1):
                keys.append(self.key())
                after.append(self._key)
        tokens, count = sample(rows, self.sampling, keys), self.sampling.logprobs
        return Along(tokens, None if count is None else _likelihood(logits, tokens, count), after[1:], states)

    def took(self, along: Along, tokens: Sequence[int], most: int) -> list[int]:
        """Of what was chosen along a draft, these were taken; otherwise as `accept`."""
        place = len(tokens) - 1
        if along.keys:
            self._key = along.keys[place]
        if along.states:
            self._seen, self._counts = along.states[place]
            self.chose(mx.array([tokens[-1]]))
        if self.constraint is not None:
            for token in tokens[:-1]:
                self.constraint.accept(token)
        return self.accept(tokens[-1], most)

    def key(self) -> mx.array:
        """A new one for each token."""
        assert self._key is not None
        self._key, now = mx.random.split(self._key)
        return now

    def coming_keys(self, count: int) -> list[mx.array | None]:
        """Those that `key` will give next; None for greedy choices, which need none."""
        if self._key is None:
            return [None] * count
        kept, keys = self._key, [self.key() for _ in range(count)]
        self._key = kept
        return list(keys)

    def adjust(self, logits: mx.array) -> mx.array:
        """(1, V) float32 with penalties, bias and constraint."""
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            if self._seen is None:
                self._seen = mx.zeros(logits.shape, dtype=mx.bool_)
                if before := {*self._prompt, *self._early}:
                    self._seen[:, mx.array(sorted(before))] = True
            logits = penalise(logits, self._seen, sampling.repetition_penalty)
        if self._counts_needed:
            if self._counts is None:
                self._counts = mx.zeros(logits.shape)
                if self._early:
                    self._counts = self._counts.at[:, mx.array(self._early)].add(1)
            logits = logits - sampling.frequency_penalty * self._counts
            logits = logits - sampling.presence_penalty * (self._counts > 0)
        if sampling.logit_bias:
            if self._bias is None:
                self._bias = mx.zeros(logits.shape)
                ids = mx.array(list(sampling.logit_bias))
                self._bias[:, ids] = mx.array([float(bias) for bias in sampling.logit_bias.values()])
            logits = logits + self._bias
        if self.allowed is not None:
            logits = mx.where(unpacked(self.allowed, logits.shape[-1]), logits, -mx.inf)
        return logits

    def chose(self, token: mx.array) -> None:
        """(n,): what was chosen, perhaps not computed yet, or forced."""
        if self._seen is not None:
            self._seen = mx.put_along_axis(self._seen, token[None], mx.array(True), axis=-1)
        if self._counts is not None:
            self._counts = self._counts.at[:, token].add(1)


def _takes_back(constraint: Constraint | None) -> bool:
    try:
        if constraint is not None:
            constraint.rewind(0)
    except NotImplementedError:
        return False
    return True


@dataclass
class Along:
    """The choices along a draft, not computed yet, and what the chooser is after each."""

    tokens: mx.array  # (k + 1,) int32
    likelihood: tuple[mx.array, mx.array, mx.array] | None
    keys: list[mx.array | None]  # none of greedy ones
    states: list[tuple[mx.array | None, mx.array | None]]  # what was seen and counted before each; () if none adjusts

    @property
    def arrays(self) -> list[mx.array]:
        return [self.tokens, *(self.likelihood or ())]

    def likelihoods(self) -> list[Likelihood | None]:
        """One for each place; waits for the device."""
        return [None] * len(self.tokens) if self.likelihood is None else list(_on_host(self.likelihood))


@dataclass
class Chosen:
    """The next token of several sequences, not computed yet."""

    tokens: mx.array  # (B,) int32
    likelihoods: list[tuple[mx.array, mx.array, mx.array] | None]  # chosen (1,), values (1, n), ids (1, n)
    _read: NDArray[np.int32] | None = None

    @property
    def arrays(self) -> list[mx.array]:
        return [self.tokens, *(array for one in self.likelihoods if one is not None for array in one)]

    def read(self) -> NDArray[np.int32]:
        """(B,): waits for the device, once."""
        if self._read is None:
            self._read = np.array(self.tokens)
        return self._read

    def likelihood(self, row: int) -> Likelihood | None:
        """Waits for the device."""
        one = self.likelihoods[row]
        return None if one is None else _on_host(one)[0]


def choose(logits: mx.array, choosers: Sequence[Chooser]) -> Chosen:
    """The next token of each sequence, each exactly as if it were alone.

    Args:
        logits: (B, V) float32, as the model gave them.
    """
    raw = logits
    if any(chooser.adjusts for chooser in choosers):
        rows = [raw[row : row + 1] for row in range(len(choosers))]
        rows = [chooser.adjust(one) if chooser.adjusts else one for one, chooser in zip(rows, choosers, strict=True)]
        logits = rows[0] if len(rows) == 1 else mx.concatenate(rows)
    groups: dict[tuple[float, ...], list[int]] = {}
    for row, chooser in enumerate(choosers):
        groups.setdefault(chooser.sampling.filters, []).append(row)
    if len(groups) == 1:
        tokens = _sample(logits, choosers)
    else:
        parts = [_sample(logits[mx.array(rows)], [choosers[row] for row in rows]) for rows in groups.values()]
        order = np.argsort([row for rows in groups.values() for row in rows])
        tokens = mx.concatenate(parts)[mx.array(order)]
    likelihoods: list[tuple[mx.array, mx.array, mx.array] | None] = []
    for row, chooser in enumerate(choosers):
        token = tokens[row : row + 1]
        if chooser.adjusts:
            chooser.chose(token)
        count = chooser.sampling.logprobs
        likelihoods.append(None if count is None else _likelihood(raw[row : row + 1], token, count))
    return Chosen(tokens, likelihoods)


def _sample(logits: mx.array, choosers: Sequence[Chooser]) -> mx.array:
    sampling = choosers[0].sampling
    return sample(logits, sampling, () if sampling.greedy else [chooser.key() for chooser in choosers])


def _likelihood(logits: mx.array, tokens: mx.array, count: int) -> tuple[mx.array, mx.array, mx.array]:
    """(B, V), (B,) → log-probabilities (B, 1), those of the likeliest (B, count), and their ids (B, count)."""
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, tokens[:, None], axis=-1) - total
    if not count:
        return chosen, mx.zeros((len(tokens), 0)), mx.zeros((len(tokens), 0), dtype=mx.int32)
    values, ids = top_candidates(logits, min(count, logits.shape[-1]))
    return chosen, values - total, ids


def _on_host(one: tuple[mx.array, mx.array, mx.array]) -> list[Likelihood]:
    """One for each row; waits for the device."""
    mx.eval(one)
    chosen, values, ids = (np.array(array).tolist() for array in one)
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
    return [Likelihood(first[0], top) for first, top in zip(chosen, tops, strict=True)]


def unpacked(words: NDArray[np.uint32], count: int) -> mx.array:
    """(ceil(count / 32),) as (1, count) bool, the lowest bit of each word first."""
    bits = np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little", count=count)
    return mx.array(bits.view(np.bool_))[None]

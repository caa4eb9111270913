"""Logits to a token: greedy, or drawn at a temperature from what top-k, top-p and min-p leave.

The order of the filters and their borders are those of transformers 5.23 (generation/logits_process.py):
repetition penalty, temperature, top-k, top-p, min-p. Presence and frequency penalties and biases come after the
repetition penalty: they are added to the logits, as in OpenAI's API. choice.py applies all, sequence by sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from ..errors import OptionError
from ..model.device import compiled

_SORTED_AT_ONCE = 2048  # entries that one kernel of Metal's sorts

# Below this temperature the most likely token is taken. Logits are float32, and the best of them lie at 16 to 32, where
# neighbours are 2**-19 = 1.9e-6 apart: the nearest rival that is not equal is e**1.9 times less likely at 1e-6 and
# e**19 times at 1e-7, so what is drawn below is the best token or a matter of rounding. Logits divided by less than
# 1e-37 are infinite or NaN; by 1e-6 none below 3.4e32 is.
GREEDY_BELOW = 1e-6
MOST_LOGPROBS = 20
_LEAST_SHARE = 1e-37  # of top-p; a smaller one is 0 in float32 and would leave not even the first token


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The defaults are those of Gemma 3's generation_config.json.

    Raises:
        OptionError: a value outside its range.
    """

    temperature: float = (
        1.0  # below GREEDY_BELOW: always the most likely token; the rest but the penalty then has no effect
    )
    top_k: int = 64  # the k most likely tokens; 0: all
    top_p: float = 0.95  # the fewest tokens that hold this much probability; 1: all
    min_p: float = 0.0  # tokens at least this fraction as likely as the best; 0: all
    repetition_penalty: float = 1.0  # > 1 makes tokens of the prompt and the answer less likely; 1: off
    presence_penalty: float = 0.0  # taken from the logit of each token that the answer has; 0: off
    frequency_penalty: float = 0.0  # the same for each time that it has it
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these ids
    seed: int | None = None  # None: another answer each time
    logprobs: int | None = None  # report the log-probability of each token, and of so many of the likeliest; None: no

    def __post_init__(self) -> None:
        _check(0 <= self.temperature < math.inf, "temperature", self.temperature, ">= 0 (0 is greedy)")
        _check(self.top_k >= 0, "top_k", self.top_k, ">= 0 (0 is off)")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, at most 1 (1 is off)")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1 (0 is off)")
        penalty = self.repetition_penalty
        _check(1e-30 <= penalty <= 1e30, "repetition_penalty", penalty, "> 0, and what float32 can hold (1 is off)")
        for name, value in (("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)):
            _check(-2 <= value <= 2, name, value, "-2 to 2 (0 is off)")
        for token, bias in self.logit_bias.items():
            _check(token >= 0 and -100 <= bias <= 100, "logit_bias", {token: bias}, "-100 to 100 for a token id")
        most = self.logprobs
        _check(most is None or 0 <= most <= MOST_LOGPROBS, "logprobs", most, f"0 to {MOST_LOGPROBS}")
        _check(self.seed is None or 0 <= self.seed < 2**64, "seed", self.seed, "a whole number from 0 to 2**64 - 1")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def filters(self) -> tuple[float, ...]:
        """What `sample` goes by: sequences that have it alike can be sampled together."""
        return (0.0,) if self.greedy else (self.temperature, self.top_k, self.top_p, self.min_p)


def sample(logits: mx.array, sampling: Sampling, keys: Sequence[mx.array]) -> mx.array:
    """Choose one token a row, each as if it were alone.

    Args:
        logits: (B, V) float32.
        keys: from mx.random.key, one for each row, new ones for each call; unused when greedy.

    Returns:
        (B,) int32, lazy.
    """
    if sampling.greedy:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    values, ids = logits, None  # ids: (B, C) of the columns, most likely first; None: every id in its place
    if 0 < sampling.top_k < logits.shape[-1]:
        values, ids = top_candidates(logits, sampling.top_k)
    elif sampling.top_p < 1:
        ids = mx.argsort(-logits, axis=-1)
        values = mx.take_along_axis(logits, ids, axis=-1)
    column = _draw(values, mx.stack(list(keys)), sampling.temperature, sampling.top_p, sampling.min_p)
    chosen = column if ids is None else mx.take_along_axis(ids, column[:, None], axis=-1)[:, 0]
    return chosen.astype(mx.int32)


@compiled
def _draw(values: mx.array, keys: mx.array, temperature: float, top_p: float, min_p: float) -> mx.array:
    """(B, C) logits, most likely first where top_p < 1, and (B, 2) keys → (B,) columns."""
    values = values / temperature
    if top_p < 1:
        probabilities = mx.softmax(values, axis=-1, precise=True)
        before = mx.cumsum(probabilities, axis=-1) - probabilities  # held by the more likely tokens; 0 for the first
        values = mx.where(before < max(top_p, _LEAST_SHARE), values, -mx.inf)
    if min_p > 0:
        best = values.max(axis=-1, keepdims=True)
        values = mx.where(values >= best + math.log(min_p), values, -mx.inf)
    # Gumbel's noise makes the largest sum a draw: what mx.random.categorical does, with a key for each row.
    noise = [mx.random.gumbel((1, values.shape[-1]), key=key) for key in keys]
    return mx.argmax(values + (noise[0] if len(noise) == 1 else mx.concatenate(noise)), axis=-1)


def top_candidates(logits: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The `count` largest entries of each row, largest first, and where they stood.

    Sorting 262,144 entries costs more than a small model's whole step. Each of the largest entries lies in one of the
    `count` blocks with the largest maxima (or in the rest that fills no block), so only those go on, until what is left
    is short enough for one kernel of Metal's.

    Args:
        logits: (B, V).
        count: at most V.

    Returns:
        values (B, count), ids (B, count).
    """
    values, ids = logits, None
    while (size := values.shape[-1]) > _SORTED_AT_ONCE:
        block = 1 << (-(-size // _SORTED_AT_ONCE) - 1).bit_length()  # 128 of 262,144; the next power of 2
        blocks = size // block
        if 2 * count * block > size:  # nothing much would be left out
            break
        rest = mx.arange(blocks * block, size, dtype=mx.uint32)
        maxima = values[:, : blocks * block].reshape(-1, blocks, block).max(axis=-1)
        best = mx.argsort(-maxima, axis=-1)[:, :count, None] * block + mx.arange(block, dtype=mx.uint32)
        columns = best.flatten(1)  # (B, count * block)
        if rest.size:
            columns = mx.concatenate([columns, mx.broadcast_to(rest, (columns.shape[0], rest.size))], axis=-1)
        values = mx.take_along_axis(values, columns, axis=-1)
        ids = columns if ids is None else mx.take_along_axis(ids, columns, axis=-1)
    rank = mx.argsort(-values, axis=-1)[:, :count]
    return mx.take_along_axis(values, rank, axis=-1), rank if ids is None else mx.take_along_axis(ids, rank, axis=-1)


def penalise(logits: mx.array, seen: mx.array, penalty: float) -> mx.array:
    """Make tokens that were seen less likely: positive logits are divided, negative ones multiplied.

    Args:
        logits: (B, V) float32.
        seen: (B, V) bool, true for every id of the prompt and of the answer so far.
    """
    return mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)


def _check(good: bool, name: str, got: object, want: str) -> None:
    if not good:
        raise OptionError(name, got=got, want=want)

"""One sequence of tokens and its KV caches: a new prompt reuses all that it shares with the last (prefix caching).

Owns the comparison of prompts (over ids and pictures), the snapshots at turn borders, and the features of pictures seen
before. Runs in the engine's thread; knows nothing of text, nor of other sequences.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..generation.choice import Score
from ..generation.prefill import check_length, chunk_end, image_runs, read_chunk, settle, spans_within, usual_chunk
from ..model.cache import Caches
from ..model.runner import Runner

SNAPSHOT_BYTES = 2 << 30
FEATURE_BYTES = 256 << 20
WORTH_A_SNAPSHOT = 256  # tokens that one on the way through a prompt may save the next


class Keyed(Protocol):
    """As much of some tokens as others can be compared with."""

    @property
    def keys(self) -> NDArray[np.int64]: ...
    @property
    def spans(self) -> tuple[tuple[int, int], ...]: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Tokens:
    """Ids, and which picture stands where.

    Two sequences agree as far as their ids and, in image blocks, their pictures do.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] = ()  # half-open ranges of image tokens, in order
    digests: tuple[str, ...] = ()  # one a span
    adapter: str | None = None  # Identity.adapter: nothing is shared with other adapters

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: Tokens) -> Tokens:
        moved = tuple((start + len(self), stop + len(self)) for start, stop in other.spans)
        return Tokens(self.ids + other.ids, self.spans + moved, self.digests + other.digests, self.adapter)

    def head(self, count: int) -> Tokens:
        """The first `count`; no span may be cut."""
        kept = [(span, digest) for span, digest in zip(self.spans, self.digests, strict=True) if span[1] <= count]
        spans, digests = tuple(span for span, _ in kept), tuple(digest for _, digest in kept)
        return Tokens(self.ids[:count], spans, digests, self.adapter)

    @cached_property
    def keys(self) -> NDArray[np.int64]:
        """A number for each token; those of different pictures differ, and all of those with different adapters (but
        for one chance in 2**44).
        """
        keys = np.array(self.ids, dtype=np.int64)
        for (start, stop), digest in zip(self.spans, self.digests, strict=True):
            keys[start:stop] = -1 - int(digest[:14], 16)
        if self.adapter is not None:
            keys ^= int(self.adapter[:15], 16) << 2
        return keys

    def shared(self, other: Keyed) -> int:
        """How many leading tokens are the same; never a part of an image block of either."""
        count = min(len(self), len(other))
        different = np.flatnonzero(self.keys[:count] != other.keys[:count])
        at = int(different[0]) if different.size else count
        for start, stop in (*image_runs(self.spans), *image_runs(other.spans)):
            if start < at < stop:
                at = start
        return at


def digest(pixels: NDArray[np.float32]) -> str:
    """A name for one picture as the model sees it: (S, S, 3) float32."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).hexdigest()


class FeatureCache:
    """Features of pictures by digest, within a budget; the one not used for longest goes first."""

    def __init__(self, budget: int = FEATURE_BYTES) -> None:
        self.budget = budget
        self.encoded = 0  # pictures that went through the tower
        self._rows: OrderedDict[str, mx.array] = OrderedDict()

    def get(
        self, runner: Runner, name: str, pixels: NDArray[np.float32] | None, adapter: str | None = None
    ) -> mx.array:
        """(T, D) features of a picture, from the tower when they are not here.

        Args:
            adapter: what the tower sees with.
            pixels: (S, S, 3), or None when the features must be here (a conversation read from a file).
        """
        key = _seen_as(name, runner.sees_with(adapter))
        rows = self._rows.pop(key, None)
        if rows is None:
            assert pixels is not None, name
            rows = runner.encode_images(pixels[None], adapter)[0]
            mx.eval(rows)
            self.encoded += 1
        self.put(key, rows)
        return rows

    def holds(self, runner: Runner, name: str, adapter: str | None) -> bool:
        """Whether `get` would need no tower."""
        return _seen_as(name, runner.sees_with(adapter)) in self._rows

    def put(self, name: str, rows: mx.array) -> None:
        self._rows[name] = rows
        while len(self._rows) > 1 and sum(held.nbytes for held in self._rows.values()) > self.budget:
            self._rows.popitem(last=False)

    def __contains__(self, name: object) -> bool:
        return name in self._rows


def _seen_as(name: str, adapter: str | None) -> str:
    return name if adapter is None else f"{name} {adapter}"


@dataclass(frozen=True)
class Identity:
    """What keys and values depend on: what was computed with one never serves another."""

    weights: str  # checkpoint/fingerprint.py
    adapter: str | None  # of its files, checkpoint/adapter.py
    dtype: str
    kv_bits: int
    local_kv_bits: int


class Timeline:
    """The tokens in one set of caches. Belongs to one reader at a time.

    position = timeline.open(prompt)            # rewinds to what is shared
    while timeline.logits is None:
        timeline.read_chunk(features)
    …                                           # an answer is written into `caches`
    timeline.wrote(ids)
    """

    def __init__(
        self, runner: Runner, caches: Caches, *, identity: Identity | None = None, snapshot_bytes: int = SNAPSHOT_BYTES
    ) -> None:
        self.runner, self.caches, self.identity, self.snapshot_bytes = runner, caches, identity, snapshot_bytes
        self.tokens = Tokens(())  # may run ahead of the caches by the last token written
        self.logits: mx.array | None = None  # (1, V) float32 after the last token in the caches, when known
        self._prompt = Tokens(())
        self._border = 0  # where a snapshot is taken on the way; 0 for nowhere

    @property
    def nbytes(self) -> int:
        """Of the caches and the snapshots."""
        return self.caches.nbytes + sum(snapshot.nbytes for snapshot in self.caches.snapshots)

    @property
    def settled(self) -> bool:
        """Whether all that was read is computed."""
        return self.caches.unsettled is None

    def fork(self) -> Timeline:
        """The same once more; keys and values are shared until one of the two writes."""
        other = Timeline(self.runner, self.caches.fork(), identity=self.identity, snapshot_bytes=self.snapshot_bytes)
        other.tokens, other.logits = self.tokens, self.logits
        return other

    def reusable(self, prompt: Tokens) -> int:
        """How many tokens of a prompt need not be processed again."""
        return self.caches.reach(min(self.tokens.shared(prompt), self.caches.offset))

    def open(self, prompt: Tokens, *, limit: int | None = None, border: int = 0) -> int:
        """Go back to what the caches share with a prompt, which `read_chunk` then reads.

        Args:
            limit: most tokens of the context.
            border: other prompts have been the same up to there: a snapshot is taken on the way.

        Returns:
            the count of tokens that are reused. All of them where `logits` are known at once.

        Raises:
            ContextError: the prompt is longer than the context; nothing has changed then.
        """
        most = self.runner.config.text.max_position_embeddings
        check_length(len(prompt), len(prompt), min(limit or most, most))
        position, logits = self.reusable(prompt), None
        if position == self.caches.offset and position == len(prompt):
            logits = self.logits
        elif position < self.caches.offset:
            logits = self.caches.rewind(position)
        if position == len(prompt) and logits is None:  # all there, but not what comes next: read the end again
            position = self.caches.reach(self._before_last(prompt))
            self.caches.rewind(position)
        self._prompt, self._border = prompt, border if border - position >= WORTH_A_SNAPSHOT else 0
        self.tokens, self.logits = prompt.head(position), logits if position == len(prompt) else None
        if 0 < position < len(prompt):
            self.caches.take_snapshot(budget=self.snapshot_bytes)
        return position

    def next_chunk(self, most: int | None = None) -> tuple[int, int]:
        """The tokens of the prompt that `read_chunk` reads next: a half-open range.

        Args:
            most: read no more at once, but for a picture, which is read whole; None for the usual.
        """
        prompt, begin = self._prompt, self.caches.offset
        usual = usual_chunk(self.runner, self.caches, len(prompt))
        stop = self._border if begin < self._border < len(prompt) else len(prompt)
        return begin, chunk_end(begin, stop, prompt.spans, min(most or usual, usual))

    def pictures(self, begin: int, end: int) -> list[int]:
        """Which pictures of the prompt lie in a range of its tokens."""
        return list(spans_within(self._prompt.spans, begin, end))

    def read_chunk(
        self,
        features: Callable[[int], mx.array],
        most: int | None = None,
        *,
        ahead: bool = False,
        score: Score | None = None,
    ) -> int:
        """Read some more of the prompt; `logits` are there when it was the last of it.

        Args:
            features: (T, D) of the n-th picture of the prompt; asked only for those that are read.
            score: takes the likelihood of each token that is read, but of the prompt's first.
            ahead: return before all of it is computed; `settle` waits.

        Returns:
            the count of tokens that were read.
        """
        begin, end = self.next_chunk(most)
        prompt = self._prompt
        inside = spans_within(prompt.spans, begin, end)
        pictures, spans = [features(number) for number in inside], list(inside.values())
        ids, last = prompt.ids[begin:end], end == len(prompt)
        following = prompt.ids[begin + 1 : end + 1] if score is not None else ()
        logits = read_chunk(
            self.runner, ids, self.caches, pictures, spans, last=last, ahead=ahead, score=score, following=following
        )
        self.tokens, self.logits = prompt.head(end), logits
        if logits is not None or end == self._border:
            self.caches.take_snapshot(logits, budget=self.snapshot_bytes)
        return end - begin

    def settle(self) -> None:
        """Wait for the chunk that is being computed, if there is one; what went wrong in it is raised here."""
        settle(self.caches)

    def _before_last(self, prompt: Tokens) -> int:
        """One token less, or the whole of an image block that ends the prompt."""
        at = len(prompt) - 1
        return next((start for start, stop in image_runs(prompt.spans) if start <= at < stop), at)

    def wrote(self, tokens: tuple[int, ...]) -> None:
        """These were written after the prompt; the last may not be in the caches, or others of the same pass may be."""
        self.tokens, self.logits = self._prompt + Tokens(tokens), None
        if (beyond := self.caches.offset - len(self.tokens)) > 0:
            self.runner.take_back([self.caches], [beyond])

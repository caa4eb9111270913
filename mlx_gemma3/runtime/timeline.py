"""One line of tokens and what the model made of them: a new prompt reuses all that it shares with the last.

Owns the comparison of prompts (over ids and pictures), the snapshots at turn borders, and the rows of pictures seen
before. Runs in the engine's thread; knows nothing of text.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Generator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..errors import ContextError
from ..generation.loop import decode, image_runs, prefill
from ..generation.sampling import Sampling
from ..model.cache import Caches
from ..model.gemma3 import Gemma3

SNAPSHOT_BYTES = 2 << 30
FEATURE_BYTES = 256 << 20


@dataclass(frozen=True)
class Tokens:
    """Ids, and which picture stands where.

    Two sequences agree as far as their ids and, in image blocks, their pictures do.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] = ()  # half-open ranges of image tokens, in order
    digests: tuple[str, ...] = ()  # one a span

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: Tokens) -> Tokens:
        moved = tuple((start + len(self), stop + len(self)) for start, stop in other.spans)
        return Tokens(self.ids + other.ids, self.spans + moved, self.digests + other.digests)

    def head(self, count: int) -> Tokens:
        """The first `count`; no span may be cut."""
        kept = [(span, digest) for span, digest in zip(self.spans, self.digests, strict=True) if span[1] <= count]
        return Tokens(self.ids[:count], tuple(span for span, _ in kept), tuple(digest for _, digest in kept))

    def keys(self) -> NDArray[np.int64]:
        """A number for each token; those of different pictures differ (but for one chance in 2**56)."""
        keys = np.array(self.ids, dtype=np.int64)
        for (start, stop), digest in zip(self.spans, self.digests, strict=True):
            keys[start:stop] = -1 - int(digest[:14], 16)
        return keys

    def shared(self, other: Tokens) -> int:
        """How many leading tokens are the same; never a part of an image block of either."""
        count = min(len(self), len(other))
        different = np.flatnonzero(self.keys()[:count] != other.keys()[:count])
        at = int(different[0]) if different.size else count
        for start, stop in (*image_runs(self.spans), *image_runs(other.spans)):
            if start < at < stop:
                at = start
        return at


def digest(pixels: NDArray[np.float32]) -> str:
    """A name for one picture as the model sees it: (S, S, 3) float32."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).hexdigest()


class FeatureCache:
    """Rows of pictures by digest, within a budget; the one not used for longest goes first."""

    def __init__(self, budget: int = FEATURE_BYTES) -> None:
        self.budget = budget
        self.encoded = 0  # pictures that went through the tower
        self._rows: OrderedDict[str, mx.array] = OrderedDict()

    def get(self, model: Gemma3, name: str, pixels: NDArray[np.float32] | None) -> mx.array:
        """(T, D) rows of a picture, from the tower when they are not here.

        Args:
            pixels: (S, S, 3), or None when the rows must be here (a conversation read from a file).
        """
        rows = self._rows.pop(name, None)
        if rows is None:
            assert pixels is not None, name
            rows = model.encode_images(pixels[None])[0]
            mx.eval(rows)
            self.encoded += 1
        self.put(name, rows)
        return rows

    def put(self, name: str, rows: mx.array) -> None:
        self._rows[name] = rows
        while len(self._rows) > 1 and sum(held.nbytes for held in self._rows.values()) > self.budget:
            self._rows.popitem(last=False)

    def __contains__(self, name: str) -> bool:
        return name in self._rows


class Timeline:
    """The tokens in one set of caches."""

    def __init__(self, model: Gemma3, caches: Caches, *, snapshot_bytes: int = SNAPSHOT_BYTES) -> None:
        self.model, self.caches, self.snapshot_bytes = model, caches, snapshot_bytes
        self.tokens = Tokens(())  # may run ahead of the caches by the last token written
        self.logits: mx.array | None = None  # after the last token in the caches, when known

    @property
    def nbytes(self) -> int:
        """Of the caches and the snapshots."""
        return self.caches.nbytes + sum(snapshot.nbytes for snapshot in self.caches.snapshots)

    def reusable(self, prompt: Tokens) -> int:
        """How many tokens of a prompt need not be processed again."""
        return self.caches.reach(min(self.tokens.shared(prompt), self.caches.offset))

    def read(
        self,
        prompt: Tokens,
        features: Callable[[int], mx.array],
        *,
        chunk: int | None = None,
        limit: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> tuple[mx.array | None, int]:
        """Make the caches hold `prompt`.

        Args:
            features: rows (T, D) of the n-th picture of the prompt; asked only for those to be processed.
            limit: most tokens of the context.

        Returns:
            logits (1, V) float32 after it, None when cancelled (what was read is kept), and the count of tokens that
            were reused.

        Raises:
            ContextError: the prompt is longer than the context; nothing has changed then.
        """
        most = self.model.config.text.max_position_embeddings
        most = min(limit or most, most)
        if not len(prompt):
            raise ContextError("prompt", got="no tokens", want="at least one")
        if len(prompt) > most:
            raise ContextError("prompt", got=f"{len(prompt)} tokens", want=f"at most {most}", do="shorten the prompt")
        position, logits = self.reusable(prompt), None
        if position == self.caches.offset and position == len(prompt):
            logits = self.logits
        elif position < self.caches.offset:
            logits = self.caches.rewind(position)
        if position == len(prompt) and logits is None:  # all there, but not what comes next: read the end again
            position = self.caches.reach(self._before_last(prompt))
            self.caches.rewind(position)
        self.tokens, self.logits = prompt.head(position), None
        if position == len(prompt):
            self.logits = logits
            return logits, position
        if position:
            self.caches.take_snapshot(budget=self.snapshot_bytes)
        rest = [n for n, (start, _) in enumerate(prompt.spans) if start >= position]
        logits = prefill(
            self.model,
            prompt.ids[position:],
            self.caches,
            features=[features(n) for n in rest],
            spans=[(start - position, stop - position) for start, stop in (prompt.spans[n] for n in rest)],
            chunk=chunk,
            progress=progress,
            cancelled=cancelled,
        )
        self.tokens = prompt.head(self.caches.offset)
        self.logits = logits
        if logits is not None:
            self.caches.take_snapshot(logits, budget=self.snapshot_bytes)
        return logits, position

    def _before_last(self, prompt: Tokens) -> int:
        """One token less, or the whole of an image block that ends the prompt."""
        at = len(prompt) - 1
        return next((start for start, stop in image_runs(prompt.spans) if start <= at < stop), at)

    def write(
        self, logits: mx.array, *, sampling: Sampling, max_tokens: int, limit: int | None = None
    ) -> Generator[int, None, None]:
        """Write tokens after the prompt that `read` has read; each is kept in `tokens`."""
        prompt = self.tokens
        if limit is not None:
            max_tokens = min(max_tokens, limit - self.caches.offset)
        steps = decode(self.model, logits, self.caches, prompt=prompt.ids, sampling=sampling, max_tokens=max_tokens)
        written: list[int] = []
        try:
            for token in steps:
                written.append(token)
                yield token
        finally:
            steps.close()
            self.tokens, self.logits = prompt + Tokens(tuple(written)), None
            assert self.caches.offset <= len(self.tokens), (self.caches.offset, len(self.tokens))

"""Texts on their way to vectors: the handle that a caller holds, and the queue that the engine's thread works on.

    texts ─ ids (caller's thread) ─ by length ─ batches of at most so many tokens, one a turn ─ vectors ─ cut, length 1

A batch takes texts of the request whose turn it is, and where it has room those of the next ones, so that many small
requests are read together and a large one holds nobody up.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ..boundary.arguments import described, elements
from ..errors import ClosedError, Gemma3Error, OptionError
from ..model.embedder import SMALLEST_LENGTH
from ..model.runner import Runner
from ..prompt.embedding import EmbedText, prompt_of, read_ids, read_text
from .loaded import Loaded

Floats = NDArray[np.float32]
Texts = str | Sequence[str] | Sequence[Sequence[int]]
GPU_TOKENS, CPU_TOKENS = 4096, 1024  # of a batch; a longer text is a batch of its own


class Embedding:
    """Vectors that are being computed. Any thread may ask; made by `Engine.embedding`.

    Attributes:
        tokens: of each text with all that stands around it.
        cut: of each text, how many tokens were left out at its end.
    """

    def __init__(self, texts: Sequence[EmbedText], width: int, dimensions: int, *, normalize: bool) -> None:
        self.tokens = [len(text.ids) for text in texts]
        self.cut = [text.cut for text in texts]
        self.done = 0  # texts that have their vectors
        self._texts, self._dimensions, self._normalize = texts, dimensions, normalize
        # Texts of one length are neighbours, so that they attend in one call.
        self._left = deque(sorted(range(len(texts)), key=lambda n: (-len(texts[n].ids), texts[n].skipped)))
        self._vectors: Floats = np.empty((len(texts), width), np.float32)
        self._ended = threading.Event()
        self._error: Gemma3Error | None = None
        self.cancelled = False
        if not texts:
            self._ended.set()

    @property
    def total(self) -> int:
        """How many texts there are."""
        return len(self._texts)

    def wait(self, timeout: float | None = None) -> bool:
        """Whether all is done, within so many seconds. Raises Gemma3Error: what went wrong."""
        ended = self._ended.wait(timeout)
        if self._error is not None:
            raise self._error
        return ended

    def array(self) -> Floats:
        """Wait for them: (N, dimensions) float32.

        Raises:
            Gemma3Error: what went wrong. ClosedError: it was cancelled.
        """
        self.wait()
        found = self._vectors[:, : self._dimensions]
        if self._normalize:
            found = found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), np.float32(SMALLEST_LENGTH))
        return found

    def cancel(self) -> None:
        """What is not in work yet is left undone."""
        self.cancelled = True

    # --- for the engine's thread

    def take(self, room: int, *, first: bool) -> Iterator[int]:
        """Texts for a batch with room for so many tokens, the longest ones left; one at least if `first`."""
        while self._left and (first or len(self._texts[self._left[0]].ids) <= room):
            number = self._left.popleft()
            room, first = room - len(self._texts[number].ids), False
            yield number

    def text(self, number: int) -> EmbedText:
        return self._texts[number]

    def put(self, number: int, vector: Floats) -> None:
        """One vector, of the model's own dimensions."""
        self._vectors[number] = vector
        self.done += 1
        if self.done == self.total:
            self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def fail(self, error: Gemma3Error) -> None:
        if not self._ended.is_set():
            self._error = error
            self._ended.set()


class EmbedQueue:
    """The requests of one engine. Only for its thread."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._requests: deque[Embedding] = deque()
        self.batch_tokens = GPU_TOKENS if runner.ahead else CPU_TOKENS

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Embedding) -> None:
        self._requests.append(request)

    def batch(self) -> list[tuple[Embedding, int]]:
        """The next texts to read together; the request that stood first goes to the end."""
        for request in self._requests:
            if request.cancelled:
                request.fail(ClosedError("embedding", got="a cancelled request", want="one that goes on"))
        self._requests = deque(request for request in self._requests if not request.ended)
        chosen: list[tuple[Embedding, int]] = []
        room = self.batch_tokens
        for request in list(self._requests):
            for number in request.take(room, first=not chosen):
                room -= len(request.text(number).ids)
                chosen.append((request, number))
            if room <= 0:
                break
        self._requests.rotate(-1)
        return chosen

    def turn(self) -> None:
        """Read one batch. Raises what the model raises, after it was told to those whose texts it were."""
        chosen = self.batch()
        if not chosen:
            return
        chosen.sort(key=lambda one: (len(one[0].text(one[1]).ids), one[0].text(one[1]).skipped))
        texts = [request.text(number) for request, number in chosen]
        vectors = self._runner.vectors([text.ids for text in texts], [text.skipped for text in texts])
        for (request, number), vector in zip(chosen, np.array(vectors), strict=True):
            request.put(number, vector)
        self._requests = deque(request for request in self._requests if not request.ended)

    def fail_all(self, error: Gemma3Error) -> None:
        """Whoever waits is told."""
        for request in self._requests:
            request.fail(error)
        self._requests.clear()

    def cancel_all(self) -> None:
        for request in self._requests:
            request.cancel()


def embedding(
    loaded: Loaded, texts: Texts, *, kind: str | None, dimensions: int | None, normalize: bool, truncate: bool
) -> Embedding:
    """Texts as the engine's thread takes them. Runs in the caller's.

    Raises:
        OptionError: no embedding model; no texts; a kind or dimensions that the model does not have.
        PromptError, ContextError: a text or token ids that cannot be read.
    """
    config, tokenizer = loaded.config.embedder, loaded.tokenizer
    if config is None:
        raise OptionError(
            "embed",
            got=f"{loaded.checkpoint.name}, which writes answers",
            want="an embedding model",
            do="take google/embeddinggemma-300m",
        )
    if dimensions is not None and not 1 <= dimensions <= config.dimensions:
        raise OptionError("dimensions", got=dimensions, want=f"1 to {config.dimensions}")
    prompt, rows = prompt_of(config, kind), loaded.config.text.vocab_size
    found = []
    for text in _listed(texts):
        if isinstance(text, str):
            found.append(read_text(tokenizer, config, text, prompt, truncate=truncate))
            continue
        if kind is not None:
            raise OptionError("kind", got=f"{kind!r} for token ids", want="none", do="hand in the text")
        found.append(read_ids(config, text, rows))
    return Embedding(found, config.dimensions, dimensions or config.dimensions, normalize=normalize)


def _listed(texts: object) -> list[str | list[int]]:
    """A text, or several, or lists of token ids, as a list."""
    if isinstance(texts, str):
        return [texts]
    given = None if isinstance(texts, bytes | dict) else elements(texts)
    found: list[str | list[int]] = []
    for text in given if given is not None else [None]:
        ids = None if isinstance(text, str | bytes) else elements(text)
        if isinstance(text, str):
            found.append(text)
        elif ids is not None and all(type(token) is int for token in ids):
            found.append(ids)
        else:
            what = described(text if given is not None else texts)
            raise OptionError("texts", got=what, want="a text, a list of texts, or lists of token ids")
    return found

"""Two embedding models on the same texts: how far apart their vectors are. What `evaluate` does with them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..embedder_config import EmbedderConfig
from ..errors import OptionError, PromptError
from ..model.runner import Runner
from ..prompt.embedding import read_text
from ..prompt.tokenizer import Tokenizer
from ..runtime.embedding import Embedding, EmbedQueue

Floats = NDArray[np.float32]
MIN_TEXTS = 2  # one has no neighbour


@dataclass(frozen=True, eq=False)
class VectorScores:
    """An embedding model beside a reference, on N texts."""

    cosine: Floats  # (N,) between the two vectors of each text
    neighbour: NDArray[np.bool_]  # (N,) both find the same other text nearest
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON. Cosines are -1 to 1, agreement a share of the texts."""
        return {
            "texts": len(self.cosine),
            "tokens": self.tokens,
            "cosine_mean": float(self.cosine.mean(dtype=np.float64)),
            "cosine_p1": float(np.quantile(self.cosine, 0.01)),
            "cosine_lowest": float(self.cosine.min()),
            "same_nearest_text": float(self.neighbour.mean()),
        }


def passages(text: str) -> list[str]:
    """The paragraphs of a text: what blank lines divide.

    Raises:
        PromptError: fewer than two.
    """
    found = [part.strip() for part in re.split(r"\n[ \t]*\n", text) if part.strip()]
    if len(found) < MIN_TEXTS:
        raise PromptError("text", got=f"{len(found)} paragraphs", want=f"at least {MIN_TEXTS}, divided by blank lines")
    return found


def compared(
    model: tuple[Runner, Tokenizer], reference: tuple[Runner, Tokenizer], text: str, tell: Callable[[int, int], None]
) -> VectorScores:
    """The paragraphs of a text as documents, by both models.

    Args:
        tell: called with texts done and texts in all, of both models together.

    Raises:
        OptionError: one of them is no embedding model, or their vectors have not as many numbers.
        PromptError: too few paragraphs.
    """
    texts, found, tokens = passages(text), [], 0
    for number, (runner, tokenizer) in enumerate((model, reference)):
        config = runner.config.embedder
        if config is None:
            raise OptionError("evaluate", got="an embedding model and one that writes", want="two of a kind")
        progress = partial(_tell_part, tell, number * len(texts), 2 * len(texts))
        vectors, tokens = _vectors(runner, tokenizer, config, texts, progress)
        found.append(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32(1e-12)))
    one, other = found
    if one.shape != other.shape:
        raise OptionError("dimensions", got=f"{one.shape[1]} and {other.shape[1]}", want="as many from both")
    nearest = [_nearest(vectors) for vectors in found]
    return VectorScores(np.clip((one * other).sum(axis=-1), -1, 1), nearest[0] == nearest[1], tokens)


def _tell_part(tell: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    tell(before + done, total)


def _nearest(vectors: Floats) -> NDArray[np.int64]:
    """(N, E) → (N,): of each the other that is most like it."""
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, -np.inf)
    nearest: NDArray[np.int64] = likeness.argmax(axis=-1)
    return nearest


def _vectors(
    runner: Runner, tokenizer: Tokenizer, config: EmbedderConfig, texts: list[str], tell: Callable[[int], None]
) -> tuple[Floats, int]:
    """(N, E), and the tokens that were read."""
    prompt = config.prompts.get("document", "")
    read = [read_text(tokenizer, config, text, prompt, truncate=True) for text in texts]
    request, queue = Embedding(read, config.dimensions, config.dimensions, normalize=False), EmbedQueue(runner)
    queue.add(request)
    while len(queue):
        queue.turn()
        tell(request.done)
    return request.array(), sum(request.tokens)

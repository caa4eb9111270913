"""What an evaluation found: one line of numbers a token, and what they come to, as a table and as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .vectors import VectorScores


@dataclass(frozen=True, eq=False)
class Distance:
    """How far a model is from a reference. Arrays are (N,), an entry a token, in reading order."""

    loss: NDArray[np.float32]  # the reference's own, in nats
    divergence: NDArray[np.float32]  # KL(reference || model), in nats
    agree: NDArray[np.bool_]  # both find the same token likeliest
    largest_difference: float  # of any logit, at any token

    @property
    def mean(self) -> float:
        return float(self.divergence.mean(dtype=np.float64))

    @property
    def agreement(self) -> float:
        """Share of the tokens, 0 to 1."""
        return float(self.agree.mean())

    def quantile(self, share: float) -> float:
        """The divergence that this share of the tokens stays at or below."""
        return float(np.quantile(self.divergence, share))


@dataclass(frozen=True, eq=False)
class Scores:
    """A model on one kind of prompt."""

    loss: NDArray[np.float32]  # (N,) -log of the probability of the token that came, in nats
    distance: Distance | None  # where there is a reference

    @property
    def tokens(self) -> int:
        return len(self.loss)

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {"tokens": self.tokens, "perplexity": _plain(self.perplexity)}
        if (distance := self.distance) is not None:
            values |= {
                "against_perplexity": _plain(perplexity(distance.loss)),
                "kl_mean": _plain(distance.mean),
                "kl_median": _plain(distance.quantile(0.5)),
                "kl_p99": _plain(distance.quantile(0.99)),
                "kl_max": _plain(distance.quantile(1)),
                "top1_agreement": _plain(distance.agreement),
                "largest_logit_difference": _plain(distance.largest_difference),
            }
        return values


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation:
    """The result of `evaluate`: names of the two checkpoints, and the scores on the text and on pictures."""

    model: str
    against: str | None
    window: int  # tokens of the text that were read together
    words: Scores | None
    pictures: Scores | None
    vectors: VectorScores | None = None  # of two embedding models; then there is nothing else
    notes: tuple[str, ...] = ()  # how the checkpoints were understood

    def text(self) -> str:
        """A table for people."""
        if self.vectors is not None:
            found = self.vectors.to_dict()
            lines = [f"model    {self.model}", f"against  {self.against}", ""]
            return "\n".join(
                lines + [f"{label:<24}{format(found[key], style):>12}" for label, key, style in _OF_VECTORS]
            )
        columns = [(name, scores) for name, scores in (("text", self.words), ("pictures", self.pictures)) if scores]
        lines = [f"model    {self.model}"]
        if self.against is not None:
            lines.append(f"against  {self.against}")
        lines += ["", " " * 24 + "".join(f"{name:>12}" for name, _ in columns)]
        for label, key, style in _ROWS:
            values = [scores.to_dict().get(key, _ABSENT) for _, scores in columns]
            if _ABSENT not in values:
                lines.append(f"{label:<24}" + "".join(f"{_shown(value, style):>12}" for value in values))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        if self.vectors is not None:
            return {"model": self.model, "against": self.against, "vectors": self.vectors.to_dict()}
        return {
            "model": self.model,
            "against": self.against,
            "window": self.window,
            "text": self.words.to_dict() if self.words is not None else None,
            "pictures": self.pictures.to_dict() if self.pictures is not None else None,
        }


_ABSENT = object()
_OF_VECTORS = (
    ("texts", "texts", ",d"),
    ("tokens", "tokens", ",d"),
    ("cosine, mean", "cosine_mean", ".6f"),
    ("  1st percentile", "cosine_p1", ".6f"),
    ("  lowest", "cosine_lowest", ".6f"),
    ("same nearest text", "same_nearest_text", ".2%"),
)
_ROWS = (
    ("tokens", "tokens", ",d"),
    ("perplexity", "perplexity", ".3f"),
    ("perplexity of against", "against_perplexity", ".3f"),
    ("KL divergence, mean", "kl_mean", ".5f"),
    ("  median", "kl_median", ".5f"),
    ("  99th percentile", "kl_p99", ".5f"),
    ("  largest", "kl_max", ".5f"),
    ("same likeliest token", "top1_agreement", ".2%"),
    ("largest logit difference", "largest_logit_difference", ".4f"),
)


def perplexity(loss: NDArray[np.float32]) -> float:
    """e to the mean of losses in nats."""
    mean = float(loss.mean(dtype=np.float64))
    return math.exp(mean) if not mean > 700 else math.inf


def _plain(value: float) -> float | None:
    """None for what JSON has no number for: a model that computes NaN or infinity."""
    return value if math.isfinite(value) else None


def _shown(value: float | int | None, style: str) -> str:
    return "not finite" if value is None else format(value, style)

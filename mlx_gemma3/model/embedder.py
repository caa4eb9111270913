"""What an embedding model does with its normed hidden states: mean of each text's rows, matrices, length 1.

    hidden (T, 1, D) ─ mean ─ (N, D) ─ dense ─ dense ─ (N, E) ─ / ‖·‖

All in float32, whatever the activations are. Source: sentence-transformers 6.2 (modules pooling.py, dense.py,
normalize.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import mlx.core as mx
import mlx.nn as nn

from ..embedder_config import EmbedderConfig

SMALLEST_LENGTH = 1e-12  # a vector shorter than that is divided by it

_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "identity": lambda x: x,
    "tanh": mx.tanh,
    "relu": lambda x: mx.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + mx.erf(x * 0.5**0.5)),
    "sigmoid": mx.sigmoid,
}


def pooled(hidden: mx.array, lengths: Sequence[int], skipped: Sequence[int]) -> mx.array:
    """The mean row of each text.

    Args:
        hidden: (T, 1, D), N texts one behind another.
        lengths: tokens of each, T together.
        skipped: how many of its first tokens do not count; a text of which none counts is 0.

    Returns:
        (N, D) float32.
    """
    means, start = [], 0
    for (length, skip), texts in groupby(zip(lengths, skipped, strict=True)):
        count = len(list(texts))
        stop = start + length * count
        rows = hidden[start:stop].reshape(count, length, -1).astype(mx.float32)[:, skip:]
        means.append(rows.sum(axis=1) / max(length - skip, 1))
        start = stop
    return mx.concatenate(means)


def finished(
    means: mx.array,
    config: EmbedderConfig,
    dense: Sequence[nn.Module],
    multiply: Callable[[int, mx.array], mx.array] | None = None,
) -> mx.array:
    """From the means to the vectors.

    Args:
        means: (N, D) float32.
        dense: the modules of `config.dense`.
        multiply: x times the matrix of this number, without its bias, as a device does it best.

    Returns:
        (N, E) float32.
    """
    x = means
    for number, (module, about) in enumerate(zip(dense, config.dense, strict=True)):
        if multiply is None:
            x = module(x)
        else:
            x = multiply(number, x)
            x = x + module.bias if about.bias else x
        x = _ACTIVATIONS[about.activation](x.astype(mx.float32))
    return unit(x) if config.normalize else x


def unit(x: mx.array) -> mx.array:
    """Rows of length 1: (N, E) float32."""
    return x / mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), SMALLEST_LENGTH)

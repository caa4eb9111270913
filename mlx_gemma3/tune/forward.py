"""Sequences through the model, and what they cost: hidden states, losses, their gradients.

    sequences ─ rows (T, 1, D) ─ layers, each its own sequence ─ norm ─ rows that count (R, D) ─ head ─ losses (R,)

Nothing is padded: matrices take the tokens of all sequences together, attention goes sequence by sequence, with the
model's own masks (model/context.py: Sequences). The head runs on the rows whose next token counts, a slice of them at a
time, and of each slice the slopes of the hidden states are computed at once, so that logits of more than SLICE numbers
are never held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from ..model.cache import Caches
from ..model.context import Chunk, Sequences
from ..model.gemma3 import Gemma3
from ..model.vision import PLAIN, TowerKernels
from . import host
from .layers import LearningProjector

SLICE = 1 << 24  # logits that are held at once


@dataclass(frozen=True, eq=False)
class Sample:
    """One sequence as the model is trained on it."""

    tokens: npt.NDArray[np.int32]  # (L,)
    counts: npt.NDArray[np.bool_]  # (L,): this token is to be predicted; never the first
    spans: tuple[tuple[int, int], ...] = ()  # half-open, the image tokens of each picture
    pictures: tuple[str, ...] = ()  # the names of their pictures (pictures.py)


class Trainee:
    """A model with its adapter in place, arranged for MLX's default device."""

    def __init__(self, model: Gemma3, *, checkpointing: bool = False, plain: bool = False) -> None:
        """
        Args:
            checkpointing: keep a layer's inputs alone, and compute the layer again on the way back.
            plain: the plain modules also where the CPU has faster ones (host.py).
        """
        self.model, self.config = model, model.config
        self.checkpointing = checkpointing
        learnt = tree_flatten(model.trainable_parameters())
        self.lengths_at_start = {name: value for name, value in learnt if name.endswith(".m")}  # of DoRA
        self.tower: TowerKernels = PLAIN
        self._head: Callable[[mx.array], mx.array] = model.head
        self._head_back: Callable[[mx.array, mx.array], mx.array] = self._through_head
        float32 = model.language_model.norm.weight.dtype == mx.float32
        if mx.default_device().type == mx.DeviceType.cpu and float32 and not plain:
            matrix = host.arrange(model)
            self.tower, self._head = host.TOWER, matrix.forward
            self._head_back = lambda _, slopes: matrix.backward(slopes)
        # The projector that learns is for `embed`: what is seen does not change, and can be kept.
        self.projects = isinstance(model.get("multi_modal_projector"), LearningProjector)
        if self.projects:
            self.tower = replace(self.tower, project=lambda _, rows: rows)
        self._costs = self._make_costs()

    def hidden(self, sequences: Sequence[Sample], features: mx.array | None) -> mx.array:
        """(T, 1, D): normed hidden states of all tokens of all sequences.

        Args:
            features: what `see` makes of the pictures, in the order of the sequences; None without pictures.
        """
        decoder = self.model.language_model
        lengths = [len(one.tokens) for one in sequences]
        tokens = np.concatenate([one.tokens for one in sequences])[None]
        rows, blocks = self.embed(tokens, features, None, _spans(sequences))
        context = Sequences(lengths, None if blocks is None else blocks[0])
        x = rows.transpose(1, 0, 2)  # (T, 1, D)
        for layer in decoder.layers:
            x = self._again(layer, x, context) if self.checkpointing else layer(x, context)
        return decoder.norm(x)

    def embed(
        self, tokens: npt.NDArray[np.int32], features: mx.array | None, caches: Caches | None, spans: Sequence[Any]
    ) -> tuple[mx.array, mx.array | None]:
        """As Gemma3.embed, of what `see` makes of the pictures."""
        if features is not None and self.projects:
            features = self.model.multi_modal_projector.project(features)
        return self.model.embed(tokens, features, caches, spans)

    def see(self, pixels: npt.NDArray[np.float32]) -> mx.array:
        """(N, S, S, 3) → (N, T, D); where the projector learns its inputs (N, T, hidden of the tower)"""
        return self.model.encode_images(pixels, self.tower)

    def costs(self, sequences: Sequence[Sample], features: mx.array | None) -> mx.array:
        """(R,) float32: -log p of each token that counts, in order, in nats."""
        hidden = self.hidden(sequences, features)
        tokens = np.concatenate([one.tokens for one in sequences])
        places = np.flatnonzero(np.concatenate([one.counts for one in sequences]))
        chosen = hidden[:, 0][mx.array(places - 1)]  # the row before predicts it
        out: mx.array = self._costs(chosen, mx.array(tokens[places]))
        return out

    def next_logits(self, rows: mx.array, blocks: mx.array | None, caches: Caches) -> mx.array:
        """(V,) after the last of a prompt's rows (1, L, D), which go into the caches."""
        decoder = self.model.language_model
        context = Chunk(rows.shape[1], caches, blocks)
        for layer in decoder.layers:
            rows = layer(rows, context)
        return self._head(decoder.norm(rows[:, -1:]))[0, 0]

    @staticmethod
    def _again(layer: nn.Module, x: mx.array, context: Sequences) -> mx.array:
        def inside(learns: dict[str, mx.array], x: mx.array) -> mx.array:
            layer.update(learns)
            done: mx.array = layer(x, context)
            return done

        out: mx.array = mx.checkpoint(inside)(layer.trainable_parameters(), x)
        return out

    def _through_head(self, hidden: mx.array, slopes: mx.array) -> mx.array:
        _, (back,) = mx.vjp(self.model.head, [hidden], [slopes])
        return back

    def _make_costs(self) -> Callable[[mx.array, mx.array], mx.array]:
        """A function whose derivative is computed with its value: of each row, how its loss moves with it."""
        step = max(1, SLICE // self.config.text.vocab_size)

        @mx.custom_function
        def both(hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
            costs, slopes = list[mx.array](), list[mx.array]()
            for start in range(0, hidden.shape[0], step):
                rows, wanted = hidden[start : start + step], targets[start : start + step, None]
                if costs:
                    rows = mx.depends([rows], [slopes[-1]])[0]  # one slice after another, not all logits first
                logits = self._head(rows)  # (R, V) float32
                total = mx.logsumexp(logits, axis=-1, keepdims=True)
                cost = (total - mx.take_along_axis(logits, wanted, axis=-1))[:, 0]
                chances = mx.exp(logits - total)
                at = mx.take_along_axis(chances, wanted, axis=-1) - 1
                slope = self._head_back(rows, mx.put_along_axis(chances, wanted, at, axis=-1))
                costs.append(mx.depends([cost], [slope])[0])
                slopes.append(slope)
            return mx.concatenate(costs), mx.concatenate(slopes)

        @both.vjp
        def back(
            primals: tuple[mx.array, mx.array],
            cotangents: tuple[mx.array, mx.array],
            outputs: tuple[mx.array, mx.array],
        ) -> tuple[mx.array, mx.array]:
            return (cotangents[0][:, None] * outputs[1]).astype(primals[0].dtype), mx.zeros_like(primals[1])

        def costs_of(hidden: mx.array, targets: mx.array) -> mx.array:
            found: Any = both(hidden, targets)
            cost: mx.array = found[0]
            return cost

        return costs_of


def _spans(sequences: Sequence[Sample]) -> list[tuple[int, int]]:
    found, start = [], 0
    for one in sequences:
        found += [(start + first, start + last) for first, last in one.spans]
        start += len(one.tokens)
    return found

"""The steps: losses, gradients, AdamW, validation, and what is kept of them so that one can go on.

A training is a function of its settings, its data and its step: order, rate and gradients follow from these, so that
one which was cut off goes on from its last state with the same losses, bit for bit on one machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from . import batches as order
from . import layers
from .encoding import Item, prompt_of
from .forward import Sample, Trainee
from .pictures import Pictures
from .settings import Settings

Tell = Callable[[Mapping[str, Any]], None]


@dataclass
class Progress:
    """Where a training stands, beside its arrays."""

    step: int = 0
    best: float | None = None  # the lowest validation loss
    best_step: int = 0
    worse: int = 0  # evaluations since
    rows: list[dict[str, Any]] = field(default_factory=list)  # of losses.csv
    examples: list[dict[str, Any]] = field(default_factory=list)  # of the last evaluation
    ended: str = ""  # "done", "no better" or "stopped"


class Training:
    """One model that learns."""

    def __init__(
        self,
        trainee: Trainee,
        pictures: Pictures,
        items: Sequence[Item],
        valid: Sequence[Item],
        settings: Settings,
        *,
        preferences: bool,
    ) -> None:
        self.trainee, self.pictures, self.settings = trainee, pictures, settings
        self.items, self.valid, self.preferences = items, valid, preferences
        self.lengths = [item.length for item in items]
        size, tokens = settings.batch_size, settings.batch_tokens
        an_epoch = len(order.batches(self.lengths, size=size, tokens=tokens, seed=settings.seed, epoch=0))
        self.steps = settings.steps or max(1, round(settings.epochs * -(-an_epoch // settings.accumulate)))
        self.optimizer = optim.AdamW(
            self._rate(), betas=[0.9, 0.999], weight_decay=settings.weight_decay, bias_correction=True
        )
        self.optimizer.init(trainee.model.trainable_parameters())
        self.progress = Progress()
        self._before: dict[int, np.ndarray] = {}  # of each preference what the model thought of it at the beginning
        self._slopes = nn.value_and_grad(trainee.model, self._loss)

    def _rate(self) -> Callable[[mx.array], mx.array]:
        """Up to the highest rate in a straight line, then a cosine down to a tenth of it."""
        settings = self.settings
        warm = min(round(settings.warmup * self.steps), self.steps - 1)
        down = optim.cosine_decay(settings.learning_rate, max(1, self.steps - warm), settings.learning_rate / 10)
        if warm < 1:
            return down
        up = optim.linear_schedule(settings.learning_rate / (warm + 1), settings.learning_rate, warm)
        return optim.join_schedules([up, down], [warm])

    def run(self, tell: Tell, save: Callable[[Training, str], None], stop: Callable[[], bool]) -> None:
        """All steps that are left.

        Args:
            tell: called with what happened, as plain values.
            save: called with "state" when it is time to, "best" after a better validation.
            stop: whether to end after this step.
        """
        progress, settings = self.progress, self.settings
        size, tokens = settings.batch_size, settings.batch_tokens
        each = order.steps(self.lengths, size=size, tokens=tokens, accumulate=settings.accumulate, seed=settings.seed)
        for _ in range(progress.step):
            next(each)
        if self.preferences:
            self._remember(tell)
        if progress.step == 0 and self.valid:
            self._evaluate(tell, save)
        began, first = time.monotonic(), progress.step
        while progress.step < self.steps and not progress.ended:
            batch = next(each)
            start = time.monotonic()
            loss, count = self._step(batch)
            progress.step += 1
            seconds = time.monotonic() - start
            rate = _scalar(self.optimizer.learning_rate)
            row = {
                "step": progress.step, "loss": loss, "learning_rate": rate, "tokens": count,
                "seconds": round(seconds, 4),
            }  # fmt: skip
            progress.rows.append(row)
            left = (time.monotonic() - began) / (progress.step - first) * (self.steps - progress.step)
            tell({"kind": "step", "steps": self.steps, "seconds_left": left, **row})
            last = progress.step == self.steps
            if self.valid and (last or (settings.eval_every and progress.step % settings.eval_every == 0)):
                self._evaluate(tell, save)
                if settings.patience and progress.worse >= settings.patience:
                    progress.ended = "no better"
            if not last and not progress.ended and stop():
                progress.ended = "stopped"
            if last and not progress.ended:
                progress.ended = "done"
            if progress.ended or (settings.save_every and progress.step % settings.save_every == 0):
                save(self, "state")

    def _step(self, batches: Sequence[Sequence[int]]) -> tuple[float, int]:
        """One of the optimizer: (loss, tokens that went through the model)."""
        items = [[self.items[index] for index in batch] for batch in batches]
        total = sum(len(one) if self.preferences else sum(item.count for item in one) for one in items)
        model, loss, sums = self.trainee.model, 0.0, None
        for batch, indices in zip(items, batches, strict=True):
            value, slopes = self._slopes(batch, indices, total)
            sums = slopes if sums is None else tree_map(lambda one, other: one + other, sums, slopes)
            mx.eval(value, sums)
            loss += _scalar(value)
        assert sums is not None
        if self.settings.clip:
            sums, _ = optim.clip_grad_norm(sums, self.settings.clip)
        self.optimizer.update(model, sums)
        mx.eval(model.trainable_parameters(), self.optimizer.state)
        return loss, sum(item.length for batch in items for item in batch)

    def _loss(self, batch: Sequence[Item], indices: Sequence[int], total: int) -> mx.array:
        samples = [one for item in batch for one in item.samples]
        costs = self.trainee.costs(samples, self.pictures.rows(batch, samples))
        if not self.preferences:
            return costs.sum() / total
        before = np.stack([self._before[index] for index in indices])
        return self._preference(samples, costs, before).sum() / total

    def _preference(self, samples: Sequence[Sample], costs: mx.array, before: np.ndarray) -> mx.array:
        """DPO (Rafailov et al. 2023, eq. 7) of each pair: samples are chosen, rejected, chosen, …

        Args:
            before: (P, 2), the log-probabilities of both by the model at the beginning.
        """
        now = mx.stack(_sums(samples, costs)).reshape(-1, 2)
        moved = now - mx.array(before.astype(np.float32))
        margins = self.settings.beta * (moved[:, 0] - moved[:, 1])
        return mx.logaddexp(mx.array(0.0), -margins)

    def _remember(self, tell: Tell) -> None:
        """What the model thinks of each pair with an adapter that does nothing."""
        model = self.trainee.model
        now = layers.parameters(model)
        start = {name: mx.zeros_like(value) for name, value in now.items() if name.endswith("lora_b")}
        layers.put(model, start | self._lengths_at_start)
        every = [*enumerate(self.items), *((-1 - n, item) for n, item in enumerate(self.valid))]
        for number, (index, item) in enumerate(every):
            costs = self.trainee.costs(item.samples, self.pictures.rows([item], item.samples))
            sums = mx.stack(_sums(item.samples, costs))
            self._before[index] = np.array(sums)
            tell({"kind": "reference", "done": number + 1, "total": len(every)})
        layers.put(model, now)

    @property
    def _lengths_at_start(self) -> dict[str, mx.array]:
        return self.trainee.lengths_at_start

    def _evaluate(self, tell: Tell, save: Callable[[Training, str], None]) -> None:
        """The loss of the validation, the same weights as training has them; and some answers."""
        progress, settings = self.progress, self.settings
        lengths = [item.length for item in self.valid]
        total, cost, right = 0, 0.0, 0
        for batch in order.batches(lengths, size=settings.batch_size, tokens=settings.batch_tokens, seed=0, epoch=None):
            items = [self.valid[index] for index in batch]
            samples = [one for item in items for one in item.samples]
            costs = self.trainee.costs(samples, self.pictures.rows(items, samples))
            if self.preferences:
                before = np.stack([self._before[-1 - index] for index in batch])
                pairs = self._preference(samples, costs, before)
                cost += _scalar(pairs.sum())
                right += int(_scalar((pairs < float(np.log(2))).sum()))
                total += len(items)
            else:
                cost += _scalar(costs.sum())
                total += sum(item.count for item in items)
        loss = cost / total
        progress.examples = [self._answered(item) for item in self.valid[: settings.examples]]
        better = progress.best is None or loss < progress.best
        if better:
            progress.best, progress.best_step, progress.worse = loss, progress.step, 0
        else:
            progress.worse += 1
        if progress.rows and progress.rows[-1]["step"] == progress.step:
            progress.rows[-1]["validation"] = loss
        else:
            progress.rows.append({"step": progress.step, "validation": loss})
        told: dict[str, Any] = {"kind": "evaluation", "step": progress.step, "loss": loss, "best": better}
        if self.preferences:
            told["preferred"] = right / total
        tell(told | {"examples": progress.examples})
        if better:
            save(self, "best")

    def _answered(self, item: Item) -> dict[str, Any]:
        """What the model says, and what it was to say: token ids."""
        before, wanted = prompt_of(item.samples[0])
        most = min(len(wanted) + 16, 64)
        features = self.pictures.rows([item], [before])
        return {
            "prompt": before.tokens.tolist(),
            "wanted": wanted,
            "answer": greedy(self.trainee, before, features, most),
        }

    def arrays(self) -> dict[str, mx.array]:
        """All that changes from step to step."""
        learnt = {f"learnt.{name}": value for name, value in layers.parameters(self.trainee.model).items()}
        moments = {f"optimizer.{name}": value for name, value in tree_flatten(self.optimizer.state)}
        return learnt | moments

    def restore(self, arrays: Mapping[str, mx.array], progress: Progress) -> None:
        """Go on from there."""
        parts: dict[str, list[tuple[str, mx.array]]] = {"learnt": [], "optimizer": []}
        for name, value in arrays.items():
            part, _, rest = name.partition(".")
            parts[part].append((rest, value))
        layers.put(self.trainee.model, dict(parts["learnt"]))
        self.optimizer.state = tree_unflatten(parts["optimizer"])
        self.progress = progress


def greedy(trainee: Trainee, prompt: Sample, features: mx.array | None, most: int) -> list[int]:
    """The greedy answer, without the token that ends it."""
    model, config = trainee.model, trainee.config
    caches = model.make_caches()
    rows, blocks = trainee.embed(prompt.tokens[None], features, caches, prompt.spans)
    found: list[int] = []
    logits = trainee.next_logits(rows, blocks, caches)
    while len(found) < most:
        token = int(np.array(mx.argmax(logits)))
        if token in config.eos_token_ids:
            break
        found.append(token)
        caches.ends_in_image = False
        rows = model.language_model.embed(mx.array([[token]]))
        logits = trainee.next_logits(rows, None, caches)
    return found


def _scalar(x: mx.array) -> float:
    return float(np.array(x))


def _sums(samples: Sequence[Sample], costs: mx.array) -> list[mx.array]:
    """The log-probability of each sample's words, of the costs of all."""
    found, start = [], 0
    for one in samples:
        count = int(one.counts.sum())
        found.append(-costs[start : start + count].sum())
        start += count
    return found

"""Train the demo checkpoint: `python -m examples.demo_model.train --out RUN`.

First the tower alone, on what stands in each patch (phase `vision`); then the whole model on questions (`joint`); then
again with more of what is learnt last, reading and counting (`hard`). Resumes where RUN/state.pt ends. Needs the
`reference` extra (torch). The same seed gives the same pictures in the same order; no picture comes twice, so the share
of right answers that is shown is of pictures never seen before.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_gemma3.prompt.tokenizer import Tokenizer

from .batches import WHAT, Writer, hard_batch, joint_batch, vision_batch
from .draw import font_files
from .muon import Muon
from .network import Gemma3, Sizes
from .scenes import COLOURS
from .vocabulary import write_tokenizer

SEED = 4
STEPS = {"vision": 2000, "joint": 4000, "hard": 3400}
SIZES = {"vision": 64, "joint": 40, "hard": 32}  # of a step's batch: pictures, then rows of questions
MUON_RATES = {"vision": 0.02, "joint": 0.015, "hard": 0.01}
FROZEN_STEPS = 100  # of the joint phase, for the tower
KEEP_EVERY = 90.0  # seconds


class Judges(nn.Module):
    """What stands in each patch, in which colour, and whose centre: only for training."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = (len(WHAT), len(COLOURS) + 1, 2)
        self.head = nn.Linear(sizes.vision_width, sum(self.sizes))

    def forward(self, seen: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """(loss, share of the covered patches whose thing and colour are both right)"""
        guesses = self.head(seen).float().split(self.sizes, -1)
        weight = torch.where(labels[:, 0] > 0, 1.0, 0.25)
        loss = sum(
            (F.cross_entropy(guess.flatten(0, 1), labels[:, n].flatten(), reduction="none") * weight.flatten()).sum()
            for n, guess in enumerate(guesses)
        )
        right = (guesses[0].argmax(-1) == labels[:, 0]) & (guesses[1].argmax(-1) == labels[:, 1])
        return loss / weight.sum(), right[labels[:, 0] > 0].float().mean().item()


def feed(make: Callable[[int], dict[str, np.ndarray]], first: int, last: int) -> Iterator[dict[str, Tensor]]:
    """Batches number `first` to `last` - 1, made in a process of their own, a few ahead."""
    context = get_context("fork")
    queue: Queue[dict[str, np.ndarray]] = context.Queue(4)

    def work() -> None:
        for number in range(first, last):
            queue.put(make(number))

    worker = context.Process(target=work, daemon=True)
    worker.start()
    for _ in range(first, last):
        yield {name: torch.from_numpy(array) for name, array in queue.get().items()}
    worker.join()


def whiten(model: Gemma3, pixels: Tensor) -> None:
    """Start the patch embedding as the principal components of patches, each scaled to the same variance."""
    embed = model.vision_tower["vision_model"].embeddings.patch_embedding
    grid, patch = model.sizes.grid, model.sizes.patch
    x = (
        pixels.view(-1, grid, patch, grid, patch, 3).permute(0, 1, 3, 5, 2, 4).reshape(-1, 3 * patch**2).float() / 127.5
        - 1
    )
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    parts = vectors[:, -embed.weight.shape[0] :] / (values[-embed.weight.shape[0] :] + 1e-3).sqrt()
    with torch.no_grad():
        embed.weight.copy_(parts.T.reshape(embed.weight.shape) * 0.5)
        embed.bias.copy_(-(mean @ parts) * 0.5)


def split(modules: list[nn.Module]) -> tuple[list[Tensor], list[Tensor]]:
    """(matrices for Muon, the rest for AdamW)"""
    matrices, rest = [], []
    for module in modules:
        for name, p in module.named_parameters():
            plain = p.ndim != 2 or any(word in name for word in ("embed", "head"))
            (rest if plain else matrices).append(p)
    return matrices, rest


def rate(step: int, steps: int) -> float:
    """Up over the first 2%, level to 40%, then down to zero along a line."""
    done = step / steps
    return min(1.0, (step + 1) / (0.02 * steps + 1), (1 - done) / 0.6)


class Run:
    """One training run in a folder: state, log, progress line."""

    def __init__(self, out: Path, steps: dict[str, int], fonts: tuple[str, ...]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.steps, self.fonts = out, steps, fonts
        write_tokenizer(out)
        self.writer = Writer(Tokenizer.from_folder(out))
        torch.manual_seed(SEED)
        self.model = Gemma3(Sizes(self.writer.tokenizer.vocab_size))
        self.judges = Judges(self.model.sizes)
        self.phase, self.step, self.optimizer_state = "vision", 0, None
        self.saved = time.monotonic()
        if (out / "state.pt").exists():
            state = torch.load(out / "state.pt")
            self.model.load_state_dict(state["model"])
            self.judges.load_state_dict(state["judges"])
            self.phase, self.step, self.optimizer_state = state["phase"], state["step"], state["optimizer"]
        else:
            whiten(self.model, torch.from_numpy(vision_batch(Random(SEED), 600, fonts)["pixels"]))

    def save(self, optimizer: Muon | None) -> None:
        state = {"model": self.model.state_dict(), "judges": self.judges.state_dict(), "phase": self.phase,
                 "step": self.step, "optimizer": optimizer.state_dict() if optimizer else None}  # fmt: skip
        torch.save(state, self.out / "state.tmp")
        (self.out / "state.tmp").replace(self.out / "state.pt")
        self.saved = time.monotonic()

    def go(self) -> None:
        """All phases that are left, each from a fresh optimizer."""
        for phase in list(STEPS)[list(STEPS).index(self.phase) :]:
            if phase != self.phase:
                self.phase, self.step, self.optimizer_state = phase, 0, None
                self.save(None)
            self._train()

    def _batch(self, number: int) -> dict[str, np.ndarray]:
        random = Random(f"{SEED} {self.phase} {number}")
        if self.phase == "vision":
            return vision_batch(random, SIZES["vision"], self.fonts)
        make = joint_batch if self.phase == "joint" else hard_batch
        return make(random, self.writer, SIZES[self.phase], self.fonts)

    def _vision_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
        return self.judges(self.model.see(batch["pixels"]), batch["labels"].long())

    def _joint_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
        with torch.set_grad_enabled(self.phase != "joint" or self.step >= FROZEN_STEPS):
            seen = self.model.see(batch["pixels"])
        beside, _ = self.judges(seen, batch["labels"].long())
        logits = self.model(batch, seen).float()
        right = (logits.argmax(-1) == batch["wanted"]).float().mean().item()
        return F.cross_entropy(logits, batch["wanted"]) + 0.3 * beside, right

    def _train(self) -> None:
        steps, first = self.steps[self.phase], self.step
        alone = self.phase == "vision"
        loss_of = self._vision_loss if alone else self._joint_loss
        modules = [self.model.vision_tower if alone else self.model, self.judges]
        optimizer = Muon(*split(modules), rate=MUON_RATES[self.phase], rest_rate=2e-3)
        if self.optimizer_state:
            optimizer.load_state_dict(self.optimizer_state)
        recent: deque[tuple[float, float]] = deque(maxlen=50)
        began = time.monotonic()
        with (self.out / "log.csv").open("a", newline="") as file:
            log = csv.writer(file)
            for batch in feed(self._batch, first, steps):
                with torch.autocast("cpu", torch.bfloat16):
                    loss, right = loss_of(batch)
                loss.backward()
                optimizer.step(rate(self.step, steps))
                optimizer.zero_grad(set_to_none=True)
                self.step += 1
                recent.append((loss.item(), right))
                if self.step % 25 == 0 or self.step == steps:
                    means = [sum(column) / len(recent) for column in zip(*recent, strict=True)]
                    log.writerow([self.phase, self.step, *(f"{mean:.4f}" for mean in means)])
                    file.flush()
                    left = (time.monotonic() - began) / (self.step - first) * (steps - self.step)
                    show(self.phase, self.step, steps, means, left)
                if time.monotonic() - self.saved > KEEP_EVERY:
                    self.save(optimizer)
        self.save(optimizer)


def show(phase: str, step: int, steps: int, means: list[float], left: float) -> None:
    """The progress line."""
    bar = "█" * (20 * step // steps)
    line = f"{phase:6} {bar:20} {step}/{steps}  loss {means[0]:.3f}  right {means[1]:.1%}  {left / 60:.0f} min left"
    sys.stderr.write(("\r" if sys.stderr.isatty() else "") + line + ("" if sys.stderr.isatty() else "\n"))
    sys.stderr.flush()


def main() -> None:
    """Train, or go on with a training that was stopped."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, required=True)
    for phase, steps in STEPS.items():
        options.add_argument(f"--{phase}-steps", type=int, default=steps)
    options.add_argument("--fonts", default="", help="a folder of .ttf files; else this machine's common ones")
    chosen: Any = options.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    steps = {phase: getattr(chosen, f"{phase}_steps") for phase in STEPS}
    Run(chosen.out, steps, font_files(chosen.fonts)).go()


if __name__ == "__main__":
    main()

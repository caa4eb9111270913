"""Muon for matrices, AdamW for the rest: one optimizer.

Muon (Keller Jordan, 2024) replaces a matrix's momentum by the nearest matrix whose singular values are all about one,
found by five Newton-Schulz steps. Matrices of one shape are done together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Groups with `muon=True` hold matrices; the others are stepped by AdamW."""

    def __init__(self, matrices: Iterable[Tensor], rest: Iterable[Tensor], *, rate: float, rest_rate: float) -> None:
        groups = [
            {"params": list(matrices), "muon": True, "lr": rate, "decay": 0.01},
            {"params": list(rest), "muon": False, "lr": rest_rate, "decay": 0.0},
        ]
        super().__init__(groups, {})
        for group in self.param_groups:
            group["peak"] = group["lr"]

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:
        """One step at `scale` times the peak rates; parameters without a gradient stay."""
        for group in self.param_groups:
            group["lr"] = rate = group["peak"] * scale
            live = [p for p in group["params"] if p.grad is not None]
            if not group["muon"]:
                self._adam(live, rate)
                continue
            shapes: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in live:
                shapes[tuple(sorted(p.shape))].append(p)
            for alike in shapes.values():
                self._muon(alike, rate, group["decay"])

    def _muon(self, alike: list[Tensor], rate: float, decay: float) -> None:
        updates = []
        for p in alike:
            state = self.state[p]
            momentum = state.setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            update = p.grad.lerp(momentum, 0.95)
            updates.append(update if p.shape[0] <= p.shape[1] else update.T)
        x = torch.stack(updates)
        x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
        for p, update in zip(alike, x.float(), strict=True):
            p.mul_(1 - rate * decay)
            update = update if p.shape[0] <= p.shape[1] else update.T
            p.add_(update, alpha=-rate * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)

    def _adam(self, live: list[Tensor], rate: float) -> None:
        for p in live:
            state = self.state[p]
            if not state:
                state.update(count=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
            state["count"] += 1
            state["mean"].lerp_(p.grad, 0.1)
            state["square"].lerp_(p.grad.square(), 0.02)
            mean = state["mean"] / (1 - 0.9 ** state["count"])
            square = state["square"] / (1 - 0.98 ** state["count"])
            p.addcdiv_(mean, square.sqrt_().add_(1e-9), value=-rate)

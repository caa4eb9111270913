"""How a model is taught: every setting, checked in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..errors import OptionError
from .layers import Shape, check_matrices

KINDS, FORMS, LOSSES = ("lora", "dora"), ("peft", "mlx-lm"), ("assistant", "all")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """
    Args:
        rank, alpha, kind, matrices, layers, tower, projector: see layers.Shape; alpha of None is twice the rank.
        steps: of the optimizer; None for `epochs` times all data.
        batch_size: examples that go through the model together.
        batch_tokens: fill batches up to so many tokens instead (packing); nothing is ever padded.
        accumulate: batches of one step.
        learning_rate: the highest; reached after `warmup` (a share of all steps), then a cosine down to a tenth.
        clip: the largest norm of a step's gradients; 0 for any.
        max_length: tokens of a sequence.
        loss_on: "assistant" or "all".
        valid_share: of the data, for validation where there is none beside it.
        eval_every, save_every: steps; 0 for the end alone.
        patience: evaluations without a better loss after which it ends; 0 for never.
        examples: answers that are shown at each evaluation.
        checkpointing: compute layers again on the way back, for less memory.
        beta: of preferences: how far the model may go from where it began.
        picture_cache: bytes on disk for rows of pictures.
        form: of the adapter that is written, "peft" or "mlx-lm".
    """

    rank: int = 8
    alpha: float | None = None
    kind: str = "lora"
    matrices: tuple[str, ...] | str = "all"
    layers: int | None = None
    tower: bool = False
    projector: bool = False
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 4
    batch_tokens: int | None = None
    accumulate: int = 1
    learning_rate: float = 2e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    max_length: int = 2048
    loss_on: str = "assistant"
    valid_share: float = 0.0
    eval_every: int = 0
    save_every: int = 100
    patience: int = 0
    examples: int = 3
    seed: int = 0
    checkpointing: bool = False
    beta: float = 0.1
    picture_cache: int = 4 << 30
    form: str = "peft"

    def __post_init__(self) -> None:
        """Raises OptionError: a setting out of its range."""
        object.__setattr__(self, "matrices", check_matrices(self.matrices))
        for name, least in {"rank": 1, "batch_size": 1, "accumulate": 1, "max_length": 8}.items():
            _at_least(name, getattr(self, name), least)
        for name in ("eval_every", "save_every", "patience", "examples", "seed", "picture_cache"):
            _at_least(name, getattr(self, name), 0)
        for name, least in {"steps": 1, "batch_tokens": 8, "layers": 1}.items():
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), least)
        for name, low, high in (
            ("learning_rate", 0.0, 10.0), ("warmup", 0.0, 1.0), ("weight_decay", 0.0, 10.0), ("clip", 0.0, 1e9),
            ("valid_share", 0.0, 0.9), ("epochs", 1e-6, 1e6), ("beta", 1e-6, 1e3), ("alpha", 1e-6, 1e6),
        ):  # fmt: skip
            value = getattr(self, name)
            if name == "alpha" and value is None:
                continue
            if not low <= value <= high or (name == "learning_rate" and value == 0):
                raise OptionError(name, got=value, want=f"{low:g} to {high:g}")
        for name, allowed in (("kind", KINDS), ("form", FORMS), ("loss_on", LOSSES)):
            if getattr(self, name) not in allowed:
                raise OptionError(name, got=repr(getattr(self, name)), want=" or ".join(allowed))
        if self.projector and (self.kind, self.form) != ("lora", "peft"):
            got = "kind dora" if self.kind == "dora" else "form mlx-lm"
            raise OptionError("projector", got=got, want="kind lora and form peft: nobody reads it otherwise")

    @property
    def shape(self) -> Shape:
        assert isinstance(self.matrices, tuple), "by __post_init__"
        alpha = 2.0 * self.rank if self.alpha is None else float(self.alpha)
        return Shape(self.kind, self.rank, alpha, self.matrices, self.layers, self.tower, self.projector)

    def deciding(self) -> dict[str, Any]:
        """What decides the numbers: a training is gone on with under the same."""
        free = {"save_every", "examples", "picture_cache", "form"}
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in free}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise OptionError(name, got=value, want=f">= {least}")

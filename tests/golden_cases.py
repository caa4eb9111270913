"""The tiny checkpoints of goldens/model, what the reference gave for them, and how near ours comes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_gemma3.model.gemma3 import Gemma3

GOLDENS = Path(__file__).parent / "goldens" / "model"
CASES = sorted((path.parents[1].name, path.stem) for path in GOLDENS.glob("*/cases/*.npz") if "batch" not in path.stem)
BATCHES = sorted((path.parents[1].name, path.stem) for path in GOLDENS.glob("*/cases/batch*.npz"))
IMAGES = [(kind, name) for kind, name in CASES if kind == "image" and name != "text_only"]
BFLOAT16 = [("text", "window_plus_1"), ("text", "five_windows"), ("image", "text_only"), ("image", "three_interleaved")]


@dataclass(frozen=True)
class Case:
    """One golden: a prompt, what follows it, and the reference's logits at some positions of both."""

    tokens: list[int]
    pixels: np.ndarray | None  # (n, 56, 56, 3)
    generated: list[int]
    positions: np.ndarray  # (P,) into tokens + generated
    logits: np.ndarray  # (P, V)
    bfloat16_logits: np.ndarray | None

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The image tokens (id 270), block by block."""
        image = np.pad(np.array(self.tokens) == 270, 1).astype(int)
        return list(zip(np.flatnonzero(np.diff(image) > 0), np.flatnonzero(np.diff(image) < 0), strict=True))

    def pictures(self, start: int, stop: int) -> np.ndarray | None:
        """The pixels that belong to these tokens."""
        if self.pixels is None:
            return None
        before, count = self.tokens[:start].count(270) // 4, self.tokens[start:stop].count(270) // 4
        return self.pixels[before : before + count] if count else None


def to_pixels(levels: np.ndarray) -> np.ndarray:
    """0..255 → [-1, 1] as the reference's processor does it."""
    unit = (levels.astype(np.float64) * 0.00392156862745098).astype(np.float32)
    return (unit - np.float32(0.5)) / np.float32(0.5)


def all_pixels() -> np.ndarray:
    return to_pixels(np.load(GOLDENS / "image" / "pictures.npz")["levels"])


def load_case(kind: str, name: str) -> Case:
    data = np.load(GOLDENS / kind / "cases" / f"{name}.npz")
    pictures = data.get("pictures", np.array([], np.int32))
    return Case(
        tokens=data["tokens"].tolist(),
        pixels=all_pixels()[pictures] if len(pictures) else None,
        generated=data["generated"].tolist(),
        positions=data["positions"],
        logits=data["logits"],
        bfloat16_logits=data.get("bfloat16_logits"),
    )


def difference(ours: mx.array, golden: np.ndarray) -> float:
    return float(np.abs(np.array(ours.astype(mx.float32)) - golden).max())


def whole(model: Gemma3, case: Case) -> mx.array:
    """Logits (P, V) of prompt and continuation, in one call without caches."""
    return model(mx.array([case.tokens + case.generated]), pixels=case.pixels)[0, mx.array(case.positions)]

"""What a checkpoint holds, entry by entry, known from headers alone: no weight is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx


@dataclass(frozen=True)
class Packing:
    """How MLX holds a matrix of few bits: `bits` a number, and a scale (affine: a bias too) for each group of a row."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __str__(self) -> str:
        return f"{self.bits} bits, groups of {self.group_size}" + ("" if self.mode == "affine" else f", {self.mode}")


@dataclass(frozen=True)
class Entry:
    """One parameter of the model, as the checkpoint stores it."""

    name: str  # canonical, as in model.parameters(): "language_model.layers.0.mlp.up_proj.weight"
    shape: tuple[int, ...]  # of its numbers, before any packing
    kind: str  # the file's word for it: "BF16", "U32", "Q4_K"
    packing: Packing | None  # how load_model holds it; None for plain numbers
    nbytes: int  # in the file, scales and biases included


class Store(Protocol):
    """An opened checkpoint whose parameters can be read one at a time, and in parts.

    Whoever goes through a checkpoint larger than memory reads rows, uses them and drops them.
    """

    @property
    def entries(self) -> Sequence[Entry]:
        """Every parameter of the model, each once."""
        ...

    def read(self, entry: Entry, start: int = 0, stop: int | None = None) -> dict[str, mx.array]:
        """Rows `start` to `stop` along the first axis, from the file, evaluated.

        Returns:
            {entry.name: array} for plain numbers, in the file's precision; for a packed matrix its `….weight`
            (uint32), `….scales` and, when affine, `….biases`, in the file's precision.
        """
        ...


@dataclass(frozen=True)
class Note:
    """What a folder's model card (README.md) says of it."""

    text: str = ""  # the first paragraph of prose, on one line
    license: str = ""  # as its front matter names it


def read_note(folder: Path) -> Note:
    """The note of a folder; an empty one where there is no card that can be read."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return Note()
    front = re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)
    named = re.search(r"^license:[ \t]*(\S+)", front[1], re.MULTILINE) if front else None
    paragraphs = re.split(r"\n[ \t]*\n", card[front.end() :] if front else card)
    prose = (part.strip() for part in paragraphs)
    first = next((part for part in prose if re.match(r"[\w*_\"'(]", part)), "")  # no heading, picture, code or table
    return Note(" ".join(first.split()), named[1] if named else "")


def part_of(name: str) -> str:
    """The kind of module that a canonical name belongs to."""
    if name.startswith("vision_tower."):
        return "vision_tower"
    if name.startswith("multi_modal_projector."):
        return "projector"
    if name.startswith("lm_head."):
        return "lm_head"
    if name.startswith("dense."):
        return "dense"
    if "embed_tokens." in name:
        return "embed_tokens"
    if "norm." in name:
        return "norms"
    return "attention" if ".self_attn." in name else "mlp"

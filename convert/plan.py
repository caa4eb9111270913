"""What becomes of each parameter, decided from headers before anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_gemma3.checkpoint.entries import Entry, Packing, Store
from mlx_gemma3.checkpoint.load import Checkpoint
from mlx_gemma3.errors import OptionError

from .folder_format import published_name
from .recipe import Recipe
from .writer import Planned

FLOATS = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
EMBEDDING = "language_model.embed_tokens"
_SOURCE_FLOATS = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}
_PIECE = 1 << 22  # numbers of a GGUF's matrix looked at together


@dataclass(frozen=True)
class Job:
    """One parameter: how it comes and how it goes."""

    entry: Entry
    packing: Packing | None  # as it is written
    dtype: mx.Dtype  # of plain numbers, or of scales and biases
    search: bool = False  # see packing.py

    @property
    def module(self) -> str:
        return self.entry.name.removesuffix(".weight")

    @property
    def how(self) -> str:
        """For the report: "bfloat16", "4 bits, groups of 64", and where the scales are not bfloat16 their type too."""
        dtype = str(self.dtype).removeprefix("mlx.core.")
        if self.packing is None:
            return dtype
        scales = f", {dtype} scales" if self.packing.mode == "affine" and self.dtype != mx.bfloat16 else ""
        return f"{self.packing}{scales}"

    def tensors(self) -> list[Planned]:
        """What is written for it, under canonical names."""
        shape = self.entry.shape
        if self.packing is None:
            return [Planned(self.entry.name, self.dtype, shape)]
        bits, groups = self.packing.bits, shape[1] // self.packing.group_size
        weight = Planned(self.entry.name, mx.uint32, (shape[0], shape[1] * bits // 32))
        if self.packing.mode != "affine":
            return [weight, Planned(f"{self.module}.scales", mx.uint8, (shape[0], groups))]
        return [
            weight,
            *(Planned(f"{self.module}.{part}", self.dtype, (shape[0], groups)) for part in ("scales", "biases")),
        ]


def plan(store: Store, recipe: Recipe | None, dtype: str | None, *, kept: bool, dequantize: bool) -> list[Job]:
    """A job for each parameter, in the order of the store. Without a recipe what is plain stays plain.

    Args:
        dtype: of everything that is not packed, and of scales; None for `_float_type`'s choice.
        kept: the store is a GGUF file's, or its own packing stays.
    """
    jobs = []
    for entry in store.entries:
        packing, search = entry.packing, False
        if dequantize:
            packing = None
        elif packing is None and recipe is not None and packable(entry):
            packing = recipe.choose(entry.name.removesuffix(".weight"), entry.shape[1])
            search = recipe.search and packing is not None and packing.bits < 8  # 8 bits gain nothing from it
        kind = FLOATS[dtype] if dtype is not None else _float_type(entry, packing, store, kept=kept)
        jobs.append(Job(entry, packing, kind, search))
    return jobs


def _float_type(entry: Entry, packing: Packing | None, store: Store, *, kept: bool) -> mx.Dtype:
    """What rounds nothing where a checkpoint is kept as it is, else bfloat16, as published.

    mlx-lm and mlx-vlm compute in the type of the scales and of the embedding, and Gemma 3 overflows in float16. So
    scales are never float16, which would be exact, but float32; and bfloat16 where it holds them all. It does for what
    was made from a bfloat16 checkpoint as F16, Q4_0 and Q5_0: their scale is a weight divided by -8 or -16.
    """
    if not kept or (packing is not None and entry.packing is None):
        return mx.bfloat16
    may_fit = entry.kind in ("F16", "Q4_0", "Q5_0", "U32") and packing == entry.packing  # U32: packed by MLX
    if may_fit and _fit(entry, store):
        return mx.bfloat16
    return mx.float32 if packing is not None else _SOURCE_FLOATS.get(entry.kind, mx.float32)


def _fit(entry: Entry, store: Store) -> bool:
    """Whether bfloat16 holds every number of a plain parameter, or every scale and bias of a packed one."""
    step = max(1, _PIECE // math.prod(entry.shape[1:]))
    return all(
        mx.array_equal(array.astype(mx.bfloat16).astype(array.dtype), array)
        for start in range(0, entry.shape[0], step)
        for array in store.read(entry, start, start + step).values()
        if mx.issubdtype(array.dtype, mx.floating)
    )


def packable(entry: Entry) -> bool:
    """Whether the parameter is the matrix of a Linear or an Embedding."""
    return entry.name.endswith(".weight") and len(entry.shape) == 2


def check_overrides(recipe: Recipe, jobs: Sequence[Job]) -> None:
    modules = [job.module for job in jobs if packable(job.entry)]
    for override in recipe.overrides:
        if not any(override.matches(module) for module in modules) and override.pattern not in (
            "vision_tower",
            "lm_head",
        ):
            raise OptionError(
                "override",
                got=f"{override.pattern!r}, which matches no matrix",
                want="a part of a name, as embed_tokens",
            )


def head_scales(checkpoint: Checkpoint, jobs: Sequence[Job]) -> dict[str, str]:
    """Which tensors are written once more, and how they are called then. See converter.HEAD_FILE."""
    if checkpoint.config.embedder is not None:
        return {}
    embedding = next(job for job in jobs if job.module == EMBEDDING)
    if not checkpoint.config.tie_word_embeddings or embedding.packing is None:
        return {}
    _, *scales = embedding.tensors()
    return {
        tensor.name: published_name(f"lm_head.{tensor.name.rpartition('.')[2]}", checkpoint.config) for tensor in scales
    }

"""Whether a checkpoint's head is its embedding, or one of its own.

A fine-tune that trained the head may hold an `lm_head` beside a config.json that says tied, or says nothing. As in
transformers 5.23 (modeling_utils.py, tie_weights: two that are both there and differ are not tied) it is the head then,
and only a copy of the embedding is left unread. `tie_word_embeddings: false` is not asked about: the head has to be
there. Scales without a matrix (this project's head-scales.safetensors, for mlx-vlm) are no head.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..boundary.gguf_header import GGUFHeader
from ..errors import CheckpointError
from .gguf_blocks import block_type
from .safetensors import EMBEDDING, Place, canonical_name, read_header, shards

_HEAD = "lm_head.weight"
_PARTS = ("weight", "scales", "biases")
_BLOCK = 1 << 24  # bytes of each that are compared at once
_FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def has_own_head(folder: Path) -> bool:
    """Whether a folder of safetensors holds an lm_head that is no copy of its embedding.

    Reads headers, and both matrices up to the first difference where there are two. What is damaged is not told here:
    reading the tensors will.
    """
    try:
        places = _places(folder)
    except CheckpointError:
        return False
    if _HEAD not in places or EMBEDDING not in places:
        return False
    pairs = [(places.get(f"lm_head.{part}"), places.get(EMBEDDING.replace("weight", part))) for part in _PARTS]
    return not all(_same(one, other) for one, other in pairs if one is not None or other is not None)


def gguf_has_own_head(header: GGUFHeader) -> bool:
    """Whether a GGUF file holds an output.weight that is no copy of its token_embd.weight, block for block."""
    tensors = {tensor.name: tensor for tensor in header.tensors}
    head, embedding = tensors.get("output.weight"), tensors.get("token_embd.weight")
    if head is None or embedding is None:
        return head is not None
    if (head.kind, head.shape) != (embedding.kind, embedding.shape):
        return True
    try:
        kind = block_type(head.kind)
    except ValueError:
        return True
    nbytes = math.prod(head.shape) // kind.values * kind.nbytes
    return not _same_bytes((head.path, head.offset), (embedding.path, embedding.offset), nbytes)


def _places(folder: Path) -> dict[str, Place]:
    """Where the parts of the embedding and of the head lie, by canonical name."""
    wanted = {f"{module}.{part}" for module in ("lm_head", EMBEDDING.removesuffix(".weight")) for part in _PARTS}
    places = {}
    for path, promised in shards(folder).items():
        if promised and wanted.isdisjoint(map(canonical_name, promised)):
            continue
        for name, info in read_header(path).items():
            if (canonical := canonical_name(name)) in wanted:
                places[canonical] = Place(path, info)
    return places


def _same(one: Place | None, other: Place | None) -> bool:
    """Whether two tensors hold the same numbers; plain ones may have different types."""
    if one is None or other is None or one.info.shape != other.info.shape:
        return False
    if one.info.dtype == other.info.dtype:
        return _same_bytes((one.path, one.info.start), (other.path, other.info.start), one.info.stop - one.info.start)
    if not {one.info.dtype, other.info.dtype} <= _FLOATS.keys():
        return False
    count, step = math.prod(one.info.shape), _BLOCK // 4
    return all(
        np.array_equal(_floats(one, first, min(step, count - first)), _floats(other, first, min(step, count - first)))
        for first in range(0, count, step)
    )


def _same_bytes(one: tuple[Path, int], other: tuple[Path, int], nbytes: int) -> bool:
    """Compare so many bytes of two places: (file, offset)."""
    with one[0].open("rb") as first, other[0].open("rb") as second:
        first.seek(one[1])
        second.seek(other[1])
        for done in range(0, nbytes, _BLOCK):
            size = min(_BLOCK, nbytes - done)
            if first.read(size) != second.read(size):
                return False
    return True


def _floats(place: Place, first: int, count: int) -> NDArray[np.float32]:
    dtype = np.dtype(_FLOATS[place.info.dtype])
    values = np.fromfile(place.path, dtype, count, offset=place.info.start + first * dtype.itemsize)
    if place.info.dtype == "BF16":
        return (values.astype("<u4") << 16).view(np.float32)
    return values.astype(np.float32)

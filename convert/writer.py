"""Safetensors shards written as their tensors come: the header first, since all sizes are known before.

Nothing is held but the piece at hand. Source of the format: the safetensors documentation (8-byte length, JSON padded
with spaces, data without gaps).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

MAX_SHARD_BYTES = 5_000_000_000
DTYPES = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.uint32: "U32", mx.uint8: "U8"}


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.size


def split(tensors: Sequence[Planned], limit: int = MAX_SHARD_BYTES) -> dict[str, list[Planned]]:
    """Consecutive tensors in files of at most `limit` bytes, by name; a larger tensor has a file of its own."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, start=1)}


def write_index(folder: Path, shards: Mapping[str, Sequence[Planned]]) -> None:
    """model.safetensors.index.json, which programs read even beside a single shard. `shards`: by file name."""
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


class Shard:
    """One file being written: pieces of any tensor, in any order, each at its place.

    Use as a context manager; the file is whole when every byte of every tensor was written.
    """

    def __init__(self, path: Path, tensors: Sequence[Planned], *, kind: str) -> None:
        entries: dict[str, object] = {"__metadata__": {"format": kind}}
        at = 0
        for tensor in tensors:
            offsets = [at, at + tensor.nbytes]
            entries[tensor.name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
            at += tensor.nbytes
        header = json.dumps(entries, separators=(",", ":")).encode("utf-8")
        header += b" " * (-len(header) % 8)
        self._header = len(header).to_bytes(8, "little") + header
        self._starts = {
            name: entry["data_offsets"][0] + len(self._header)  # type: ignore[index]
            for name, entry in entries.items()
            if name != "__metadata__"
        }
        self._size = len(self._header) + at
        self._path = path

    def __enter__(self) -> Shard:
        self._file: BinaryIO = self._path.open("xb")
        self._file.write(self._header)
        self._file.truncate(self._size)
        return self

    def write(self, name: str, offset: int, array: mx.array) -> int:
        """Write an evaluated array as the bytes of tensor `name` from byte `offset` on; returns their count."""
        data = np.array(array.view(mx.uint8) if array.ndim else array.reshape(1).view(mx.uint8), copy=False)
        self._file.seek(self._starts[name] + offset)
        self._file.write(np.ascontiguousarray(data).data)
        return int(array.nbytes)

    def __exit__(self, *_: object) -> None:
        self._file.close()

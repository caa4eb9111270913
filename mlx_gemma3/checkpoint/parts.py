"""A part of a tensor in a safetensors file, as a lazy array: no other bytes of it are read.

MLX reads whole tensors. So it is given a file that is not there: the header of a tensor of the part's shape, and behind
it bytes that are taken out of the real file when they are asked for.
"""

from __future__ import annotations

import io
import json
import math
import mmap
from pathlib import Path
from typing import Any, BinaryIO, cast

import mlx.core as mx
import numpy as np

_NAME = "part"


def part_of(path: Path, dtype: str, shape: tuple[int, ...], start: int, axis: int, part: slice) -> mx.array:
    """A slice of a tensor along its first or second axis.

    Args:
        path: the file.
        dtype: as safetensors spells it.
        shape: of the whole tensor.
        start: where its bytes begin in the file.
        axis: 0 or 1.

    Returns:
        a lazy array; evaluating it raises RuntimeError where the file cannot be read any more.
    """
    file = cast(BinaryIO, _Part(path, dtype, shape, start, axis, part))
    loaded = mx.load(file, format="safetensors")
    assert isinstance(loaded, dict)
    return loaded[_NAME]


class _Part(io.RawIOBase):
    """A safetensors file of one tensor. MLX asks for its header at once, and for all of its data in one piece."""

    def __init__(self, path: Path, dtype: str, shape: tuple[int, ...], start: int, axis: int, part: slice) -> None:
        own = tuple(part.stop - part.start if number == axis else size for number, size in enumerate(shape))
        item = {"U32": 4, "F32": 4}.get(dtype, 1 if dtype == "U8" else 2)
        self._path, self._start, self._item = path, start, item
        self._shape, self._axis, self._part = shape, axis, part
        self._nbytes = item * math.prod(own)
        entry = {"dtype": dtype, "shape": own, "data_offsets": [0, self._nbytes]}
        head = json.dumps({_NAME: entry}, separators=(",", ":")).encode()
        self._head = len(head).to_bytes(8, "little") + head
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        end = len(self._head) + self._nbytes
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: end}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        room = memoryview(buffer).cast("B")
        if self._at < len(self._head):
            found = self._head[self._at : self._at + len(room)]
            room[: len(found)] = found
            self._at += len(found)
            return len(found)
        first = self._at - len(self._head)
        assert first == 0 and len(room) == self._nbytes, (first, len(room), self._nbytes)
        self._read(np.frombuffer(room, np.uint8))
        self._at += len(room)
        return len(room)

    def _read(self, out: np.ndarray) -> None:
        """All bytes of the part. Of rows one piece of the file; of columns a piece of each row."""
        row = self._item * math.prod(self._shape[1:])
        with self._path.open("rb") as file:
            if self._axis == 0:
                file.seek(self._start + self._part.start * row)
                if file.readinto(out.data) != out.nbytes:
                    raise OSError(f"{self._path} was cut off")
                return
            width = self._item * math.prod(self._shape[2:])
            begin = self._start - self._start % mmap.ALLOCATIONGRANULARITY
            length = self._start - begin + row * self._shape[0]
            with mmap.mmap(file.fileno(), length, offset=begin, access=mmap.ACCESS_READ) as mapped:
                whole = np.frombuffer(mapped, np.uint8, row * self._shape[0], self._start - begin)
                rows = whole.reshape(self._shape[0], row)
                out.reshape(self._shape[0], -1)[:] = rows[:, self._part.start * width : self._part.stop * width]
                del rows, whole

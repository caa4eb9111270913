"""The header of a GGUF file: its settings and where each tensor lies. Reads no weights.

Stands beside config.py because two rooms need it: prompt/ for the vocabulary, checkpoint/ for the tensors. The
`gguf` package's own reader makes several NumPy views for each of 262,144 vocabulary entries, ten seconds of work;
this one walks the bytes once.

Source of the layout: the GGUF specification, version 3 (2 differs in nothing that is read here).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CheckpointError

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GGUFTensor:
    """One entry of the tensor directory."""

    name: str
    shape: tuple[int, ...]  # row-major, as NumPy and MLX say it: the file lists the fastest axis first
    kind: int  # ggml type number, as in gguf.GGMLQuantizationType
    offset: int  # bytes from the start of the file


@dataclass(frozen=True)
class GGUFHeader:
    """Settings by their full names (`gemma3.block_count`), tensors in file order."""

    path: Path
    settings: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]
    header_bytes: int  # where the tensor data begins

    @classmethod
    def read(cls, path: str | Path) -> GGUFHeader:
        """Read the header of a little-endian GGUF file of version 2 or 3.

        String arrays become lists of str, number arrays NumPy arrays.

        Raises:
            CheckpointError: not a GGUF file, another version, or cut off inside the header.
        """
        path = Path(path)
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data).header(path)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise CheckpointError(f"{path}", got=error, want="a readable GGUF file") from None
        except (struct.error, IndexError, UnicodeDecodeError, OverflowError):
            raise CheckpointError(
                f"{path}", got="a GGUF header that is cut off or damaged", want="a whole file", do="fetch it again"
            ) from None


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def header(self, path: Path) -> GGUFHeader:
        if self.data[:4] != b"GGUF":
            raise CheckpointError(f"{path}", got="no GGUF signature", want="a GGUF file")
        self.at = 4
        version = self.scalar("I")
        if version not in (2, 3):
            raise CheckpointError(f"{path}: GGUF version", got=version, want="2 or 3 (little-endian)")
        tensor_count, setting_count = self.scalar("Q"), self.scalar("Q")
        settings = {}
        for _ in range(setting_count):
            name = self.string()
            settings[name] = self.value(self.scalar("I"))
        entries = []
        for _ in range(tensor_count):
            name = self.string()
            sizes = [self.scalar("Q") for _ in range(self.scalar("I"))]
            kind, start = self.scalar("I"), self.scalar("Q")
            entries.append((name, tuple(reversed(sizes)), kind, start))
        alignment = int(settings.get("general.alignment", 32))
        base = -(-self.at // alignment) * alignment
        tensors = tuple(GGUFTensor(name, shape, kind, base + start) for name, shape, kind, start in entries)
        return GGUFHeader(path, settings, tensors, base)

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        return self.take(length).decode("utf-8")

    def take(self, length: int) -> bytes:
        end = self.at + length
        if end > len(self.data):
            raise IndexError(end)
        raw = self.data[self.at : end]
        self.at = end
        return raw

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise IndexError(kind)
            return self.scalar(_SCALARS[kind])
        item, count = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[item] if item != 7 else "?")
            return np.frombuffer(self.take(count * dtype.itemsize), dtype=dtype)
        return self.strings(count) if item == _STRING else [self.value(item) for _ in range(count)]

    def strings(self, count: int) -> list[str]:
        """As `string`, many times over: the vocabulary is the bulk of the header."""
        data, at, unpack = self.data, self.at, struct.Struct("<Q").unpack_from
        texts = []
        for _ in range(count):
            (length,) = unpack(data, at)
            at += 8 + length
            if at > len(data):
                raise IndexError(at)
            texts.append(data[at - length : at].decode("utf-8"))
        self.at = at
        return texts

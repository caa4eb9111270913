"""The header of GGUF files: settings, and where each tensor lies. Reads no weights.

prompt/ needs it for the vocabulary, checkpoint/ for the tensors. The
`gguf` package's own reader makes several NumPy views for each of 262,144 vocabulary entries, ten seconds of work;
this one walks the bytes once. Nothing in a file is believed before it was held against a bound.

Sources: the GGUF specification, version 3 (2 differs in nothing that is read here); llama.cpp's gguf.cpp for what is
refused (arrays in arrays, odd alignments, offsets that are not aligned) and its gguf-split for files in parts.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from .reading import open_regular, reason

SIGNATURE = b"GGUF"
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MOST_SETTINGS, _MOST_TENSORS, _MOST_NAME = 1 << 16, 1 << 16, 1 << 16  # Gemma 3's have under 100, 2,000, 100
_MOST_AXES, _MOST_NUMBERS, _MOST_ALIGNMENT, _MOST_PARTS = 4, 1 << 42, 1 << 20, 1 << 12
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)

# How a setting must be: the Python types that hold it, in words.
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "text": ((str,), "a text"),
    "whole": ((int,), "a whole number"),
    "number": ((int, float), "a number"),
    "switch": ((bool,), "true or false"),
    "texts": ((list,), "a list of texts"),
    "numbers": ((np.ndarray,), "a list of numbers"),
}


@dataclass(frozen=True)
class GGUFTensor:
    """One entry of the tensor directory."""

    name: str
    shape: tuple[int, ...]  # row-major, as NumPy and MLX say it: the file lists the fastest axis first
    kind: int  # ggml type number, as in gguf.GGMLQuantizationType
    offset: int  # bytes from the start of its file
    path: Path  # that file: one of several, where it is split


@dataclass(frozen=True)
class GGUFHeader:
    """Settings by their full names (`gemma3.block_count`), tensors in file order."""

    path: Path
    settings: Mapping[str, Any]
    tensors: tuple[GGUFTensor, ...]
    files: tuple[tuple[Path, int], ...]  # each, and where its tensor data begins

    @classmethod
    def read(cls, path: str | Path) -> GGUFHeader:
        """Read the header of a little-endian GGUF file of version 2 or 3; of a split one, this part's alone.

        String arrays become lists of str, number arrays NumPy arrays.

        Raises:
            CheckpointError: no regular file, not GGUF, another version, cut off or damaged inside the header.
        """
        path = Path(path)
        with _opened(path) as data:
            return _Reader(data, path).header()

    @classmethod
    def read_whole(cls, path: str | Path) -> GGUFHeader:
        """As `read`; where the file is a part of a split one, all parts together.

        Raises:
            CheckpointError: also where a part is missing, or of another model.
        """
        header = cls.read(path)
        count = header.get("split.count", "whole", 1)
        if count <= 1:
            return header
        names = part_names(header.path.name)
        if count > _MOST_PARTS or names is None or len(names) != count:
            raise CheckpointError(
                f"{header.path}",
                got=f"a part of a model in {count} files",
                want=f"one called …-00001-of-{count:05}.gguf",
            )
        parts = []
        for number, name in enumerate(names):
            if not (place := header.path.with_name(name)).exists():
                raise CheckpointError(
                    f"{place}", got="no such file", want=f"all {count} parts of the model", do="fetch it"
                )
            part = header if place == header.path else cls.read(place)
            said = part.get("split.no", "whole", -1), part.get("split.count", "whole", 1)
            if said != (number, count):
                raise CheckpointError(
                    f"{place}", got=f"part {said[0] + 1} of {said[1]}", want=f"part {number + 1} of {count}"
                )
            parts.append(part)
        tensors = tuple(tensor for part in parts for tensor in part.tensors)
        wanted = parts[0].get("split.tensors.count", "whole", len(tensors))
        if wanted != len(tensors):
            raise CheckpointError(
                f"{parts[0].path}", got=f"{len(tensors)} tensors in all parts", want=wanted, do="fetch them again"
            )
        return replace(parts[0], tensors=tensors, files=tuple(file for part in parts for file in part.files))

    def get(self, key: str, kind: str, default: Any = None) -> Any:
        """A setting by its full name.

        Args:
            kind: one of `_KINDS`. Numbers are as they were written: float32 in decimal.

        Raises:
            CheckpointError: it is there, and of another kind.
        """
        value = self.settings.get(key)
        if value is None:
            return default
        types, want = _KINDS[kind]
        if not isinstance(value, types) or (isinstance(value, bool) and kind != "switch"):
            got = "a list" if isinstance(value, list | np.ndarray) else repr(value)
            raise CheckpointError(f"{self.path}: {key}", got=got, want=want)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path, _ in self.files)


def is_gguf(path: Path) -> bool:
    """Whether it is a regular file that begins as GGUF does, whatever it is called: Ollama's have no suffix."""
    try:
        with open_regular(path) as file:
            return file.read(len(SIGNATURE)) == SIGNATURE
    except (OSError, ValueError):
        return False


def part_names(name: str) -> list[str] | None:
    """Of a file called …-00002-of-00003.gguf the names of all parts, the first one first; None of any other."""
    found = _PART.fullmatch(name)
    if found is None or not 1 <= int(found["number"]) <= int(found["count"]) <= _MOST_PARTS:
        return None
    end = name[found.end("number") :]
    return [f"{found['stem']}-{number:05}{end}" for number in range(1, int(found["count"]) + 1)]


def peek(path: Path) -> dict[str, Any]:
    """The first settings of a file, up to those that are not general: what it is, without its vocabulary.

    Raises:
        CheckpointError: as `GGUFHeader.read`.
    """
    with _opened(path) as data:
        return _Reader(data, path).general()


@contextmanager
def _opened(path: Path) -> Iterator[mmap.mmap]:
    try:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except OSError as error:
        raise CheckpointError(f"{path}", got=reason(error), want="a readable GGUF file") from None
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError, ValueError):  # ValueError: empty, or a NUL
        raise CheckpointError(
            f"{path}", got="a GGUF header that is cut off or damaged", want="a whole file", do="fetch it again"
        ) from None


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def start(self) -> tuple[int, int]:
        """Counts of tensors and of settings."""
        if self.data[:4] != SIGNATURE:
            raise CheckpointError(f"{self.path}", got="no GGUF signature", want="a GGUF file")
        self.at = 4
        version = self.scalar("I")
        if version not in (2, 3):
            raise CheckpointError(f"{self.path}: GGUF version", got=version, want="2 or 3 (little-endian)")
        tensors, settings = self.scalar("Q"), self.scalar("Q")
        for what, got, most in (("tensors", tensors, _MOST_TENSORS), ("settings", settings, _MOST_SETTINGS)):
            if got > most:
                raise CheckpointError(f"{self.path}", got=f"{got} {what}", want=f"at most {most}", do="fetch it again")
        return tensors, settings

    def general(self) -> dict[str, Any]:
        _, count = self.start()
        found: dict[str, Any] = {}
        for _ in range(count):
            name = self.name()
            if not name.startswith(("general.", "split.", "clip.projector")) and "general.architecture" in found:
                break
            found[name] = self.value(name, self.scalar("I"))
        return found

    def header(self) -> GGUFHeader:
        tensor_count, setting_count = self.start()
        settings: dict[str, Any] = {}
        for _ in range(setting_count):
            name = self.name()
            if name in settings:
                raise CheckpointError(f"{self.path}: {name}", got="two values", want="one")
            settings[name] = self.value(name, self.scalar("I"))
        entries = [self.tensor() for _ in range(tensor_count)]
        alignment = settings.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
            raise CheckpointError(f"{self.path}: general.alignment", got=repr(alignment)[:60], want="a power of two")
        base = -(-self.at // alignment) * alignment
        for name, _, _, start in entries:
            if start % alignment or base + start > 1 << 60:
                raise CheckpointError(
                    f"{self.path}: {name}", got=f"data at byte {start}", want=f"a multiple of {alignment}"
                )
        tensors = tuple(GGUFTensor(name, shape, kind, base + at, self.path) for name, shape, kind, at in entries)
        return GGUFHeader(self.path, settings, tensors, ((self.path, base),))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self.name(), self.scalar("I")
        if not 0 < axes <= _MOST_AXES:
            raise CheckpointError(f"{self.path}: {name}", got=f"{axes} axes", want=f"1 to {_MOST_AXES}")
        shape = tuple(reversed([self.scalar("Q") for _ in range(axes)]))
        numbers = 1
        for size in shape:
            numbers *= size
        if not 0 < numbers <= _MOST_NUMBERS:
            raise CheckpointError(f"{self.path}: {name}", got=f"shape {shape}", want="numbers, and not too many")
        return name, shape, self.scalar("I"), self.scalar("Q")

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def name(self) -> str:
        length = self.scalar("Q")
        if length > _MOST_NAME:
            raise IndexError(length)
        return self.take(length).decode("utf-8")

    def take(self, length: int) -> bytes:
        end = self.at + length
        if end > len(self.data):
            raise IndexError(end)
        raw = self.data[self.at : end]
        self.at = end
        return raw

    def value(self, name: str, kind: int) -> Any:
        if kind == _STRING:
            return self.take(self.scalar("Q")).decode("utf-8")
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise IndexError(kind)
            return self.scalar(_SCALARS[kind])
        item, count = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[item] if item != _BOOL else "?")
            return np.frombuffer(self.take(count * dtype.itemsize), dtype=dtype)
        if item != _STRING:
            raise CheckpointError(f"{self.path}: {name}", got="lists in a list", want="one list")
        return self.strings(count)

    def strings(self, count: int) -> list[str]:
        """As a text, many times over: the vocabulary is the bulk of the header."""
        data, at, unpack = self.data, self.at, struct.Struct("<Q").unpack_from
        if count > (len(data) - at) // 8:
            raise IndexError(count)
        texts = []
        for _ in range(count):
            (length,) = unpack(data, at)
            at += 8 + length
            if at > len(data):
                raise IndexError(at)
            texts.append(data[at - length : at].decode("utf-8"))
        self.at = at
        return texts

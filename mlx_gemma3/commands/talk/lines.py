"""What a person typed: a command, or words with pictures dropped among them.

Owns which words are commands and which are paths of pictures. Asks the disk only whether a file is there.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from ...prompt.address import is_address

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".heic", ".heif", ".avif"})

_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)
# Where a path may start, and a shell's word from there: quoted parts, escaped characters, and plain ones.
_START = re.compile(r"""(?<!\S)(?=['"]?(?:/|~|file://|[^\s/]+/))""")
_WORD = re.compile(r"""(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"\\])+(?!\S)""")
_SUFFIX = re.compile(rf"(?:{'|'.join(map(re.escape, sorted(SUFFIXES)))})(?!\w)", re.IGNORECASE)


@dataclass(frozen=True)
class Command:
    """`/name rest`."""

    name: str
    rest: str


@dataclass(frozen=True)
class Said:
    """Words, and the pictures whose paths were among them."""

    text: str
    pictures: tuple[Path, ...] = ()


def read(line: str) -> Command | Said:
    """Tell commands from words. A line that starts with // is words that start with /."""
    text = line.replace("\0", "").strip()  # which no path may hold
    if text.startswith("//"):
        return Said(text[1:])
    if match := _COMMAND.fullmatch(text):
        return Command(match[1], (match[2] or "").strip())
    pictures, words = dropped(text)
    return Said(words, tuple(pictures))


def dropped(text: str) -> tuple[list[Path], str]:
    """The picture files whose paths a terminal put among the words, and the words without them.

    Terminals write a dropped file's path in quotes, with backslashes before what is special, as a file:// address, or
    just as it is. A path has a slash or a ~ in it; only files that are there and are called as pictures are count.
    """
    found: list[Path] = []
    words, at = [], 0
    for start in (match.start() for match in _START.finditer(text)):
        if start >= at and (picture := _word(text, start) or _whole(text, start)):
            found.append(picture[0])
            words.append(text[at:start].strip(" "))
            at = picture[1]
    return found, _joined([*words, text[at:].strip(" ")])


def paths(rest: str) -> list[Path]:
    """The paths named after a command, as a shell reads them; the whole as one where that is a file."""
    return [_path(word) for word in _words(rest)]


def pictures(rest: str) -> list[str | Path]:
    """The same, where an address stays what it is."""
    return [word if is_address(word) and not word.startswith("file:") else _path(word) for word in _words(rest)]


def _words(rest: str) -> list[str]:
    if not rest:
        return []
    if _is_file(_path(rest)):
        return [rest]
    try:
        return shlex.split(rest)
    except ValueError:  # a quote without its other half
        return [rest]


def _joined(words: list[str]) -> str:
    """One space between what stood around a path; none before a full stop or a comma."""
    out = ""
    for part in filter(None, words):
        out += part if not out or part[0] in ",.;:?!)" or out.endswith("\n") or part[0] == "\n" else f" {part}"
    return out.strip()


def _word(text: str, start: int) -> tuple[Path, int] | None:
    """The picture that a shell's word names, and where it ends: before a full stop or question mark, if need be."""
    if (match := _WORD.match(text, start)) is None:
        return None
    word = match[0]
    for bare in dict.fromkeys((word, word.rstrip(",.;:?!)"))):
        try:
            path = _path("".join(shlex.split(bare)))
        except ValueError:  # an open quote
            continue
        if is_picture(path):
            return path, start + len(bare)
    return None


def _whole(text: str, start: int) -> tuple[Path, int] | None:
    """A path written as it is, spaces and all: the shortest that ends as a picture's name does and is a file."""
    line = text[start:].split("\n")[0]
    for suffix in _SUFFIX.finditer(line):
        path = _path(line[: suffix.end()])
        if is_picture(path):
            return path, start + suffix.end()
    return None


def _path(word: str) -> Path:
    """The path that a word names, which may be a file:// address of this machine or begin with ~."""
    host, _, path = word.removeprefix("file://").partition("/")
    if word.startswith("file://") and host in ("", "localhost"):
        return Path("/" + unquote(path))
    try:
        return Path(word).expanduser()
    except RuntimeError:  # a user who is not there
        return Path(word)


def is_picture(path: Path) -> bool:
    """A file that is there, and whose name ends as a picture's does."""
    return path.suffix.lower() in SUFFIXES and _is_file(path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long; a NUL in it
        return False

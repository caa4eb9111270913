"""What is learnt from, as people write it, one row after another: JSON lines, a folder, a text, a Hub data set.

    {"messages": [{"role", "content"}, …], "images": [path, …]}     a chat; pictures in their items, or beside
    {"prompt": …, "completion": …, "images": […]}                   texts
    {"text": …}                                                     all of it is learnt
    {"messages" or "prompt", "chosen", "rejected", "images"}        a preference: a text or messages each

Owns which rows there are and the line that each stands in. Whether a row can be learnt from, encoding.py says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..boundary.reading import open_regular, parse_json, reason
from ..errors import DataError, Gemma3Error, OptionError
from ..visible import listed

KNOWN = frozenset(("messages", "prompt", "completion", "text", "images", "image", "chosen", "rejected"))
FORMS = "messages, or prompt and completion, or text; chosen and rejected for preferences"
_MEAN_MORE = frozenset(  # columns that other programs read, and that would be left out in silence
    "tools system input output instruction question answer response audio video conversations functions label".split()
)
PICTURE_ENDINGS = frozenset(".png .jpg .jpeg .webp .heic .heif .gif .bmp .tif .tiff".split())
MOST = 4 << 30  # bytes of a data file
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, eq=False)
class Row:
    """One example as it was written."""

    line: int  # from 1; of a folder of pictures the place in the alphabet
    values: Mapping[str, Any]
    folder: Path  # what paths of pictures are relative to


@dataclass(frozen=True)
class Problem:
    """What is wrong with a line."""

    line: int
    text: str


@dataclass(frozen=True, eq=False)
class Data:
    """The rows of one file, or of what stands for one."""

    name: str
    rows: Sequence[Row]
    problems: Sequence[Problem] = ()
    notes: tuple[str, ...] = ()


def refuse(name: str, problems: Sequence[Problem], total: int) -> None:
    """Raise DataError if there are problems: all line numbers, those of one problem together."""
    if not problems:
        return
    by_text: dict[str, list[int]] = {}
    for problem in problems:
        by_text.setdefault(problem.text, []).append(problem.line)
    said = "; ".join(f"line{'s' if len(lines) > 1 else ''} {_ranges(lines)}: {text}" for text, lines in by_text.items())
    bad = len({problem.line for problem in problems})
    raise DataError(
        f"{name}: {bad} of {total} line{'s' if total > 1 else ''} cannot be learnt from", got=said, problems=problems
    )


def _ranges(lines: Sequence[int]) -> str:
    """3, 5-9"""
    found: list[list[int]] = []
    for line in sorted(set(lines)):
        if found and line == found[-1][1] + 1:
            found[-1][1] = line
        else:
            found.append([line, line])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def open_data(source: str | Path, *, prompt: str = "") -> tuple[Data, Data | None]:
    """(what to learn from, what to validate on if the source has such a part).

    Args:
        source: a .jsonl, .json or .txt file; a folder with train.jsonl and perhaps valid.jsonl, or with pictures and a
            text file of the same name beside each; owner/name of a data set on the Hub.
        prompt: what is asked about the pictures of such a folder.

    Raises:
        DataError: nothing there, or nothing in it.
        OptionError: a data set of the Hub without the package `datasets`.
    """
    try:
        path = Path(source).expanduser()
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"data {source}", got=getattr(error, "strerror", None) or error, want="a file or folder"
        ) from None
    if is_folder:
        return _folder(path, prompt)
    if exists:
        return read_file(path), None
    if isinstance(source, str) and _HUB.fullmatch(source):
        return _hub(source)
    raise DataError(f"data {source}", got="no such file or folder", want=".jsonl, .txt, a folder, or owner/name")


def read_file(path: Path) -> Data:
    """The rows of a .jsonl, .json or .txt file; problems of lines are kept, to be told together.

    Raises:
        DataError: it cannot be read, or holds nothing.
    """
    try:
        with open_regular(path) as file:
            raw = file.read(MOST + 1)
    except (OSError, ValueError) as error:
        got = reason(error) if isinstance(error, OSError) else error
        raise DataError(f"data {path}", got=got, want="a readable file") from None
    if len(raw) > MOST:
        raise DataError(f"data {path}", got=f"more than {MOST >> 30} GB", want="less", do="split it")
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        raise DataError(f"data {path}", got="an empty file", want="lines to learn from")
    if path.suffix.lower() == ".txt":
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise DataError(f"data {path}", got=f"bytes that are not UTF-8 in line {line}", want="a text") from None
        return Data(path.name, [Row(1, {"text": text}, path.parent)])
    if path.suffix.lower() == ".json":
        values = parse_json(raw, f"data {path}", DataError)
        if not isinstance(values, list):
            raise DataError(f"data {path}", got=type(values).__name__, want="a list of objects, or JSON lines (.jsonl)")
        return _rows(path.name, enumerate(values, 1), path.parent)
    if path.suffix.lower() != ".jsonl":
        raise DataError(f"data {path}", got=path.suffix or "no ending", want=".jsonl, .json or .txt")
    problems: list[Problem] = []
    found: list[tuple[int, Any]] = []
    for line, part in enumerate(raw.split(b"\n"), 1):
        if not part.strip():
            continue
        try:
            found.append((line, parse_json(part, "JSON", DataError)))
        except Gemma3Error as error:
            problems.append(Problem(line, f"not JSON ({error.got})"))
    return _rows(path.name, found, path.parent, problems)


def _rows(name: str, values: Iterable[tuple[int, Any]], folder: Path, problems: Sequence[Problem] = ()) -> Data:
    rows, wrong, unread = [], list(problems), dict[str, None]()
    for line, row in values:
        if not isinstance(row, Mapping):
            wrong.append(Problem(line, f"{type(row).__name__}, and no object"))
            continue
        there = {key: value for key, value in row.items() if value is not None}
        more = [key for key in there if key in _MEAN_MORE]
        if more or not form_of(there):
            got = f"columns {listed(list(there))}" if there else "no columns"
            wrong.append(Problem(line, f"{got}, want {FORMS}"))
            continue
        unread |= dict.fromkeys(key for key in there if key not in KNOWN)
        rows.append(Row(line, there, folder))
    notes = (f"columns that are not read: {listed(list(unread))}",) if unread else ()
    return Data(name, rows, wrong, notes)


def form_of(values: Mapping[str, Any]) -> str:
    """Which of the forms a row has; "" for none, or for two of them."""
    there = {key for key in values if key in KNOWN} - {"images", "image"}
    if there in ({"messages", "chosen", "rejected"}, {"prompt", "chosen", "rejected"}):
        return "preference"
    if there in ({"messages"}, {"text"}):
        return next(iter(there))
    return "completion" if there == {"prompt", "completion"} else ""


def _folder(path: Path, prompt: str) -> tuple[Data, Data | None]:
    train, valid = path / "train.jsonl", path / "valid.jsonl"
    if train.is_file():
        return read_file(train), read_file(valid) if valid.is_file() else None
    try:
        pictures = sorted(one for one in path.iterdir() if one.suffix.lower() in PICTURE_ENDINGS)
    except OSError as error:
        raise DataError(f"data {path}", got=reason(error), want="a readable folder") from None
    if not pictures:
        raise DataError(f"data {path}", got="no train.jsonl and no pictures", want="one or the other")
    rows, problems = [], []
    for line, picture in enumerate(pictures, 1):
        words = picture.with_suffix(".txt")
        try:
            text = words.read_bytes().decode("utf-8").strip()
        except FileNotFoundError:
            problems.append(Problem(line, f"{picture.name} has no {words.name} beside it"))
            continue
        except (OSError, UnicodeDecodeError) as error:
            got = reason(error) if isinstance(error, OSError) else "bytes that are not UTF-8"
            problems.append(Problem(line, f"{words.name}: {got}"))
            continue
        values = {"prompt": prompt, "completion": text, "images": [picture.name]}
        rows.append(Row(line, values, path))
    return Data(path.name, rows, problems), None


def _hub(name: str) -> tuple[Data, Data | None]:
    try:
        import datasets
    except ImportError:
        raise OptionError(
            f"data {name}", got="a data set of the Hub", want="the package datasets", do="pip install datasets"
        ) from None
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # of any kind: the network, the name, the format
        raise DataError(f"data {name}", got=f"{type(error).__name__}: {error}", want="a data set of the Hub") from None
    train = found.get("train")
    if train is None:
        raise DataError(f"data {name}", got=f"parts {listed(list(found))}", want="a part train")
    valid = next((found[part] for part in ("validation", "valid") if part in found), None)
    here = Path.cwd()
    parts = [None if part is None else _rows(name, enumerate(part, 1), here) for part in (train, valid)]
    assert parts[0] is not None
    return parts[0], parts[1]

"""Opens files that a person named, and reads JSON that somebody else wrote.

Owns which kinds of file are opened at all, and the bounds on JSON: size, nesting, numbers, characters.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import Gemma3Error

MOST_JSON = 64 << 20  # bytes
_MOST_VALUES = 5_000_000  # each takes up to 100 bytes and 0.2 µs; Gemma 3's tokenizer.json has 1.9 million


class NotRegular(OSError):
    """A folder, pipe, socket or device where a file was wanted: opening it could block, or never end."""


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file (or a link to one) for reading; a pipe is not waited for.

    Raises:
        OSError: it cannot be opened; NotRegular, whose `strerror` says what it is.
        ValueError: a NUL in the path.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise NotRegular(0, file_kind(mode), str(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def file_kind(mode: int) -> str:
    """What a file that is not regular is, by its `st_mode`."""
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def reason(error: OSError) -> str:
    """What went wrong with a file, in words: a full disk is called that."""
    full = {errno.ENOSPC: "a full disk", errno.EDQUOT: "a full disk: no more of it is this user's"}
    return full.get(error.errno or 0) or error.strerror or str(error)


def read_json(path: Path, error: type[Gemma3Error], *, want: str = "a JSON file", most: int = MOST_JSON) -> Any:
    """The values of a JSON file in UTF-8.

    Raises:
        error: missing, no regular file, over `most` bytes, or what `parse_json` refuses.
    """
    try:
        with open_regular(path) as file:
            raw = file.read(most + 1)
    except FileNotFoundError:
        raise error(f"{path}", got="no such file", want=want) from None
    except (OSError, ValueError) as reason:
        raise error(f"{path}", got=getattr(reason, "strerror", None) or reason, want=want) from None
    if len(raw) > most:
        raise error(f"{path}", got=f"more than {most >> 20} MB", want=want)
    return parse_json(raw, f"{path}", error, want=want)


def parse_json(raw: bytes | str, what: str, error: type[Gemma3Error], *, want: str = "a JSON file") -> Any:
    """The values of a JSON text; `what` names it in errors.

    Raises:
        error: not UTF-8, not JSON, nested too deep, more values than any file we know, a number beyond a float's
            range, NaN, or half a surrogate pair.
    """
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8-sig")
        if sum(map(text.count, ",[{")) > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES:,} values")
        values = json.loads(text, parse_float=_finite, parse_constant=_refuse)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise error(what, got="bytes that are not UTF-8", want=want) from None
    except UnicodeEncodeError:
        raise error(what, got="half of a surrogate pair in a text", want=want) from None
    except RecursionError:
        raise error(what, got="lists or objects nested too deep", want=want) from None
    except ValueError as reason:
        raise error(what, got=reason, want=want) from None
    return values


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]}, beyond what a float can hold")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant}, which is no JSON")

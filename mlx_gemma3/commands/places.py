"""Where the commands keep what a person asked them to keep: the file of a conversation, and private texts."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from ..errors import OutputError
from ..reading import NotRegular, open_regular, reason


def session_place(path: Path) -> Path:
    """The file of a conversation, `~` expanded, after a look at whether it can be written: before an answer, not after.

    Raises:
        OutputError: it cannot.
    """
    place = home_expanded(path)
    try:
        with contextlib.suppress(FileNotFoundError), open_regular(place):
            pass
        folder = place.resolve().parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except NotRegular as error:
        raise OutputError(f"session {path}", got=reason(error), want="a file") from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle; ValueError: a NUL
        got = reason(error) if isinstance(error, OSError) else error
        raise OutputError(f"session {path}", got=got, want="a place that can be written") from None
    return place


def home_expanded(path: Path) -> Path:
    """The path with `~` replaced, as a shell does it where no `=` stands before.

    Raises:
        OutputError: `~` of nobody.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise OutputError(f"{path}", got="no such user, or no home", want="a path that is there") from None


def write_private(path: Path, text: str) -> None:
    """Write a text that only its owner may read, whole or not at all; a link in its place is replaced, not followed.

    Raises:
        OutputError: it cannot be written; what was there before stays.
    """
    working = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a new name that nobody can foresee, mode 0600, no link followed
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
        working = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        working.replace(path)
    except (OSError, ValueError) as error:
        got = reason(error) if isinstance(error, OSError) else error
        raise OutputError(f"{path}", got=got, want="a place that can be written") from None
    finally:
        if working is not None:
            with contextlib.suppress(OSError):
                working.unlink()

"""What was typed in chats, in a file that only its owner reads."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from prompt_toolkit.history import FileHistory, History, InMemoryHistory


def private_history(file: Path) -> History:
    """Only the owner may read what was typed. Where the file cannot be, it is kept for this run."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _opened(file):
            return _Private(file)
    except OSError:
        return InMemoryHistory()


def _opened(file: Path) -> IO[bytes]:
    """The history to add to: a regular file of mode 0600. Raises OSError; for a link too, which others may have put."""
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        os.fchmod(handle, 0o600)
        return os.fdopen(handle, "ab")
    except BaseException:
        os.close(handle)
        raise


class _Private(FileHistory):
    """A history whose file nobody else reads, and which is missed rather than waited for or traced."""

    def __init__(self, file: Path) -> None:
        self._file = file
        super().__init__(str(file))

    def store_string(self, string: str) -> None:
        lines = "".join(f"+{line}\n" for line in string.split("\n"))
        with contextlib.suppress(OSError), _opened(self._file) as file:
            file.write(f"\n# {datetime.datetime.now()}\n{lines}".encode("utf-8", "replace"))

    def load_history_strings(self) -> Iterable[str]:
        with contextlib.suppress(OSError):
            return list(super().load_history_strings())
        return []

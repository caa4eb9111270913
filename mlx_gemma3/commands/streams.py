"""The standard streams: there even where the caller closed them, and what is piped in.

Prepared before anything else is opened: a file that took the place of a closed stream would be read or written by
mistake. Imports nothing heavy, for Ctrl-C has to work while the rest is imported.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import stat
import sys
import threading
import time

from ..boundary.reading import reason
from ..errors import OutputError, PromptError

WAIT = 5.0  # seconds in which piped text must begin where there is a prompt already
MOST_PIPED = 64 << 20  # bytes: no context holds as much

_closed: set[int] = set()


class OutputLost(OutputError):
    """Standard output takes nothing more."""


def leave(*_: object) -> None:
    """Ctrl-C where nothing can be asked to stop (an import, a download, a load): leave without waiting for it."""
    os._exit(130)


def was_closed(descriptor: int) -> bool:
    """Whether the caller gave the program this standard stream closed."""
    return descriptor in _closed


def open_streams() -> None:
    """Make the three standard streams ones that can be counted on.

    A closed stdin is at its end, and a closed or full stderr swallows what it is told. A closed or full stdout raises
    OutputLost, whoever writes. What an encoding cannot say is replaced. Input is UTF-8, without a byte order mark.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            _closed.add(descriptor)
            # Of the null device only reading is asked for stdout: a write fails there, as it must.
            _put(os.O_RDONLY if descriptor == 1 else os.O_RDWR, descriptor)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    sys.stdout = _Answers(1, sys.stdout, "replace")
    sys.stderr = _Messages(2, sys.stderr, "backslashreplace")


def _put(mode: int, descriptor: int) -> None:
    """The null device in the place of a standard stream."""
    nothing = os.open(os.devnull, mode)
    if nothing != descriptor:
        os.dup2(nothing, descriptor)
        os.close(nothing)


class _Stream(io.TextIOWrapper):
    """A standard stream; one that cannot be written any more has the null device in its place."""

    def __init__(self, descriptor: int, like: object, errors: str) -> None:
        self._descriptor = descriptor
        self._failure: OSError | None = None
        raw = io.FileIO(descriptor, "wb", closefd=False)
        lines = bool(getattr(like, "line_buffering", False)) or raw.isatty()
        encoding = getattr(like, "encoding", None) or "utf-8"
        super().__init__(io.BufferedWriter(raw), encoding, errors, line_buffering=lines)

    def write(self, text: str) -> int:
        try:
            self._check()
            return super().write(text)
        except OSError as error:
            self._fail(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._fail(error)

    def _check(self) -> None:
        """Raises OSError where an earlier failure must be told again."""

    def _fail(self, error: OSError) -> None:
        if error is not self._failure:
            self._failure = error
            with contextlib.suppress(OSError):
                _put(os.O_WRONLY, self._descriptor)


class _Messages(_Stream):
    """Standard error: when nobody can be told, nobody is."""


class _Answers(_Stream):
    """Standard output.

    Raises:
        OutputLost: a write that fails, and each one after it.
        BrokenPipeError: the same where a reader went away.
    """

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _fail(self, error: OSError) -> None:
        super()._fail(error)
        if isinstance(error, BrokenPipeError):
            raise error
        got = "a closed one" if error.errno == errno.EBADF else reason(error)
        raise OutputLost("standard output", got=got, want="a place that takes the answer") from None


class Piped:
    """Text that is piped or redirected in, read while something else is done.

    Whatever it comes through: a file, a pipe, a socket. Terminals and other devices hold none.

    Args:
        wait: seconds in which it must begin, or it is done without; None waits for it.
    """

    def __init__(self, wait: float | None) -> None:
        self.silent = False  # somebody could still have written, but nothing came in time
        self._until = None if wait is None else time.monotonic() + wait
        self._parts: list[bytes] = []
        self._failure: OSError | None = None
        self._begun, self._ended = threading.Event(), threading.Event()
        if not was_closed(0) and _may_hold_text(0):
            threading.Thread(target=self._read, name="standard input", daemon=True).start()
        else:
            self._begun.set()
            self._ended.set()

    def text(self) -> str:
        """All of it, without line breaks at its ends; "" for none.

        Raises:
            PromptError: not UTF-8, or what `content` raises.
        """
        try:
            return self.content().decode("utf-8-sig").strip("\n")
        except UnicodeDecodeError as error:
            raise PromptError("standard input", got=f"bytes that are not UTF-8 at {error.start}", want="text") from None

    def content(self) -> bytes:
        """All of it as bytes.

        Raises:
            PromptError: larger than any prompt, or it cannot be read.
        """
        if self._until is not None:
            self._begun.wait(max(0.0, self._until - time.monotonic()))
            if not self._begun.is_set():
                self.silent = True
                return b""
        self._ended.wait()
        if self._failure is not None:
            raise PromptError("standard input", got=reason(self._failure), want="text")
        content = b"".join(self._parts)
        if len(content) > MOST_PIPED:
            raise PromptError("standard input", got=f"more than {MOST_PIPED >> 20} MB", want="less")
        return content

    def ended(self, timeout: float) -> bool:
        """Whether all of it is here, within so many seconds."""
        return self._ended.wait(timeout)

    def _read(self) -> None:
        size = 0
        try:
            while size <= MOST_PIPED:
                select.select([0], [], [])  # a pipe that does not block would say so else
                with contextlib.suppress(BlockingIOError):
                    part = os.read(0, 1 << 20)
                    self._begun.set()
                    if not part:
                        return
                    self._parts.append(part)
                    size += len(part)
        except OSError as error:
            self._failure = error
        finally:
            self._begun.set()
            self._ended.set()


def _may_hold_text(descriptor: int) -> bool:
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)

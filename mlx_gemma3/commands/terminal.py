"""What the commands share of the terminal: the status line, and leaving on Ctrl-C."""

from __future__ import annotations

import os
import sys


def leave(*_: object) -> None:
    """Ctrl-C where nothing can be asked to stop (a download, a load): leave without waiting for its thread."""
    os._exit(130)


class Status:
    """One line on stderr that is written over, only where a person can see it."""

    def __init__(self, wanted: bool) -> None:
        self._on = wanted and sys.stderr.isatty()
        self._shown = False

    def show(self, what: str, done: int = 0, total: int = 0) -> None:
        if self._on:
            share = f" {done} of {total}" if total else ""
            sys.stderr.write(f"\r\x1b[2K{what}{share} …")
            sys.stderr.flush()
            self._shown = True

    def bar(self, done: int, total: int, what: str) -> None:
        """A bar of 24 places, the share, and the thing at hand."""
        if self._on:
            full = 24 * done // max(total, 1)
            sys.stderr.write(
                f"\r\x1b[2K[{'#' * full}{'.' * (24 - full)}] {100 * done // max(total, 1):3} %  {what[:50]}"
            )
            sys.stderr.flush()
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self._shown = False

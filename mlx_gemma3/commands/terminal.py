"""What the commands share of the terminal: the status line, and leaving on Ctrl-C."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable

from ..visible import visible

BAR = 24  # places


def leave(*_: object) -> None:
    """Ctrl-C where nothing can be asked to stop (a download, a load): leave without waiting for its thread."""
    os._exit(130)


def print_notes(notes: Iterable[str], *, quiet: bool) -> None:
    """What a person should know of a checkpoint, on stderr; nothing when quiet."""
    for text in () if quiet else notes:
        sys.stderr.write(f"note: {visible(text)}\n")


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
        """A bar, the share, and the thing at hand."""
        if self._on:
            full = BAR * done // max(total, 1)
            share = f"{100 * done // max(total, 1):3} %"
            sys.stderr.write(f"\r\x1b[2K[{'#' * full}{'.' * (BAR - full)}] {share}  {what[:50]}")
            sys.stderr.flush()
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self._shown = False


class Pace:
    """How fast something goes, and how long it will still take."""

    def __init__(self) -> None:
        self._began, self._first, self._total = 0.0, 0, -1

    def text(self, done: int, total: int, unit: str) -> str:
        """As "1,024 of 8,000 tokens · 310 tokens/s · 22 s left". A new total starts anew."""
        now = time.monotonic()
        if total != self._total or done < self._first:
            self._began, self._first, self._total = now, done, total
        words = f"{done:,} of {total:,} {unit}"
        if done > self._first and now > self._began:
            speed = (done - self._first) / (now - self._began)
            words += f" · {speed:,.0f} {unit}/s · {(total - done) / speed:,.0f} s left"
        return words

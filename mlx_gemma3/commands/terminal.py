"""The one place of the commands that writes: answers, reports, messages, the status line.

What others wrote (names, answers, errors) goes through visible.py on its way to a terminal, so no control character in
it arrives there; escape sequences are this file's own, rich's and prompt_toolkit's. Standard streams are streams.py's.
"""

from __future__ import annotations

import shutil
import sys
import time
import unicodedata
from collections.abc import Iterable

from ..visible import json_line, one_line, visible
from .streams import leave

__all__ = [
    "Pace", "Status", "answer", "columns", "emit", "fitted", "leave", "own", "print_notes", "say", "tell", "thought",
    "width",
]  # fmt: skip

BAR = 24  # places
_AGAIN = "\r\x1b[2K"  # to the line's start, and empty it


def answer(text: str) -> None:
    """Some of a model's answer, at once: as it is for a file or a program, filtered for a terminal."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def thought(text: str | None) -> None:
    """Some of what a model thinks before it answers, on stderr, dimmed for a terminal; None: it begins to answer."""
    dim = sys.stderr.isatty()
    shown = "\n" if text is None else visible(text) if dim else text
    sys.stderr.write(f"\x1b[2m{shown}\x1b[0m" if dim and text else shown)
    sys.stderr.flush()


def say(text: str) -> None:
    """A report, or lines of one, on stdout."""
    sys.stdout.write(visible(text) + "\n")
    sys.stdout.flush()


def emit(value: object) -> None:
    """A value as one line of JSON on stdout, in escapes where the encoding has no such character."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("_", "-")
    sys.stdout.write(json_line(value, ascii_only=encoding not in ("utf-8", "utf8")) + "\n")
    sys.stdout.flush()


def tell(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(visible(text) + "\n")
    sys.stderr.flush()


def own(text: str) -> None:
    """Text on stdout with escape sequences that are ours; what others wrote in it has been made visible before."""
    sys.stdout.write(text)
    sys.stdout.flush()


def width() -> int:
    """Columns of the terminal, at least 1."""
    return max(1, shutil.get_terminal_size().columns)


def columns() -> int | None:
    """Columns of the terminal that reports go to; None where they go elsewhere, which takes any length."""
    return width() if sys.stdout.isatty() else None


def fitted(text: str, most: int) -> str:
    """One line of text that takes at most so many columns, cut at its end."""
    text, used = one_line(text), 0
    for place, character in enumerate(text):
        used += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used > most:
            cut = text[:place]
            return f"{cut[:-1]}…" if most > 1 and unicodedata.east_asian_width(cut[-1:]) not in "WF" else cut
    return text


def print_notes(notes: Iterable[str], *, quiet: bool) -> None:
    """What a person should know of a checkpoint, on stderr; nothing when quiet."""
    for text in () if quiet else notes:
        tell(f"note: {text}")


class Status:
    """One line on stderr that is written over, only where a person can see it."""

    def __init__(self, wanted: bool) -> None:
        self._on = wanted and sys.stderr.isatty()
        self._shown = False

    def show(self, what: str, done: int = 0, total: int = 0) -> None:
        share = f" {done} of {total} …" if total else " …"
        self._write(fitted(what, max(1, width() - 1 - len(share))) + share)

    def bar(self, done: int, total: int, what: str) -> None:
        """A bar, the share, and the thing at hand."""
        full = BAR * done // max(total, 1)
        share = f"{100 * done // max(total, 1):3} %"
        self._write(f"[{'#' * full}{'.' * (BAR - full)}] {share}  {one_line(what, 50)}")

    def clear(self) -> None:
        if self._shown:
            self._write("")
            self._shown = False

    def _write(self, line: str) -> None:
        if self._on:
            sys.stderr.write(_AGAIN + fitted(line, width() - 1))
            sys.stderr.flush()
            self._shown = True


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

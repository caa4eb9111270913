"""The lines at the bottom of a terminal that still change. What is above them stays, in the scrollback too."""

from __future__ import annotations

import os
from collections.abc import Callable


class Live:
    """Writes lines over, from the first that differs; the rest is left alone, so nothing flickers.

    The cursor rests after the last line. Lines that have left the screen at the top cannot be written again.

    Args:
        write: takes text for the terminal.
        size: its columns and rows now.
    """

    def __init__(self, write: Callable[[str], None], size: Callable[[], os.terminal_size]) -> None:
        self._write, self._size = write, size
        self._lines: list[str] = []
        self._columns = 0

    def update(self, lines: list[str]) -> None:
        """Show these lines in the place of those before. Each fits the terminal's width."""
        columns, rows = self._size()
        if self._lines and columns != self._columns:  # the terminal has wrapped them its own way: leave them
            self.keep()
        self._columns = columns
        if not self._lines:
            self._send("\n".join(lines))
        elif lines != self._lines:
            self._send(self._change(lines, rows))
        self._lines = list(lines)

    def _change(self, lines: list[str], rows: int) -> str:
        old = self._lines
        same = next((n for n, (a, b) in enumerate(zip(old, lines, strict=False)) if a != b), min(len(old), len(lines)))
        first = max(min(same, len(lines) - 1), len(old) - rows, 0)
        if first >= len(old):
            return "\n" + "\n".join(lines[first:])
        up = len(old) - 1 - first
        erase = "\r\x1b[J" if len(lines) < len(old) else ""
        return (f"\x1b[{up}A" if up else "") + erase + "\n".join("\r\x1b[2K" + line for line in lines[first:])

    def keep(self) -> None:
        """Leave the lines as they are and go on below them."""
        if self._lines:
            self._send("\n")
        self._lines = []

    def clear(self) -> None:
        """Take the lines away."""
        if self._lines:
            up = len(self._lines) - 1
            self._send((f"\x1b[{up}A" if up else "") + "\r\x1b[J")
        self._lines = []

    def _send(self, text: str) -> None:
        # Between these two, a terminal that knows them (mode 2026) shows nothing half done; others ignore them.
        self._write(f"\x1b[?2026h{text}\x1b[?2026l")

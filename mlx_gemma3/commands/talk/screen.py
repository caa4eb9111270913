"""What a person at a terminal sees: answers as they come, progress, notes; and the plain form where nobody looks."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from ...visible import one_line, visible
from ..streams import OutputLost
from ..terminal import Pace, answer, fitted, own, tell, thought, width
from .signals import stopping

if TYPE_CHECKING:
    from ...runtime.events import DoneEvent, ErrorEvent, PendingEvent
    from ...runtime.stream import Stream

_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_BEAT = 0.08  # seconds between two pictures of the spinner, and between two of the text
_MOST_TYPED = 1 << 20  # bytes that are typed or pasted while nothing is asked; what is more is dropped


class Screen(Protocol):
    """Where a chat shows itself."""

    def note(self, text: str) -> None:
        """Say something beside the conversation."""

    def error(self, text: str) -> None:
        """Say what went wrong."""

    def rows(self, rows: Sequence[tuple[str, str]]) -> None:
        """A small table, names at the left."""

    def follow(self, stream: Stream) -> DoneEvent | ErrorEvent:
        """Show an answer as it comes; Ctrl-C ends it. Returns the last event."""

    def wait(self, ended: Callable[[float], bool], what: str) -> bool:
        """Wait until `ended(seconds)` is true. Ctrl-C ends the waiting; returns whether it was waited out."""


class Terminal:
    """A terminal that a person looks at."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console

        from .live import Live
        from .markdown import THEME

        self._quiet = quiet
        self._console = Console(theme=THEME, highlight=False, emoji=False)
        self._live = Live(own, shutil.get_terminal_size)
        self._typed = Typed()

    def typed(self) -> bytes:
        """What was typed while nothing was asked, once."""
        return self._typed.take()

    def note(self, text: str) -> None:
        if not self._quiet:
            self._console.print(visible(text), style="dim", markup=False)

    def error(self, text: str) -> None:
        self._console.print(visible(text), style="red", markup=False)

    def rows(self, rows: Sequence[tuple[str, str]]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        beside = width() >= max(len(name) for name, _ in rows) + 12
        for name, value in rows:
            if beside:
                table.add_row(name, Text(visible(value)))
            else:  # too narrow for two columns
                self._console.print(Text(f"{name}: ", style="bold").append(visible(value), style="not bold"))
        if beside:
            self._console.print(table)

    def follow(self, stream: Stream) -> DoneEvent | ErrorEvent:
        from .markdown import Writer

        writer, pace = Writer(self._console, self._live), Pace()
        words, speaking, drawn, beat = "thinking", False, 0.0, 0
        thinking = False  # what the model thinks is being shown
        with _hushed(), stopping(stream.cancel):
            try:
                while True:
                    event = stream.next(timeout=_BEAT)
                    self._typed.read()
                    if event["kind"] == "pending":
                        words = _reading(event, pace) if "stage" in event else words
                    elif event["kind"] == "thinking":
                        if not thinking:
                            self._live.clear()
                        thinking = True
                        own(f"\x1b[2m{visible(event['text'])}\x1b[0m")
                    elif event["kind"] == "text":
                        if not speaking and not thinking:
                            self._live.clear()
                        if thinking:
                            own("\n\n")
                        speaking, thinking = True, False
                        writer.push(event["text"])
                    elif event["kind"] in ("done", "error"):
                        if thinking:
                            own("\n")
                        elif not speaking:
                            self._live.clear()
                        return event
                    now = time.monotonic()
                    if now - drawn >= _BEAT:
                        if speaking:
                            writer.show()
                        elif not thinking:
                            beat += 1
                            self._spin(beat, words)
                        drawn = now
            finally:
                with contextlib.suppress(OutputLost):  # the terminal is gone: what ended the answer says more
                    writer.finish()

    def wait(self, ended: Callable[[float], bool], what: str) -> bool:
        given_up = False

        def give_up() -> None:
            nonlocal given_up
            given_up = True

        began, beat = time.monotonic(), 0
        with _hushed(), stopping(give_up):
            try:
                while not given_up and not ended(_BEAT):
                    self._typed.read()
                    beat += 1
                    seconds = time.monotonic() - began
                    self._spin(beat, what + (f" · {seconds:.0f} s" if seconds >= 1 else ""))
            finally:
                with contextlib.suppress(OutputLost):
                    self._live.clear()
        return not given_up

    def _spin(self, beat: int, words: str) -> None:
        line = fitted(f"{_FRAMES[beat % len(_FRAMES)]} {words}", width() - 1)
        self._live.update([f"\x1b[2m{line}\x1b[0m"])


class Typed:
    """Reads what is typed while an answer is shown or the model loads, for the next prompt.

    A terminal keeps about 4,000 characters: after a longer paste nothing more would arrive, not even Ctrl-C.
    """

    def __init__(self) -> None:
        self._bytes = b""

    def read(self) -> None:
        """Take what is there."""
        place = sys.stdin.fileno()
        with contextlib.suppress(OSError):  # the terminal is gone
            while select.select([place], [], [], 0)[0] and (part := os.read(place, 1 << 16)):
                self._bytes += part[: _MOST_TYPED - len(self._bytes)]

    def take(self) -> bytes:
        taken, self._bytes = self._bytes, b""
        return taken


class Plain:
    """No terminal: answers on stdout as they are, everything else on stderr."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet

    def note(self, text: str) -> None:
        if not self._quiet:
            tell(text)

    def error(self, text: str) -> None:
        tell(f"mlx-gemma3: {text}")

    def rows(self, rows: Sequence[tuple[str, str]]) -> None:
        room = max(len(name) for name, _ in rows)
        tell("\n".join(f"{name:<{room}}  {one_line(value)}" for name, value in rows))

    def follow(self, stream: Stream) -> DoneEvent | ErrorEvent:
        failure: Exception | None = None
        thinking = False
        with stopping(stream.cancel):
            while True:
                event = stream.next()
                if event["kind"] == "thinking" and not self._quiet:
                    thought(event["text"])
                    thinking = True
                elif thinking:
                    thought(None)
                    thinking = False
                try:
                    if failure is None and event["kind"] in ("text", "done"):
                        answer(event["text"] if event["kind"] == "text" else "\n")
                except (OutputLost, BrokenPipeError) as error:  # the conversation keeps the answer all the same
                    failure = error
                if event["kind"] in ("done", "error"):
                    if failure is not None:
                        raise failure
                    return event

    def wait(self, ended: Callable[[float], bool], what: str) -> bool:
        while not ended(60):
            pass
        return True


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keys pressed meanwhile are not shown; they wait for the next prompt. Ctrl-C still interrupts."""
    import termios

    place = sys.stdin.fileno()
    try:
        before = termios.tcgetattr(place)
        quiet = termios.tcgetattr(place)
        quiet[0] &= ~termios.ICRNL
        quiet[3] &= ~(termios.ECHO | termios.ICANON)
        termios.tcsetattr(place, termios.TCSANOW, quiet)
    except termios.error:  # the terminal is gone
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(place, termios.TCSANOW, before)


def _reading(event: PendingEvent, pace: Pace) -> str:
    """What a progress event tells."""
    done, total = event["done"], event["total"]
    if event["stage"] == "download":
        return f"fetching the picture · {done:,} bytes"
    if event["stage"] == "pictures":
        return "looking at the picture" if total == 1 else f"looking at {total} pictures"
    return f"reading {pace.text(done, total, 'tokens')}"

"""Makes the pictures of docs/chat.md: drives the program through a pseudo-terminal and draws what stands there.

python docs/make_chat_screens.py          write docs/chat-*.svg
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pyte
from pyte.screens import Char
from rich.console import Console
from rich.style import Style
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
HINT = "a question, a picture dropped here"  # at an empty prompt: the program has nothing to do
# A new session has no terminal of its own until it takes one; without one, Ctrl-C would reach nobody.
_START = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from mlx_gemma3.cli import main; main()"


class _Screen(pyte.Screen):
    """Answers the program's questions, such as where the cursor is."""

    def __init__(self, columns: int, rows: int, terminal: int) -> None:
        self._terminal = terminal
        super().__init__(columns, rows)

    def write_process_input(self, data: str) -> None:
        os.write(self._terminal, data.encode())


class Program:
    """`mlx-gemma3` with some arguments, in a terminal of its own.

    Args:
        folder: where it runs.
        environment: over that of this process.
        python: options of the interpreter.
        before: a program that runs first, in the same interpreter.
    """

    def __init__(
        self,
        *arguments: str,
        folder: Path,
        columns: int = 88,
        rows: int = 24,
        environment: Mapping[str, str] | None = None,
        python: tuple[str, ...] = (),
        before: str = "",
    ) -> None:
        self._terminal, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen = _Screen(columns, rows, self._terminal)
        self._stream = pyte.ByteStream(self.screen)
        self._process = subprocess.Popen(
            [sys.executable, *python, "-c", f"{before}\n{_START}", *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            cwd=folder,
            env={**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", **(environment or {})},
        )
        os.close(inner)

    @property
    def text(self) -> str:
        """What stands on the screen."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def press(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def until(self, what: str, times: int = 1) -> None:
        """Wait until something stands on the screen, so many times.

        Raises:
            TimeoutError: it does not come; the message is the screen.
        """
        self.watch(lambda text: text.count(what) >= times, what)

    def watch(self, condition: Callable[[str], bool], what: str, seconds: float = 30) -> None:
        """Wait until what stands on the screen fulfils a condition. Raises TimeoutError as `until` does."""
        end = time.monotonic() + seconds
        while not condition(self.text):
            if time.monotonic() > end or not self._read():
                raise TimeoutError(f"{what} did not come:\n{self.text}")

    def enter(self, line: str) -> None:
        """Type a line at an empty prompt, and send it."""
        self.until(HINT)
        self.press(line)
        self.until(f"› {line}"[: self.screen.columns])
        self.press("\r")

    def ended(self, seconds: float = 30) -> int:
        """Read to the end; returns the exit status."""
        while self._read():
            pass
        return self._process.wait(seconds)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        """End it, if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._terminal)

    def _read(self) -> bool:
        """Take what comes within a moment; False at the end."""
        if select.select([self._terminal], [], [], 0.05)[0]:
            try:
                data = os.read(self._terminal, 1 << 16)
            except OSError:  # Linux says so when the other side is closed, macOS gives nothing
                return False
            self._stream.feed(data)
            return bool(data)
        return self._process.poll() is None

    def svg(self, title: str) -> str:
        """The screen as a picture, without the empty lines at its end."""
        console = Console(
            record=True, file=io.StringIO(), width=self.screen.columns, force_terminal=True, color_system="truecolor"
        )
        for row in range(len(self.text.split("\n"))):
            cells = (self.screen.buffer[row][column] for column in range(self.screen.columns))
            console.print(Text.assemble(*((cell.data, _style(cell)) for cell in cells)), no_wrap=True)
        svg = console.export_svg(title=title, unique_id="chat")
        return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # a picture fetches no fonts


def _style(cell: Char) -> Style:
    def colour(name: str) -> str | None:
        if name == "default":
            return None
        if len(name) == 6 and all(digit in "0123456789abcdefABCDEF" for digit in name):
            return f"#{name}"
        return {"brown": "yellow", "brightbrown": "bright_yellow"}.get(name, name.replace("bright", "bright_"))

    return Style(
        color=colour(cell.fg), bgcolor=colour(cell.bg), bold=cell.bold, italic=cell.italics, reverse=cell.reverse,
        underline=cell.underscore,
    )  # fmt: skip


def main() -> None:
    """Write docs/chat-*.svg."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("heart", "triangle"):
            shutil.copy(ROOT / "examples" / "pictures" / f"{name}.png", folder)
        (folder / "heart.png").rename(folder / "my heart.png")
        arguments = ("chat", "--model", "demo", "--temperature", "0")
        own = {"MLX_GEMMA3_DATA": str(folder / "data")}
        with Program(*arguments, folder=folder, environment=own, rows=34) as program:
            program.enter("./my\\ heart.png What shape is this?")
            program.enter("And what colour is it?")
            program.enter("/retry")
            program.enter("/stats")
            program.enter("/save hearts.session")
            program.enter("/export hearts.md")
            program.until("written to")
            program.until(HINT)
            _write(program, "conversation")
        with Program(*arguments, folder=folder, environment=own, rows=8) as program:
            program.enter("/image 'my heart.png' triangle.png")
            program.until("picture 2")
            program.until(HINT)
            program.press("Which picture shows\x1b\ra green triangle?")
            program.until("a green triangle?")
            _write(program, "pictures")
        with Program(*arguments, folder=folder, environment=own, rows=8) as program:
            program.until(HINT)
            program.press("/s")
            program.until("/stats")
            _write(program, "completion")


def _write(program: Program, name: str) -> None:
    target = ROOT / "docs" / f"chat-{name}.svg"
    working = target.with_suffix(".new")
    working.write_text(program.svg("mlx-gemma3 chat"), encoding="utf-8")
    working.replace(target)


if __name__ == "__main__":
    main()

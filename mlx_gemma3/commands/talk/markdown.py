"""Markdown as lines for a terminal, and an answer shown as it comes: finished blocks once, the last one live."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import ClassVar

from markdown_it.token import Token
from rich import markdown as rich_markdown
from rich.console import Console, ConsoleOptions, RenderResult
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

from ...visible import visible
from .blocks import cut, parser
from .live import Live

THEME = Theme(
    {
        "markdown.code": "cyan",
        "markdown.h1": "bold underline",
        "markdown.h2": "bold underline",
        "markdown.h3": "bold",
        "markdown.h4": "bold",
        "markdown.block_quote": "dim",
        "markdown.item.bullet": "bold",
        "markdown.item.number": "bold",
        "markdown.table.border": "dim",
        "markdown.table.header": "bold",
    }
)
_NUMBER = re.compile(r"(\s*)(\d+)([.)])")
_COLOUR = re.compile(r"(\x1b\[[\d;]*m)")
_SPACES_AT_END = re.compile(r" +$", re.MULTILINE)


class _Heading(rich_markdown.Heading):
    """At the left, as the rest of the text is."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text: Text = self.text
        text.justify = "left"
        yield text


class _Code(rich_markdown.CodeBlock):
    """In the terminal's own sixteen colours and on its own ground, two columns in."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(
            code, self.lexer_name, theme="ansi_dark", background_color="default", word_wrap=True, padding=(0, 0, 0, 2)
        )


class _Markdown(rich_markdown.Markdown):
    elements: ClassVar[dict[str, type[rich_markdown.MarkdownElement]]] = {
        **rich_markdown.Markdown.elements,
        "heading_open": _Heading,
        "fence": _Code,
        "code_block": _Code,
    }

    def __init__(self, tokens: list[Token]) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = tokens


def rendered(text: str, console: Console) -> list[str]:
    """One block of Markdown as lines with colours, none wider than the terminal, without blank ones around them."""
    with console.capture() as capture:
        console.print(_Markdown(parser().parse(text)))
    # The text was visible before, but `&#x202e;` says in Markdown what nobody has seen. Odd parts are rich's colours.
    parts = _COLOUR.split(capture.get())
    shown_as = "".join(part if place % 2 else visible(part) for place, part in enumerate(parts))
    lines = _SPACES_AT_END.sub("", shown_as).split("\n")
    shown = [number for number, line in enumerate(lines) if _COLOUR.sub("", line).strip()]
    return lines[shown[0] : shown[-1] + 1] if shown else []


class Writer:
    """An answer on its way to the terminal."""

    def __init__(self, console: Console, live: Live) -> None:
        self._console, self._live = console, live
        self._text = ""  # from the first block that is not finished
        self._number: int | None = None  # of the list item that comes next, when its list has begun above
        self._follows = False
        self._begun = False  # something stands above

    def push(self, text: str) -> None:
        self._text += visible(text)

    def show(self) -> None:
        """Bring the terminal up to date."""
        blocks = cut(self._text)
        for block, after in pairwise(blocks):
            self._draw(block.text)
            self._live.keep()
            self._begun = self._begun or bool(block.text.strip())
            number = self._numbered(block.text)[1]
            self._follows, self._number = after.follows, number + 1 if after.follows and number is not None else None
        self._text = blocks[-1].text if blocks else ""
        self._draw(self._text)

    def finish(self) -> None:
        """The answer has ended."""
        self.show()
        self._live.keep()

    def _draw(self, text: str) -> None:
        if lines := rendered(self._numbered(text)[0], self._console):
            self._live.update(["", *lines] if self._begun and not self._follows else lines)

    def _numbered(self, text: str) -> tuple[str, int | None]:
        """A list's item with its number, counted from the list's first."""
        if (match := _NUMBER.match(text)) is None:
            return text, None
        number = int(match[2]) if self._number is None else self._number
        return f"{match[1]}{number}{match[3]}{text[match.end() :]}", number

"""Markdown that is still being written: which of its blocks are finished, and which one may yet change."""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from markdown_it import MarkdownIt


_ITEM = re.compile(r"\s*(?:[-*+]|\d+[.)])\s+\S")


class Block(NamedTuple):
    """A part of a document that can be shown on its own: a paragraph, a table, one item of a list."""

    text: str
    follows: bool = False  # an item after another of its list: no blank line between them, numbers counted on


@cache
def parser() -> MarkdownIt:
    """CommonMark with tables and strikethrough. HTML is text: a tag must not vanish from an answer."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


def cut(text: str) -> list[Block]:
    """Split where a block starts. All but the last are finished: no text to come can change them.

    A start is believed when its line is whole (with a table, the line of dashes below), stands after a blank line or
    has the words of an item: `#` alone may become `#word`, and `-` alone `-word`, which go on with the paragraph above.
    """
    lines = text.splitlines(keepends=True)
    starts: list[tuple[int, int, bool]] = []  # line, the line that says so, whether it is a further item of a list
    items = 0
    for token in parser().parse(text):
        if token.map is None or token.nesting < 0:
            continue
        line = token.map[0]
        if token.level == 0:
            items = 0
            if not token.type.endswith("_list_open"):
                starts.append((line, line + (token.type == "table_open"), False))
        elif token.level == 1 and token.type == "list_item_open":
            starts.append((line, line, items > 0))
            items += 1
    kept = [
        (line, follows)
        for line, sign, follows in starts
        if line and (lines[sign].endswith("\n") or not lines[line - 1].strip() or _ITEM.match(lines[line]))
    ]
    borders = [(0, starts[0][2] if starts else False), *kept, (len(lines), False)]
    return [
        Block("".join(lines[start:stop]), follows) for (start, follows), (stop, _) in pairwise(borders) if start < stop
    ]

"""Other people's text where a person reads it: no control character, no more than fits one sentence.

Names of files, tensors and settings, and what a model writes, may hold anything. A terminal acts on control characters
(C0, DEL, C1: titles, colours, the clipboard), and some marks of writing direction make it show another order than is
there.

Beside errors.py because every message is made with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

MOST = 300  # characters of other people's names in one message

# C0 but tab and newline, DEL, C1, lone surrogates (bytes of a path that are not UTF-8), the direction overrides, the
# byte order mark
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")


def visible(text: str) -> str:
    r"""The text with what a terminal would act on written out, as `\x1b`; tabs and newlines stay."""
    return _HIDDEN.sub(lambda found: _escape(found[0]), text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python carries a byte that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def one_line(text: str, most: int = MOST) -> str:
    """The text for a place in a sentence, a table or a status line: on one line, visible, cut."""
    return shortened(visible(" ".join(text.split())), most)


def json_line(value: object, *, ascii_only: bool = False) -> str:
    """A value as JSON on one line, what `visible` writes out as \\u escapes: for a program it is the same value."""
    text = json.dumps(value, ensure_ascii=ascii_only)
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def shortened(text: str, most: int = MOST) -> str:
    """The text, or its beginning and end with `…` between: at most `most` characters."""
    if len(text) <= most:
        return text
    head = (most - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def listed(names: Iterable[object], most: int = 3) -> str:
    """The first few of some names and how many more there are: `a, b, c and 19,997 more`."""
    ordered = sorted(map(str, names))
    more = f" and {len(ordered) - most:,} more" if len(ordered) > most else ""
    return ", ".join(shortened(name, MOST // most) for name in ordered[:most]) + more

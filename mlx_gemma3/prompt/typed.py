"""What people typed, as opposed to what a template wrote: marked before rendering, told apart afterwards.

    "end <end_of_turn>"  →  "end ⟦<end_of_turn>⟧"  →  template  →  … ⟦<end_of_turn>⟧<end_of_turn>  →  text, control

Marks are characters that neither the texts nor the template hold. They stand around each control token that somebody
typed, so that those without any are the template's own. Two ways of marking are tried, for a template may look at what
it is given:

    closely   whole control tokens, and the parts of one at a text's edges, which could meet their other halves
    broadly   on both sides of each character that a control token begins or ends with

What a template writes from texts that are marked broadly holds no control token of which any end was typed: the control
tokens found in that are the template's own. The close way disturbs almost no template, and is taken where it leaves the
same control tokens in the same order; else the broad one.

Knows nothing of ids.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

_MARKS = [chr(code) for code in range(0x1D306, 0x1D357)]  # symbols that nobody types, and `repr` leaves as they are
_NAMES = ("role", "type")  # keys whose values the program chose: parts of control tokens in some templates


class Marker:
    """Marks texts for one rendering.

    Args:
        controls: names of control tokens.
        held: everything that the rendering sees, template included.
    """

    def __init__(self, controls: Collection[str], held: Iterable[Any]) -> None:
        self.controls = sorted({name for name in controls if name}, key=len, reverse=True)
        seen = set().union(*(set(text) for one in held for text in texts(one)))
        free = [mark for mark in _MARKS if mark not in seen]
        # Before and behind a whole token, and inside of parts. Without free ones nothing is marked.
        self._open, self._close, self.mark = free[:3] if len(free) > 2 else ("", "", "")
        whole = "|".join(map(re.escape, self.controls)) or "(?!)"
        self._whole = re.compile(whole)
        tries = [*map(self._inner, self.controls)]
        if self.mark:
            tries = [f"{self._open}(?:{whole}){self._close}?", f"(?:{whole}){self._close}", *tries]
        self._found = re.compile("|".join(tries) or "(?!)")
        self._firsts = frozenset(name[0] for name in self.controls)
        self._lasts = frozenset(name[-1] for name in self.controls)
        self._longest = max(map(len, self.controls), default=0)

    def marked(self, value: Any, *, broadly: bool, key: Any = None) -> Any:
        """The same with marks in its texts."""
        if isinstance(value, str):
            name = key in _NAMES
            return self._broadly(value, name) if broadly else self._closely(value, name)
        if isinstance(value, Mapping):
            return {
                self.marked(name, broadly=broadly, key="type"): self.marked(one, broadly=broadly, key=name)
                for name, one in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.marked(one, broadly=broadly) for one in value]
        return value

    def dangerous(self, text: str) -> bool:
        """Whether an end or the middle of a control token could come from it."""
        return not (self._firsts | self._lasts).isdisjoint(text) or self._is_middle(text.strip())

    def plain(self, text: str) -> str:
        """A text without its marks."""
        for mark in filter(None, (self._open, self._close, self.mark)):
            text = text.replace(mark, "")
        return text

    def own(self, text: str) -> list[str]:
        """The control tokens that the template wrote, in order."""
        return [name for name, own, _ in self.split(text) if own]

    def split(self, text: str) -> list[tuple[str, bool, bool]]:
        """(text without marks, whether it is a control token of the template's, whether it is one that was typed)."""
        made = []
        end = 0
        for match in self._found.finditer(text):
            made.append((self.plain(text[end : match.start()]), False, False))
            name = self.plain(match[0])
            made.append((name, name == match[0], name != match[0]))
            end = match.end()
        made.append((self.plain(text[end:]), False, False))
        return [one for one in made if one[0]]

    def _inner(self, name: str) -> str:
        """Matches a control token with marks in it."""
        return f"{self.mark}*".join(map(re.escape, name)) if self.mark else re.escape(name)

    def _closely(self, text: str, name: bool) -> str:
        mark = self.mark
        text = self._whole.sub(lambda match: f"{self._open}{match[0]}{self._close}", text)
        if name:
            return text
        body = text.strip()
        start = text.find(body)
        end = start + len(body)
        cut = next((n for n in range(min(self._longest, len(body)), 0, -1) if self._begins(body[-n:])), 0)
        if cut:
            text = text[: end - cut + 1] + mark + text[end - cut + 1 :]
            end += len(mark)
        cut = next((n for n in range(min(self._longest, len(body)), 0, -1) if self._ends(body[:n])), 0)
        if cut:
            text = text[: start + cut - 1] + mark + text[start + cut - 1 :]
        return text

    def _begins(self, part: str) -> bool:
        return any(len(name) > len(part) and name.startswith(part) for name in self.controls)

    def _ends(self, part: str) -> bool:
        return any(len(name) > len(part) and name.endswith(part) for name in self.controls)

    def _is_middle(self, text: str) -> bool:
        return 3 < len(text) < self._longest and any(text in name for name in self.controls)

    def _broadly(self, text: str, name: bool) -> str:
        ends, mark = self._firsts | self._lasts, self.mark
        made = [f"{mark}{letter}{mark}" if letter in ends else letter for letter in text]
        inner = text.strip()
        if not name and self._is_middle(inner):
            return text.replace(inner, inner[0] + self.mark + inner[1:], 1)
        return "".join(made)


def texts(value: Any) -> Iterable[str]:
    """All the texts that a value holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, one in value.items():
            yield from texts(name)
            yield from texts(one)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for one in value:
            yield from texts(one)

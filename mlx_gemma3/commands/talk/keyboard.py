"""Keys out of what a terminal sends, also where it sends what no keyboard would."""

from __future__ import annotations

from prompt_toolkit.input.vt100_parser import Vt100Parser

_LONGEST = 64  # characters of an escape sequence; prompt_toolkit's time grows with their number's third power


class Keyboard(Vt100Parser):
    """prompt_toolkit's parser, which waits neither for the end of a sequence nor of a paste for ever."""

    _run = 0  # characters of what could be a sequence of numbers

    def feed(self, data: str) -> None:
        for place, character in enumerate(data):
            if self._in_bracketed_paste:
                self._run = 0
                super().feed(data[place:])
                return
            longer = self._run and character in "[<0123456789;"
            self._run = 1 if character == "\x1b" else self._run + 1 if longer else 0
            super().feed(character)
            if self._run > _LONGEST:
                self._run = 0
                self.flush()

    def pasted(self) -> int:
        """Characters of a paste whose end has not come yet; -1 outside of one."""
        return len(self._paste_buffer) if self._in_bracketed_paste else -1

    def end_paste(self) -> None:
        r"""End a paste that has begun. After `\x1b[200~` alone, keys would be text of it for ever, Ctrl-C too."""
        if self._in_bracketed_paste:
            super().feed("\x1b[201~")

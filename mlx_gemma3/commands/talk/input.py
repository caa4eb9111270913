"""The line that a person types on: history, completion, several lines, and a word on how the model is doing."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.input.vt100_parser import Vt100Parser
from prompt_toolkit.key_binding import KeyBindings, KeyPress, KeyPressEvent
from prompt_toolkit.styles import Style

from ...visible import one_line
from .lines import SUFFIXES
from .loading import Loading
from .settings import KINDS
from .verbs import VERBS

_STYLE = Style.from_dict(
    {"bottom-toolbar": "noreverse fg:ansibrightblack", "prompt": "bold", "placeholder": "fg:ansibrightblack"}
)
_PASTE = 0.5  # seconds in which a paste must go on
_FRAGMENT = re.compile(r"(?:\\.|[^\s\\])*$")
_SPECIAL = re.compile(r"""([\s\\'"$&()*;<>?\[\]`{|}!#])""")


class Input:
    """Asks for lines.

    Args:
        history: the file that keeps them.
        loading: its failure ends the prompt, since nothing can be asked then.
        state: words for the line below the prompt.
    """

    def __init__(self, history: Path, loading: Loading, state: Callable[[], str]) -> None:
        self._loading, self._state = loading, state
        self._given = ""  # what stood there to begin with
        self._prompt: PromptSession[str] = PromptSession(
            [("class:prompt", "› ")],
            multiline=True,
            prompt_continuation="  ",
            history=_history(history),
            completer=Completions(),
            complete_while_typing=Condition(lambda: " " not in self._prompt.default_buffer.text),  # paths: with Tab
            key_bindings=self._keys(),
            bottom_toolbar=self._toolbar,
            placeholder=self._placeholder,
            style=_STYLE,
            reserve_space_for_menu=5,
            enable_suspend=True,
        )

    def ask(self, default: str = "", typed: bytes = b"") -> str:
        """One entry, which may be of several lines.

        Args:
            typed: keys that were pressed before.

        Raises:
            KeyboardInterrupt: Ctrl-C where nothing was typed, nor a default changed.
            EOFError: Ctrl-D there, or the terminal is gone.
            Gemma3Error: the model could not be loaded.
        """
        self._given = default
        if typed:
            keys: list[KeyPress] = []
            parser = Vt100Parser(keys.append)
            parser.feed(typed.decode("utf-8", "replace"))
            _end_paste(parser)
            parser.flush()
            store_typeahead(self._prompt.app.input, keys)

        def begin() -> None:
            self._prompt.app.create_background_task(self._watch())

        return self._prompt.prompt(default=default, pre_run=begin)

    async def _watch(self) -> None:
        """Show that the model is ready, or end the prompt when there will be none. End a paste that has no end."""
        app, told, held = self._prompt.app, False, -1
        parser = getattr(app.input, "vt100_parser", None)
        while True:
            if self._loading.ended() and not told:
                told = True
                if self._loading.failure is not None and not app.is_done:
                    app.exit(exception=self._loading.failure)
                app.invalidate()
            length = _pasted(parser)
            if length >= 0 and length == held:  # the terminal has sent no more of it in the meantime
                _end_paste(parser)
                length = -1
            held = length
            await asyncio.sleep(0.1 if not told else _PASTE)

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c")
        def _(event: KeyPressEvent) -> None:
            if event.current_buffer.text in ("", self._given):
                event.app.exit(exception=KeyboardInterrupt(), style="class:aborting")
            else:
                event.current_buffer.reset()

        return keys

    def _placeholder(self) -> StyleAndTextTuples:
        hint = "" if self._prompt.app.is_done else "a question, a picture dropped here, or /help"
        return [("class:placeholder", hint)]

    def _toolbar(self) -> StyleAndTextTuples:
        return [("", one_line(self._state()))]


def _pasted(parser: object) -> int:
    """Characters of a paste whose end has not come yet; -1 outside of one."""
    return len(getattr(parser, "_paste_buffer", "")) if getattr(parser, "_in_bracketed_paste", False) else -1


def _end_paste(parser: Any) -> None:
    r"""Let a paste end that has begun. After `\x1b[200~` alone, keys would be text of it for ever, Ctrl-C too."""
    if _pasted(parser) >= 0:
        parser.feed("\x1b[201~")


def _history(file: Path) -> History:
    """Only the owner may read what was typed. Where the file cannot be, it is kept for this run."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _opened(file):
            return _Private(file)
    except OSError:
        return InMemoryHistory()


def _opened(file: Path) -> IO[bytes]:
    """The history to add to: a regular file of mode 0600. Raises OSError; for a link too, which others may have put."""
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        os.fchmod(handle, 0o600)
        return os.fdopen(handle, "ab")
    except BaseException:
        os.close(handle)
        raise


class _Private(FileHistory):
    """A history whose file nobody else reads, and which is missed rather than waited for or traced."""

    def __init__(self, file: Path) -> None:
        self._file = file
        super().__init__(str(file))

    def store_string(self, string: str) -> None:
        lines = "".join(f"+{line}\n" for line in string.split("\n"))
        with contextlib.suppress(OSError), _opened(self._file) as file:
            file.write(f"\n# {datetime.datetime.now()}\n{lines}".encode("utf-8", "replace"))

    def load_history_strings(self) -> Iterable[str]:
        with contextlib.suppress(OSError):
            return list(super().load_history_strings())
        return []


class Completions(Completer):
    """Commands, then what they take: paths or the names of settings."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        if not before.startswith("/") or "\n" in before:
            return
        name, space, rest = before[1:].partition(" ")
        if not space:
            for verb in VERBS:
                if verb.name.startswith(name):
                    yield Completion(
                        f"/{verb.name}" + (" " if verb.takes else ""),
                        -len(before), f"/{verb.name} {verb.takes}".rstrip(), verb.help,
                    )  # fmt: skip
            return
        kind = next((verb.completes for verb in VERBS if verb.name == name), "")
        if kind == "settings" and " " not in rest:
            yield from (Completion(f"{setting} ", -len(rest)) for setting in KINDS if setting.startswith(rest))
        elif kind in ("pictures", "files") and (match := _FRAGMENT.search(rest)):
            yield from completed_paths(match[0], pictures=kind == "pictures")


def completed_paths(typed: str, *, pictures: bool) -> Iterator[Completion]:
    """What the start of a path may become, escaped as in a shell; folders, and files or only pictures."""
    plain = re.sub(r"\\(.)", r"\1", typed)
    folder, _, start = plain.rpartition("/")
    try:
        place = Path(folder + "/" if "/" in plain else ".").expanduser()
        entries = sorted(place.iterdir())
    except (OSError, RuntimeError):  # no such folder, or not ours; no such user
        return
    for entry in entries:
        if not entry.name.startswith(start) or (entry.name.startswith(".") and not start):
            continue
        if entry.is_dir():
            rest = entry.name[len(start) :] + "/"
        elif not pictures or entry.suffix.lower() in SUFFIXES:
            rest = entry.name[len(start) :]
        else:
            continue
        yield Completion(_SPECIAL.sub(r"\\\1", rest), 0, entry.name + ("/" if rest.endswith("/") else ""))

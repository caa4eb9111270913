"""The line that a person types on: history, completion, several lines, and a word on how the model is doing."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPress, KeyPressEvent
from prompt_toolkit.styles import Style

from ...visible import one_line
from .history import private_history
from .keyboard import Keyboard
from .lines import SUFFIXES
from .loading import Loading
from .settings import NAMES
from .signals import held, leave_by
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
            history=private_history(history),
            completer=Completions(),
            complete_while_typing=Condition(lambda: " " not in self._prompt.default_buffer.text),  # paths: with Tab
            key_bindings=self._keys(),
            bottom_toolbar=self._toolbar,
            placeholder=self._placeholder,
            style=_STYLE,
            reserve_space_for_menu=5,
            enable_suspend=True,
        )
        place: Any = self._prompt.app.input
        self._keyboard = Keyboard(place.vt100_parser.feed_key_callback)
        place.vt100_parser = self._keyboard

    def ask(self, default: str = "", typed: bytes = b"") -> str:
        """One entry, which may be of several lines.

        Args:
            typed: keys that were pressed before.

        Raises:
            KeyboardInterrupt: Ctrl-C where nothing was typed, nor a default changed.
            EOFError: Ctrl-D there, or the terminal is gone.
            Gemma3Error: the model could not be loaded.
            Leave: by a signal.
        """
        self._given = default
        if typed:
            keys: list[KeyPress] = []
            parser = Keyboard(keys.append)
            parser.feed(typed.decode("utf-8", "replace"))
            parser.end_paste()
            parser.flush()
            store_typeahead(self._prompt.app.input, keys)

        app, loop = self._prompt.app, None

        def begin() -> None:
            nonlocal loop
            loop = asyncio.get_running_loop()
            app.create_background_task(self._watch())
            finish()

        def finish() -> None:
            if signals and app.future is not None and not app.future.done():
                app.exit(exception=KeyboardInterrupt())

        # A signal must not fall into the middle of the prompt's work: it ends the prompt as a key would.
        with held(lambda: loop and loop.call_soon_threadsafe(finish)) as signals:
            try:
                line = self._prompt.prompt(default=default, pre_run=begin)
            except (Exception, KeyboardInterrupt):  # where the signal says that the terminal is gone: of any kind
                if not signals:
                    raise
        for number in signals:
            if number != signal.SIGINT:
                leave_by(number)
        if signals:
            raise KeyboardInterrupt
        return line

    async def _watch(self) -> None:
        """Show that the model is ready, or end the prompt when there will be none. End a paste that has no end."""
        app, told, held = self._prompt.app, False, -1
        while True:
            if self._loading.ended() and not told:
                told = True
                if self._loading.failure is not None and not app.is_done:
                    app.exit(exception=self._loading.failure)
                app.invalidate()
            length = self._keyboard.pasted()
            if length >= 0 and length == held:  # the terminal has sent no more of it in the meantime
                self._keyboard.end_paste()
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
            yield from (Completion(f"{setting} ", -len(rest)) for setting in NAMES if setting.startswith(rest))
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

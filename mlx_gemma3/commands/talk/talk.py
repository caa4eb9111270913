"""One conversation at a terminal: its turns and pictures, the settings of its answers, the file that keeps it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import OutputError, PromptError
from .lines import Said
from .loading import Loading
from .screen import Screen
from .settings import Settings
from .tools import MOST_ROUNDS, Tools

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...runtime.engine import Engine, Session
    from ...runtime.events import Usage
    from ...runtime.options import OptionValues
    from ...runtime.stream import Stream


@dataclass(frozen=True)
class Attached:
    """A picture for a question."""

    name: str
    image: Image  # decoded once, here
    place: str | None = None  # its path or address; None from the clipboard


@dataclass
class Asked:
    """A question that was answered."""

    text: str
    pictures: list[Attached] | None  # None: those of a saved conversation, which are not here any more
    found: bool = False  # what tools found, not what the person asked


@dataclass
class ChatState:
    """The state that the commands work on."""

    loading: Loading
    screen: Screen
    settings: Settings
    system: str | None = None
    file: Path | None = None  # where the conversation is kept
    adapter: str | None = None  # that answers are written with
    pictures: list[Attached] = field(default_factory=list)  # for the next question
    turns: list[Asked] = field(default_factory=list)
    prefill: str = ""  # stands at the next prompt
    editing: bool = False  # the next question takes the place of the last one
    usage: Usage | None = None  # of the last answer
    stopped: bool = False  # the last thing that happened was Ctrl-C
    failed: bool = False  # something went wrong on the way
    changed: bool = False  # since it was saved
    ended: bool = False  # /quit
    tools: Tools | None = None
    rounds: int = 0  # of calls since the person said something
    _session: Session | None = None

    @property
    def engine(self) -> Engine:
        return self.loading.loaded[0]

    @property
    def session(self) -> Session:
        if self._session is None:
            engine, session = self.loading.loaded
            for text in engine.about["notes"]:
                self.screen.note(f"note: {text}")
            self.take(session)
            assert self._session is not None
        return self._session

    def take(self, session: Session) -> None:
        """Go on with this conversation."""
        self._session, self.usage, self.changed = session, None, False
        self.turns, self.editing = [], False
        for message in session.messages:
            if message["role"] == "user":
                texts = [item["text"] for item in message["content"] if item["type"] == "text"]
                self.turns.append(Asked("".join(texts), None if len(message["content"]) > len(texts) else []))
            elif message["role"] == "system":
                self.system = message["content"]

    def ready(self) -> bool:
        """Wait for the model. False when Ctrl-C ended the waiting.

        Raises:
            Gemma3Error: it could not be loaded.
        """
        if not self.loading.ended() and not self.screen.wait(self.loading.ended, f"loading {self.loading.model}"):
            self.stopped = True
            self.screen.note(f"{self.loading.model} is not loaded yet · Ctrl-C again leaves")
            return False
        _ = self.session
        return True

    def say(self, said: Said) -> None:
        """Take what was typed: attach its pictures, ask its words."""
        for path in said.pictures:
            self.attach(path)
        alone = not said.text and bool(said.pictures) and self.ready() and "translates" in self.engine.about
        if not said.text and not alone:
            return
        if not self.ready():
            self.prefill = said.text
            return
        text, pictures = said.text, self.pictures
        if self.editing:
            before = self.undo().pictures
            assert before is not None, "/edit does not begin without them"
            pictures, self.editing = [*before, *pictures], False
        self.pictures, self.rounds = [], 0
        sources = [picture.image for picture in pictures]
        self._answer(Asked(text, pictures), self.session.send(text, images=sources, **self._options))

    def retry(self) -> None:
        """Answer the last question once more."""
        turn = self.last("/retry")
        self.turns.pop()
        self._answer(turn, self.session.retry(**self._options))

    def undo(self) -> Asked:
        """Forget the last question and its answer."""
        while True:
            turn = self.last("/undo")
            self.session.undo()
            self.turns.pop()
            self.changed = True
            if not turn.found:
                return turn

    def last(self, command: str) -> Asked:
        """The last question. Raises PromptError when there is none."""
        if not self.turns:
            raise PromptError(command, got="no question yet", want="one to go back to")
        return self.turns[-1]

    def _answer(self, turn: Asked, stream: Stream) -> None:
        """Show an answer. A question that got none is taken back and stands at the next prompt."""
        self.changed = True
        with stream:
            end = self.screen.follow(stream)
        if end["kind"] == "error":
            self.failed = True
            self.screen.error(end["message"])
            self._take_back(turn)
            if end["code"] in ("image", "prompt"):  # they would be refused again
                self.pictures = []
            return
        self.usage = end["usage"]
        self.stopped = end["finish_reason"] == "cancelled"
        if self.stopped and not end["text"]:
            self._take_back(turn)
            self.screen.note("stopped before the first word: the question is yours again · Ctrl-C again leaves")
            return
        self.turns.append(turn)
        if self.stopped:
            self.screen.note("stopped; what was said is kept · Ctrl-C again leaves")
        elif end["finish_reason"] == "length":
            self.screen.note("the answer was cut at its limit: say “go on”, or /set max_tokens 4096")
        elif (calls := end.get("tool_calls")) and self.tools is not None:
            self.rounds += 1
            if self.rounds > MOST_ROUNDS:
                self.screen.note(f"the model asked for tools {MOST_ROUNDS} times in a row: say what it should do")
                return
            results = self.tools.results(calls)
            self._answer(Asked("", [], found=True), self.session.send(results, **self._options))

    @property
    def _options(self) -> OptionValues:
        if self.tools is None:
            return self.settings.values
        return {**self.settings.values, "tools": self.tools.functions}

    def _take_back(self, turn: Asked) -> None:
        if sum(message["role"] == "user" for message in self.session.messages) > len(self.turns):
            self.session.undo()
        self.prefill, self.pictures = turn.text, turn.pictures or []

    def attach(self, source: str | Path) -> None:
        """A picture for the next question: a path, or an address, which is fetched now.

        Raises:
            PromptError, ImageError: it cannot be fetched or read.
        """
        from ...prompt.address import opened, remote
        from ...prompt.images import load_image

        if remote(source):
            self.screen.note("fetching the picture …")
        content, called = opened(source)
        image = load_image(content, name=called)
        if isinstance(content, Path):
            with suppress(RuntimeError):  # `~` of a user who is not there
                content = content.expanduser()
            picture = Attached(content.name, image, str(content.absolute()))
        else:
            address = source if isinstance(source, str) and remote(source) else None
            name = address.partition("?")[0].rstrip("/").rpartition("/")[2] if address else "a picture"
            picture = Attached(name, image, address)
        self.pictures.append(picture)
        self.screen.note(f"picture {len(self.pictures)}: {picture.name}, {image.width} × {image.height}")

    def new(self) -> None:
        """Begin a conversation with the system text of now."""
        self.take(self.engine.session(system=self.system, adapter=self.adapter))

    def save(self, file: Path | None = None) -> Path | None:
        """Write the conversation to a file, or to the one that keeps it; None when there is nothing to write."""
        target = file or self.file
        if target is None or (file is None and not self.changed):
            return None
        self.session.save(target, replace=file is not None)
        self.changed = False
        return target

    def save_or_beside(self) -> None:
        """As `save`, at the end: where the file may not be replaced, under the first free name beside it."""
        try:
            self.save()
        except OutputError as error:
            assert self.file is not None
            beside = next(
                place
                for number in itertools.count(2)
                if not os.path.lexists(place := self.file.with_name(f"{self.file.stem}-{number}{self.file.suffix}"))
            )
            try:
                self.session.save(beside, replace=False)
            except OutputError:
                raise error from None
            self.screen.error(f"{error}; this conversation was saved as {beside}")

    def messages(self) -> list[dict[str, Any]]:
        """As plain messages; a picture from a file says its path."""
        turns = iter(self.turns)
        return [
            message | {"content": _placed(message["content"], next(turns))} if message["role"] == "user" else message
            for message in self.session.messages
        ]


def _placed(content: Sequence[dict[str, Any]], turn: Asked) -> list[dict[str, Any]]:
    """The items of a user's message, their paths added."""
    paths = iter([picture.place for picture in turn.pictures or []])
    items = []
    for item in content:
        path = next(paths, None) if item["type"] == "image" else None
        items.append(item | {"path": path} if isinstance(path, str) else item)
    return items

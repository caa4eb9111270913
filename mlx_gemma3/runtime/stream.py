"""An answer on its way: what the engine's thread puts in, what any thread takes out."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

from ..errors import Gemma3Error
from .options import Options
from .session import Conversation

Messages = Sequence[dict[str, Any]]
Picture = Any  # a path, the bytes of a file, or a PIL image


class Piece(NamedTuple):
    """Some text of an answer and the ids behind it."""

    text: str
    tokens: list[int]


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    text: str
    tokens: list[int]  # as generated, the one that ended the answer included
    finish_reason: str  # "stop" | "length" | "cancelled"
    usage: dict[str, Any]


@dataclass(eq=False)
class Request:
    """What a stream and the engine's thread share."""

    prompt: str | Messages | None  # None: answer the last turn of the conversation again
    images: Sequence[Picture]
    options: Options
    conversation: Conversation | None = None  # None: the prompt is all there is
    events: queue.SimpleQueue[dict[str, Any]] = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    error: Gemma3Error | None = None

    def fail(self, error: Gemma3Error) -> None:
        self.error = error
        self.events.put({"kind": "error", "code": error.code, "message": str(error)})


class Stream:
    """One answer on its way. Iterate it, or poll `next`; usable from any thread, by one reader at a time."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._end: dict[str, Any] | None = None
        weakref.finalize(self, request.cancelled.set)  # a stream that nobody holds any more frees the engine

    def next(self, timeout: float | None = None) -> dict[str, Any]:
        """The next event, as a dict of plain types.

        {"kind": "text", "text", "tokens"} · {"kind": "pending"}: nothing within `timeout` seconds, or progress
        ("stage", "done", "total") · {"kind": "done", "text", "tokens", "finish_reason", "usage"} · {"kind": "error",
        "code", "message"}. The last two end the stream and are given again when asked again.
        """
        if self._end is not None:
            return self._end
        try:
            event = self._request.events.get(timeout=timeout)
        except queue.Empty:
            return {"kind": "pending"}
        if event["kind"] == "text":
            self._texts.append(event["text"])
            self._tokens += event["tokens"]
        elif event["kind"] == "done":
            self._tokens += event["tokens"]
            event = event | {"text": "".join(self._texts), "tokens": list(self._tokens)}
        if event["kind"] in ("done", "error"):
            self._end = event
        return event

    def __iter__(self) -> Iterator[Piece]:
        """Yield pieces of text until the answer ends.

        Raises:
            Gemma3Error: what an error event would say.
        """
        while True:
            event = self.next()
            if event["kind"] == "text":
                yield Piece(event["text"], event["tokens"])
            elif event["kind"] == "done":
                return
            elif event["kind"] == "error":
                self.raise_error()

    def raise_error(self) -> None:
        """Raise what the error event told, if there was one."""
        if self._request.error is not None:
            raise self._request.error

    @property
    def reply(self) -> Reply:
        """The whole answer; reads the stream to its end if it is not there yet."""
        for _ in self:
            pass
        assert self._end is not None
        end = self._end
        return Reply(end["text"], end["tokens"], end["finish_reason"], end["usage"])

    def cancel(self) -> None:
        """End the answer after the token or prefill chunk in work. Any thread, any number of times."""
        self._request.cancelled.set()

    def close(self) -> None:
        """Cancel; what was not read is dropped."""
        self.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

"""An answer on its way: what the side that answers puts in, what any thread takes out.

Knows nothing of MLX: the engine's thread fills a channel, or a worker process does (worker/client.py).
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

from ..boundary.arguments import takes
from ..errors import ClosedError, Gemma3Error, OptionError
from .events import Event, TokenLogprob, ToolCall, Usage

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
    finish_reason: str  # "stop" | "length" | "cancelled" | "tool_calls"
    usage: Usage
    logprobs: list[TokenLogprob] | None = None  # one for each of `tokens`, when they were asked for
    prompt_logprobs: list[TokenLogprob | None] | None = None  # and of the prompt's; of its first there is none
    # Of an answer in a form that is whole: JSON's value or an instance of the schema's class; the text of other forms.
    parsed: Any = None
    tool_calls: list[ToolCall] = field(default_factory=list)  # what it asks for; `text` is what was said beside them
    thinking: str = ""  # what it thought before it answered (MedGemma); no part of `text`


def check_process(loaded_in: int) -> None:
    """Raise ClosedError in a process that was forked from the one with this id: a fork has none of its threads."""
    if os.getpid() != loaded_in:
        raise ClosedError(
            "engine",
            got="a process that was forked after the engine was loaded",
            want="a process that loads its own",
            do='start processes by "spawn", or let a worker answer (mlx_gemma3.worker.client)',
        )


_NOTHING: Event = {"kind": "pending"}
_END = Piece("", [])  # told apart by identity: after the last piece


class _Flag:
    """Raised once. A stream's finalizer holds it, and nothing that could hold the stream."""

    def __init__(self) -> None:
        self.raised = False

    def __call__(self) -> None:
        self.raised = True


class Channel:
    """What a stream and the side that answers it share. Takes no locks of its own: garbage collection may cancel."""

    def __init__(self, schema: Any = None) -> None:
        """schema: what a parsed answer is to be an instance of, if it is a class."""
        self.schema = schema
        self.unwanted = _Flag()  # cancelled, or nobody holds its stream any more: garbage collection may raise it
        self.error: Gemma3Error | None = None
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._listener: Callable[[], None] | None = None
        self._process = os.getpid()

    def put(self, event: Event) -> None:
        """Add an event; "done" or "error" is the last. Any thread."""
        self._events.put(event)
        if (listener := self._listener) is not None:
            listener()

    def fail(self, error: Gemma3Error) -> None:
        """End with an error."""
        self.error = error
        self.put({"kind": "error", "code": error.code, "message": str(error)})

    def get(self, timeout: float | None) -> Event | None:
        """Take the next event; None when none came within `timeout` seconds. None as timeout: wait for ever."""
        try:
            check_process(self._process)
        except ClosedError as error:  # nobody fills it here
            self.error = error
            return {"kind": "error", "code": error.code, "message": str(error)}
        try:
            if timeout is None:
                return self._events.get()
            return self._events.get(timeout=min(max(timeout, 0), threading.TIMEOUT_MAX))
        except queue.Empty:
            return None

    def instance(self, parsed: Any) -> Any:
        """A parsed answer as its asker's own type.

        Raises:
            OptionError: the type's own checks refuse it.
        """
        kind = self.schema
        if parsed is None or not isinstance(kind, type):
            return parsed
        from ..grammar.hints import instance, is_model  # nobody else waits for it

        if not is_model(kind):
            return parsed
        try:
            return instance(kind, parsed)
        except Exception as error:
            got = f"an answer that its own checks refuse ({error})"
            raise OptionError(f"schema {kind.__name__}", got=got, want="one they take") from None

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Call this after each event that is added, in the thread that adds it; None: call nothing."""
        self._listener = listener

    def cancel(self) -> None:
        """End the answer as soon as can be."""
        self.unwanted()

    @property
    def cancelled(self) -> bool:
        return self.unwanted.raised


class Stream:
    """One answer on its way. Iterate it, `async for` it, or poll `next`; usable from any thread."""

    def __init__(self, channel: Channel, owner: object = None) -> None:
        """owner: what must live as long as the answer does."""
        self._channel, self._owner = channel, owner
        self._end: Event | None = None
        weakref.finalize(self, channel.unwanted).atexit = False

    @takes(timeout="number")
    def next(self, timeout: float | None = None) -> Event:
        """The next event, as a dict of plain types.

        {"kind": "text", "text", "tokens"} · {"kind": "thinking", "text", "tokens"}: what the model thinks before it
        answers · {"kind": "tool_call", "index", "call_id", "name", "arguments"}: a piece
        of a call · {"kind": "pending"}: nothing within `timeout` seconds, or progress ("stage", "done", "total") ·
        {"kind": "done", "text", "tokens", "finish_reason", "usage"} · {"kind": "error", "code", "message"}. The
        last two end the stream and are given again when asked again.
        """
        if self._end is not None:
            return self._end
        event = self._channel.get(timeout)
        if event is None:
            return {"kind": "pending"}
        if event["kind"] in ("done", "error"):
            self._end, self._owner = event, None
            self._channel.put(event)  # for another thread that waits here
        return event

    def __iter__(self) -> Iterator[Piece]:
        """Yield pieces of text until the answer ends.

        Raises:
            Gemma3Error: what an error event would say.
        """
        while (piece := self.piece(self.next())) is not _END:
            if piece is not None:
                yield piece

    def __aiter__(self) -> AsyncStream:
        return AsyncStream(self)

    def piece(self, event: Event) -> Piece | None:
        """What iteration makes of an event: a piece, None for nothing yet, _END. Raises what an error event tells."""
        if event["kind"] == "text":
            return Piece(event["text"], event["tokens"])
        if event["kind"] == "error":
            self.raise_error()
        return _END if event["kind"] == "done" else None

    def raise_error(self) -> None:
        """Raise what the error event told, if there was one."""
        if self._channel.error is not None:
            raise self._channel.error

    @property
    def reply(self) -> Reply:
        """The whole answer; reads the stream to its end if it is not there yet."""
        for _ in self:
            pass
        end = self._end
        assert end is not None and end["kind"] == "done", end
        return Reply(
            end["text"],
            end["tokens"],
            end["finish_reason"],
            end["usage"],
            end.get("logprobs"),
            end.get("prompt_logprobs"),
            self._channel.instance(end.get("parsed")),
            end.get("tool_calls", []),
            end.get("thinking", ""),
        )

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Call this whenever an event has come, in the engine's thread, which waits for it; None: call nothing."""
        self._channel.listen(listener)

    def cancel(self) -> None:
        """End the answer after the token or prefill chunk in work. Any thread, any number of times."""
        self._channel.cancel()

    def close(self) -> None:
        """Cancel; what was not read is dropped."""
        self.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class AsyncStream:
    """The same for asyncio: waits without polling and without holding up the loop.

    For one task at a time. Cancelling the task that waits for it cancels the answer.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    async def next(self) -> Event:
        """The next event, as of `Stream.next`; never an empty "pending"."""
        import asyncio  # 40 ms that most programs need not wait for

        loop = asyncio.get_running_loop()

        def wake(arrived: asyncio.Future[None]) -> None:
            if not arrived.done():
                arrived.set_result(None)

        while (event := self._stream.next(timeout=0)) == _NOTHING:
            arrived = loop.create_future()

            def tell(arrived: asyncio.Future[None] = arrived) -> None:
                with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                    loop.call_soon_threadsafe(wake, arrived)

            self._stream.listen(tell)
            try:
                if (event := self._stream.next(timeout=0)) != _NOTHING:
                    break  # it came before there was a listener
                await arrived
            except asyncio.CancelledError:
                self.cancel()
                raise
            finally:
                self._stream.listen(None)
        return event

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Piece:
        """Raises Gemma3Error: what an error event would say."""
        while (piece := self._stream.piece(await self.next())) is None:
            pass
        if piece is _END:
            raise StopAsyncIteration
        return piece

    async def reply(self) -> Reply:
        """The whole answer; reads the stream to its end if it is not there yet."""
        async for _ in self:
            pass
        return self._stream.reply

    def cancel(self) -> None:
        """As `Stream.cancel`."""
        self._stream.cancel()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.cancel()

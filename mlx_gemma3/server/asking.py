"""A request of any dialect → the engine's streams, and their events for whoever waits."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from ..errors import ContextError, DeviceLost, Gemma3Error
from ..prompt import tools
from ..runtime.events import DoneEvent, Event, PendingEvent, Usage
from ..runtime.stream import Stream
from .metrics import Metrics
from .models import Model, Models
from .pictures import fetched
from .settings import Settings
from .turns import goes_on, merged

PING_SECONDS = 10.0
PATIENCE = 5.0  # seconds in which an error still becomes the status of the answer


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is asked for: the engine's one request."""

    model: str | None
    prompt: Any  # a text or token ids to complete, or messages as the client sent them
    options: Mapping[str, Any] = field(default_factory=dict)  # of Engine.stream; None is the default
    n: int = 1
    chat: bool = True  # whether `prompt` are messages


class Service:
    """What every dialect answers with."""

    def __init__(self, settings: Settings, models: Models, metrics: Metrics) -> None:
        self.settings, self.models, self.metrics = settings, models, metrics
        self.lost: Callable[[], None] = lambda: None  # called when the GPU takes no more work

    async def begin(self, *asks: Ask) -> Running:
        """Start the answers. Returns when nothing is wrong with the prompts, or after a few seconds.

        Args:
            asks: of one model.

        Raises:
            Gemma3Error: what is wrong.
        """
        model = self.models.find(asks[0].model)
        running = Running(model, self.metrics, self.lost)
        try:
            with self.models.using(model):
                engine = await self.models.engine(model)
                for ask in asks:
                    prompt, options = await self._prepared(ask, running, "own_template" in engine.about)
                    running.streams += await asyncio.to_thread(engine.streams, prompt, n=ask.n, **options)
                running.enter(self.models)
            await running.settle()
        except BaseException as error:
            if isinstance(error, DeviceLost):
                self.lost()
            running.close()
            raise
        return running

    async def count(self, ask: Ask) -> int:
        """Tokens of a prompt. Raises Gemma3Error."""
        model = self.models.find(ask.model)
        with self.models.using(model):
            engine = await self.models.engine(model)
            own = "own_template" in engine.about
            prompt, options = await self._prepared(ask, Running(model, self.metrics, self.lost), own)
            return await asyncio.to_thread(engine.count_tokens, prompt, **options)

    async def _prepared(self, ask: Ask, running: Running, own: bool) -> tuple[Any, dict[str, Any]]:
        """A prompt and the options of its answer; turns are only merged where they are written as Gemma 3's."""
        options = {name: value for name, value in ask.options.items() if value is not None}
        options.setdefault("max_tokens", self.settings.max_tokens)
        if running.model.adapter is not None:
            options["adapter"] = running.model.adapter
        if not ask.chat:
            self._log(ask.prompt)
            return ask.prompt, {"raw": True, **options} if isinstance(ask.prompt, str) else options
        said = ask.prompt if own else tools.plain(ask.prompt)
        said = await asyncio.to_thread(fetched, said, self.settings, lambda: not running.closed, own=own)
        if not own:
            said = merged(said)
        self._log(said)
        if goes_on(said):
            options["continue_final_message"] = True
        return said, options

    def _log(self, prompt: Any) -> None:
        """On stderr, when that was asked for; pictures by their size."""
        if self.settings.log_prompts:
            sys.stderr.write(json.dumps({"prompt": prompt}, default=lambda data: f"{len(data)} bytes") + "\n")
            sys.stderr.flush()


class Running:
    """Answers on their way. Close it in the end: what is not finished then is cancelled."""

    def __init__(self, model: Model, metrics: Metrics, lost: Callable[[], None]) -> None:
        self.model, self.closed, self._lost = model, False, lost
        self.streams: list[Stream] = []
        self.done: dict[int, DoneEvent] = {}
        self._metrics, self._early = metrics, list[tuple[int, Event]]()
        self._used = ExitStack()
        self._events: Iterator[tuple[int, Event] | None] = self._merged()

    def enter(self, models: Models) -> None:
        """From now on the model is in use."""
        self._used.enter_context(models.using(self.model))
        self._used.enter_context(self._metrics.answering(len(self.streams)))

    async def settle(self) -> None:
        """Wait until a prompt is read or something was said, for a few seconds at most. Raises Gemma3Error."""
        until = asyncio.get_running_loop().time() + PATIENCE
        while (left := until - asyncio.get_running_loop().time()) > 0:
            found = await self._next(left)
            if found is None:
                return
            self._early.append(found)
            if found[1]["kind"] != "pending" or found[1].get("stage") == "prompt":
                return

    async def events(self) -> AsyncIterator[tuple[int, Event] | None]:
        """(which answer, event) in the order in which they come; None when nothing came for a while.

        Raises:
            Gemma3Error: what an error event would say.
        """
        for early in self._early:
            yield early
        while len(self.done) < len(self.streams):
            yield await self._next(PING_SECONDS)

    async def replies(self) -> list[DoneEvent]:
        """The last events of all answers. Raises Gemma3Error."""
        async for _ in self.events():
            pass
        return [self.done[index] for index in range(len(self.streams))]

    def close(self) -> None:
        """Cancel what is not finished."""
        if self.closed:
            return
        self.closed = True
        for stream in self.streams:
            stream.listen(None)
            stream.close()
        for done in self.done.values():
            self._metrics.answered(done["usage"], done["finish_reason"])
        self._metrics.cancelled(len(self.streams) - len(self.done))
        self._used.close()

    async def _next(self, seconds: float) -> tuple[int, Event] | None:
        """The next event of any stream; None when none came in so many seconds."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        arrived = asyncio.Event()

        def tell() -> None:
            try:
                loop.call_soon_threadsafe(arrived.set)
            except RuntimeError:  # the loop was closed: nobody waits any more
                return

        for stream in self.streams:
            stream.listen(tell)
        while True:
            arrived.clear()
            if (found := next(self._events)) is not None:
                return found
            try:
                async with asyncio.timeout_at(until):  # wait_for of Python 3.11 may lose a cancellation
                    await arrived.wait()
            except TimeoutError:
                return None

    def _merged(self) -> Iterator[tuple[int, Event] | None]:
        """Takes turns between the streams; None where none of them has anything."""
        while True:
            nothing = True
            for index, stream in enumerate(self.streams):
                if index in self.done or (event := stream.next(timeout=0)) == {"kind": "pending"}:
                    continue
                nothing = False
                if event["kind"] == "error":
                    if event["code"] == DeviceLost.code:
                        self._lost()
                    stream.raise_error()
                if event["kind"] == "done":
                    self.done[index] = event
                yield index, event
            if nothing:
                yield None

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids, control tokens by their names."""
        engine = self.model.engine
        return "" if engine is None else engine.tokenizer.decode(tokens)

    def first_token(self, prompt: str | list[int]) -> str:
        """The text of a completed prompt's first token: a text begins with <bos>."""
        engine = self.model.engine
        if engine is None:
            return ""
        return self.decode(engine.tokenizer.encode("", bos=True) if isinstance(prompt, str) else prompt[:1])

    @property
    def usage(self) -> Usage:
        """Of all answers together: their prompt is counted once."""
        usages = [done["usage"] for done in self.done.values()]
        total = usages[0].copy()
        total["completion_tokens"] = sum(usage["completion_tokens"] for usage in usages)
        return total


def reading(event: PendingEvent) -> str:
    """How far a prompt is, in words for a comment between events; empty where there is nothing to say."""
    if "stage" not in event:
        return ""
    word = {"prompt": "reading", "pictures": "pictures", "download": "downloading"}[event["stage"]]
    return f"{word} {event['done']}/{event['total']}"


def status_of(error: Gemma3Error) -> int:
    """The HTTP status that says what kind of error it is."""
    statuses = {
        "not_found": 404, "busy": 429, "memory": 503, "device": 500, "device_lost": 503, "closed": 503, "gated": 403,
        "offline": 503, "source": 500, "config": 500, "checkpoint": 500, "tokenizer": 500, "error": 500,
    }  # fmt: skip
    return 400 if isinstance(error, ContextError) else statuses.get(error.code, 400)

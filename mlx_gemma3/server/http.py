"""Bodies in, answers out: what all dialects share of HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import RequestError

T = TypeVar("T")
M = TypeVar("M", bound="Body")


class TooLarge(RequestError):
    """A body beyond the limit: status 413."""


class Body(BaseModel):
    """A request's body. A field that is not listed is refused unless it stands in `_harmless`, or says nothing."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, protected_namespaces=())

    def check(self, harmless: frozenset[str]) -> None:
        """Refuse fields that nobody knows here and that might change the answer.

        Args:
            harmless: fields that cannot.

        Raises:
            RequestError
        """
        for name, value in (self.__pydantic_extra__ or {}).items():
            if name not in harmless and value not in (None, False, [], {}, ""):
                raise RequestError(name, got="a field that this server does not know", want="none of that name")


async def body(request: Request, kind: type[M], harmless: frozenset[str] = frozenset()) -> M:
    """The request's JSON as `kind`.

    Raises:
        RequestError: no JSON, a field that is missing, wrong or unknown.
        TooLarge: more bytes than allowed.
    """
    most = request.app.state.service.settings.max_body_bytes
    content = bytearray()
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > most:
        raise TooLarge("body", got=f"{said} bytes", want=f"at most {most} (--max-body)")
    async for piece in request.stream():
        content += piece
        if len(content) > most:
            raise TooLarge("body", got="more bytes than that", want=f"at most {most} (--max-body)")
    try:
        values = json.loads(bytes(content))
    except (ValueError, RecursionError) as error:
        raise RequestError("body", got=f"no JSON ({error})", want="a JSON object") from None
    if not isinstance(values, dict):
        raise RequestError("body", got=type(values).__name__, want="a JSON object")
    try:
        found = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"] if not isinstance(part, int) or len(first["loc"]) < 4)
        raise RequestError(where or "body", got=_short(first.get("input")), want=first["msg"]) from None
    found.check(harmless)
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do some work, and give it up when the client goes away (ClientDisconnect)."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class JSON(Response):
    """A JSON object in ASCII: what is no Unicode in a client's text stays what it is."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


async def answered(
    request: Request,
    close: Callable[[], None],
    whole: Callable[[], Coroutine[Any, Any, Any]],
    pieces: AsyncIterator[bytes] | None,
    media_type: str = "text/event-stream",
) -> Response:
    """The answer in pieces where there are any, else as one object; given up when the client goes away.

    Args:
        close: called in the end, whatever that was.
        whole: makes the object.
    """
    if pieces is not None:
        return Flow(pieces, media_type, close)
    try:
        return JSON(await until_gone(request, whole()))
    finally:
        close()


class Flow(Response):
    """Pieces as they come. Ends its source when the client goes away; a client that reads slowly is waited for."""

    def __init__(self, source: AsyncIterator[bytes], media_type: str, close: Callable[[], None]) -> None:
        """close: called in the end, also where nothing was ever sent."""
        super().__init__(media_type=media_type, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._source, self._close = source, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump, gone = asyncio.ensure_future(self._pump(send)), asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            for one in (pump, gone):
                if not one.done():
                    one.cancel()
            await asyncio.gather(pump, gone, return_exceptions=True)
            self._close()

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._source) as source:  # type: ignore[type-var]
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            with suppress(OSError):  # the client went away while we wrote
                async for piece in source:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})


def sse(data: Any, event: str | None = None) -> bytes:
    """One server-sent event."""
    head = "" if event is None else f"event: {event}\n"
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return f"{head}data: {text}\n\n".encode()


def comment(text: str) -> bytes:
    """A line that clients of server-sent events pass over."""
    return f": {text}\n\n".encode()


def line(data: Any) -> bytes:
    """One line of NDJSON."""
    return json.dumps(data, separators=(",", ":")).encode() + b"\n"

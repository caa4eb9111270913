"""OpenAI's /v1/responses: typed events, and answers that are kept so that a next one can follow them.

Source: https://platform.openai.com/docs/api-reference/responses.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from ..errors import Gemma3Error, RequestError
from ..runtime.events import DoneEvent, ToolCall, ToolCallEvent, Usage
from .asking import Ask, Running, Service, reading
from .forms import answer_form, from_responses, openai_calls, tool_options
from .http import JSON, Body, answered, body, comment, sse, until_gone
from .openai import failure

_HARMLESS = frozenset(
    {
        "user", "metadata", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
        "include", "reasoning", "stream_options", "max_tool_calls", "client_metadata",
    }
)  # fmt: skip
_KEPT_BYTES = 256 << 20
_ITEMS = (None, "message", "function_call", "function_call_output")


class Text(Body):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponseRequest(Body):
    model: str | None = None
    input: str | list[Any]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    background: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    truncation: str | None = None
    text: Text | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    def said(self) -> list[Any]:
        """The messages of this turn."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        made = []
        for number, item in enumerate(self.input, start=1):
            if not isinstance(item, dict) or item.get("type") not in _ITEMS:
                kind = item.get("type") if isinstance(item, dict) else type(item).__name__
                if kind == "reasoning":  # what other models thought
                    continue
                raise RequestError(f"input, item {number}", got=kind, want="a message, a call or its output")
            called = "call_id" in item
            made.append(item if called else {key: item[key] for key in ("role", "content") if key in item})
        return from_responses(made)


@dataclass
class _Kept:
    """A response and the messages that led to it."""

    response: dict[str, Any]
    messages: list[Any]
    nbytes: int


class Kept:
    """The responses that are kept, the oldest dropped when they take too much."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._nbytes = 0

    def put(self, response: dict[str, Any], messages: list[Any]) -> None:
        kept = _Kept(response, messages, _size(messages) + _size(response))
        self._kept[response["id"]] = kept
        self._nbytes += kept.nbytes
        while self._nbytes > _KEPT_BYTES and len(self._kept) > 1:
            self._nbytes -= self._kept.popitem(last=False)[1].nbytes

    def get(self, name: str) -> _Kept:
        """Raises RequestError: none of that name."""
        if name not in self._kept:
            raise RequestError("previous_response_id", got=name, want="a response that is kept here")
        return self._kept[name]

    def drop(self, name: str) -> None:
        self._nbytes -= self.get(name).nbytes
        del self._kept[name]


def _size(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_size(key) + _size(inner) for key, inner in value.items())
    if isinstance(value, list):
        return sum(map(_size, value))
    return sys.getsizeof(value)


async def responses(request: Request) -> Response:
    """POST /v1/responses"""
    service: Service = request.app.state.service
    asked = await body(request, ResponseRequest, _HARMLESS)
    if asked.background:
        raise RequestError("background", got=True, want="false: answers are waited for")
    kept: Kept = request.app.state.kept
    before = kept.get(asked.previous_response_id).messages if asked.previous_response_id else []
    messages = [*before, *asked.said()]
    if not messages:
        raise RequestError("input", got="nothing", want="a text or messages")
    system = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    options = {"max_tokens": asked.max_output_tokens, "temperature": asked.temperature, "top_p": asked.top_p or None}
    options |= answer_form(asked.text.format if asked.text else None, "text.format")
    options |= tool_options(asked.tools, asked.tool_choice, asked.parallel_tool_calls)
    ask = Ask(model=asked.model, prompt=[*system, *messages], options=options)
    running = await until_gone(request, service.begin(ask))
    answer = _Answer(running, asked, kept, messages)
    return await answered(request, running.close, answer.whole, answer.events() if asked.stream else None)


async def response(request: Request) -> Response:
    """GET and DELETE /v1/responses/{name}"""
    kept: Kept = request.app.state.kept
    name = request.path_params["name"]
    if request.method == "DELETE":
        kept.drop(name)
        return JSON({"id": name, "object": "response", "deleted": True})
    return JSON(kept.get(name).response)


class _Answer:
    def __init__(self, running: Running, asked: ResponseRequest, kept: Kept, messages: list[Any]) -> None:
        self._running, self._asked, self._kept, self._messages = running, asked, kept, messages
        self._id, self._item = f"resp_{secrets.token_hex(16)}", f"msg_{secrets.token_hex(16)}"
        self._created, self._number = int(time.time()), 0

    async def whole(self) -> dict[str, Any]:
        (done,) = await self._running.replies()
        return self._finished(done)

    def _finished(self, done: DoneEvent) -> dict[str, Any]:
        full = done["finish_reason"] == "length"
        calls = done.get("tool_calls", [])
        items = [self._call(at, call["id"], call["name"], call["arguments"]) for at, call in enumerate(calls)]
        found = self._response(
            "incomplete" if full else "completed", items or [self._message(done["text"], "completed")]
        )
        found["incomplete_details"] = {"reason": "max_output_tokens"} if full else None
        found["usage"] = _usage(done["usage"])
        if self._asked.store is not False:
            called = {"tool_calls": openai_calls(calls)} if calls else {}
            self._kept.put(found, [*self._messages, {"role": "assistant", "content": done["text"], **called}])
        return found

    async def events(self) -> AsyncIterator[bytes]:
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        try:
            yield self._event("response.created", response=self._response("in_progress", []))
            yield self._event("response.in_progress", response=self._response("in_progress", []))
            words = False
            async for found in self._running.events():
                event = {"kind": "pending"} if found is None else found[1]
                if event["kind"] == "text":
                    if not words:
                        words = True
                        for one in self._message_begins(place):
                            yield one
                    yield self._event("response.output_text.delta", **place, delta=event["text"], logprobs=[])
                elif event["kind"] == "tool_call":
                    yield self._call_goes_on(event)
                elif event["kind"] == "pending":
                    yield comment(reading(event) or "waiting")
            done = self._running.done[0]
            calls = done.get("tool_calls", [])
            if not words and not calls:
                for one in self._message_begins(place):
                    yield one
            for one in self._calls_end(calls) if calls else self._message_ends(place, done["text"]):
                yield one
            finished = self._finished(done)
            yield self._event(f"response.{finished['status']}", response=finished)
        except Gemma3Error as error:
            told = failure(error)["error"]
            failed = {**self._response("failed", []), "error": {"code": "server_error", "message": told["message"]}}
            yield self._event("response.failed", response=failed)

    def _event(self, kind: str, **values: Any) -> bytes:
        self._number += 1
        return sse({"type": kind, "sequence_number": self._number - 1, **values}, kind)

    def _message_begins(self, place: dict[str, Any]) -> list[bytes]:
        item = self._message(None, "in_progress")
        return [
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", **place, part=_part("")),
        ]

    def _message_ends(self, place: dict[str, Any], text: str) -> list[bytes]:
        return [
            self._event("response.output_text.done", **place, text=text, logprobs=[]),
            self._event("response.content_part.done", **place, part=_part(text)),
            self._event("response.output_item.done", output_index=0, item=self._message(text, "completed")),
        ]

    def _call_goes_on(self, event: ToolCallEvent) -> bytes:
        number = event["index"]
        if event["arguments"]:
            kind, delta = "response.function_call_arguments.delta", event["arguments"]
            return self._event(kind, item_id=self._call_id(number), output_index=number, delta=delta)
        return self._event(
            "response.output_item.added", output_index=number, item=self._call(number, event["call_id"], event["name"])
        )

    def _calls_end(self, calls: Sequence[ToolCall]) -> list[bytes]:
        events = []
        for number, call in enumerate(calls):
            item = self._call(number, call["id"], call["name"], call["arguments"])
            told = {"item_id": item["id"], "name": call["name"], "arguments": item["arguments"]}
            events += [
                self._event("response.function_call_arguments.done", output_index=number, **told),
                self._event("response.output_item.done", output_index=number, item=item),
            ]
        return events

    def _call_id(self, number: int) -> str:
        return f"fc_{self._item.removeprefix('msg_')}{number}"

    def _call(self, number: int, call: str, name: str, arguments: Any = None) -> dict[str, Any]:
        """A call's item; without arguments it is still being written."""
        return {
            "type": "function_call",
            "id": self._call_id(number),
            "call_id": call,
            "name": name,
            "arguments": "" if arguments is None else json.dumps(arguments, ensure_ascii=False),
            "status": "in_progress" if arguments is None else "completed",
        }

    def _message(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"type": "message", "id": self._item, "status": status, "role": "assistant", "content": content}

    def _response(self, status: str, output: list[Any]) -> dict[str, Any]:
        asked = self._asked
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self._running.model.name,
            "output": output,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "store": asked.store is not False,
            "temperature": asked.temperature,
            "text": {"format": (asked.text.format if asked.text else None) or {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None,
            "metadata": {},
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    prompt, written = usage["prompt_tokens"], usage["completion_tokens"]
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": usage["cached_tokens"]},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + written,
    }

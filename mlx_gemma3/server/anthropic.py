"""Anthropic's /v1/messages and /v1/messages/count_tokens.

Source: https://docs.anthropic.com/en/api/messages.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from ..errors import Gemma3Error, RequestError
from ..runtime.events import DoneEvent, Usage
from .asking import Ask, Running, Service, status_of
from .forms import answer_form, anthropic_options, from_anthropic
from .http import JSON, Body, TooLarge, answered, body, sse, until_gone

_HARMLESS = frozenset({"metadata", "service_tier", "betas", "context_management", "container", "cache_control"})
_THINKING = ("enabled", "adaptive", "disabled")  # a model that thinks does; the last leaves what it thought out
_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


class Counted(Body):
    """What makes the prompt."""

    model: str | None = None
    messages: list[dict[str, Any]] = Field(min_length=1)
    system: str | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None

    def ask(self, **options: Any) -> Ask:
        if self.thinking is not None and self.thinking.get("type") not in (None, *_THINKING):
            raise RequestError("thinking.type", got=self.thinking.get("type"), want=", ".join(_THINKING))
        options |= answer_form((self.output_config or {}).get("format"), "output_config.format")
        options |= anthropic_options(self.tools, self.tool_choice)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return Ask(model=self.model, prompt=[*system, *from_anthropic(self.messages)], options=options)


class MessagesRequest(Counted):
    max_tokens: int = Field(ge=1)
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = Field(None, ge=0)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)


def failure(error: Gemma3Error) -> dict[str, Any]:
    """An error as Anthropic's clients read it."""
    status = 413 if isinstance(error, TooLarge) else status_of(error)
    return {"type": "error", "error": {"type": _TYPES.get(status, "api_error"), "message": str(error)}}


async def messages(request: Request) -> Response:
    """POST /v1/messages"""
    service: Service = request.app.state.service
    asked = await body(request, MessagesRequest, _HARMLESS)
    ask = asked.ask(
        max_tokens=asked.max_tokens,
        stop=[one for one in asked.stop_sequences or [] if one.strip()] or None,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p or None,
    )
    running = await until_gone(request, service.begin(ask))
    answer = _Answer(running, thinks=(asked.thinking or {}).get("type") != "disabled")
    return await answered(request, running.close, answer.whole, answer.events() if asked.stream else None)


async def count_tokens(request: Request) -> Response:
    """POST /v1/messages/count_tokens"""
    service: Service = request.app.state.service
    asked = await body(request, Counted, _HARMLESS)
    return JSON({"input_tokens": await until_gone(request, service.count(asked.ask()))})


class _Answer:
    def __init__(self, running: Running, *, thinks: bool) -> None:
        self._running, self._thinks = running, thinks
        self._head: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": running.model.name,
        }

    async def whole(self) -> dict[str, Any]:
        (done,) = await self._running.replies()
        calls = done.get("tool_calls", [])
        content: list[Any] = [
            {"type": "tool_use", "id": one["id"], "name": one["name"], "input": one["arguments"]} for one in calls
        ]
        content = content or [{"type": "text", "text": done["text"]}]
        if "thinking" in done and self._thinks:
            content.insert(0, {"type": "thinking", "thinking": done["thinking"], "signature": ""})
        return {**self._head, "content": content, **_ending(done), "usage": _usage(done["usage"])}

    async def events(self) -> AsyncIterator[bytes]:
        def event(kind: str, **values: Any) -> bytes:
            return sse({"type": kind, **values}, kind)

        # How many tokens the prompt has is told at the end, when it is known.
        nothing = {"input_tokens": 0, "output_tokens": 0}
        start = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": nothing}
        try:
            yield event("message_start", message=start)
            block: dict[str, Any]
            open_block, thoughts = -1, 0  # the index of the block that is being written; of blocks that think
            async for found in self._running.events():
                if found is None or found[1]["kind"] == "pending":
                    yield event("ping")
                elif found[1]["kind"] == "thinking" and self._thinks:
                    if not thoughts:
                        thoughts, open_block = 1, 0
                        block = {"type": "thinking", "thinking": "", "signature": ""}
                        yield event("content_block_start", index=0, content_block=block)
                    delta = {"type": "thinking_delta", "thinking": found[1]["text"]}
                    yield event("content_block_delta", index=0, delta=delta)
                elif found[1]["kind"] == "text":
                    if open_block < thoughts:
                        if thoughts:
                            yield event("content_block_stop", index=0)
                        open_block = thoughts
                        block = {"type": "text", "text": ""}
                        yield event("content_block_start", index=open_block, content_block=block)
                    delta = {"type": "text_delta", "text": found[1]["text"]}
                    yield event("content_block_delta", index=open_block, delta=delta)
                elif found[1]["kind"] == "tool_call":
                    call = found[1]
                    if not call["arguments"]:
                        if open_block >= 0:
                            yield event("content_block_stop", index=open_block)
                        open_block = call["index"] + thoughts
                        block = {"type": "tool_use", "id": call["call_id"], "name": call["name"], "input": {}}
                        yield event("content_block_start", index=open_block, content_block=block)
                    else:
                        delta = {"type": "input_json_delta", "partial_json": call["arguments"]}
                        yield event("content_block_delta", index=open_block, delta=delta)
            done = self._running.done[0]
            if open_block < thoughts:
                if thoughts:
                    yield event("content_block_stop", index=0)
                open_block = thoughts
                yield event("content_block_start", index=open_block, content_block={"type": "text", "text": ""})
            yield event("content_block_stop", index=open_block)
            yield event("message_delta", delta=_ending(done), usage=_usage(done["usage"]))
            yield event("message_stop")
        except Gemma3Error as error:
            yield sse(failure(error), "error")


def _ending(done: DoneEvent) -> dict[str, Any]:
    if "stop" in done:
        return {"stop_reason": "stop_sequence", "stop_sequence": done["stop"]}
    reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(done["finish_reason"], "end_turn")
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts what was read from a cache apart."""
    cached = usage["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }

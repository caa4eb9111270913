"""OpenAI's /v1/chat/completions.

Source: https://platform.openai.com/docs/api-reference/chat; `timings` are llama.cpp's.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from ..errors import Gemma3Error, RequestError
from ..runtime.events import DoneEvent, TokenLogprob, ToolCallEvent, Usage
from .asking import Ask, Running, Service, reading
from .forms import answer_form, openai_calls, tool_options
from .http import Body, answered, body, comment, sse, until_gone
from .openai import failure

HARMLESS = frozenset(
    {
        "user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
        "modalities", "prediction", "cache_prompt", "reasoning_effort", "keep_alive",
        "function_call",
    }
)  # fmt: skip


class StreamOptions(Body):
    include_usage: bool | None = None


class Sampled(Body):
    """What both of OpenAI's older endpoints set of an answer."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1, le=128)

    @property
    def options(self) -> dict[str, Any]:
        """As the engine calls them; None is the default."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p or (1e-6 if self.top_p == 0 else None),
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self._biases(),
            "seed": None if self.seed is None else self.seed % 2**64,
            "stop": [one for one in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if one] or None,
        }

    def _biases(self) -> dict[int, float] | None:
        if self.logit_bias is None:
            return None
        wrong = next((token for token in self.logit_bias if not (token.isascii() and token.isdigit())), None)
        if wrong is not None:
            raise RequestError("logit_bias", got=repr(wrong), want="token ids")
        return {int(token): bias for token, bias in self.logit_bias.items()}


class ChatRequest(Sampled):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # as vLLM and llama.cpp have it

    def ask(self) -> Ask:
        if self.functions:
            raise RequestError("functions", got=f"{len(self.functions)} of them", want="none", do="send them as tools")
        options = self.options | answer_form(self.response_format)
        options |= tool_options(self.tools, self.tool_choice, self.parallel_tool_calls)
        options["max_tokens"] = self.max_completion_tokens or options["max_tokens"] or None
        options["template_args"] = self.chat_template_kwargs or None
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        return Ask(model=self.model, prompt=self.messages, options=options, n=self.n or 1)


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions"""
    service: Service = request.app.state.service
    asked = await body(request, ChatRequest, HARMLESS)
    running = await until_gone(request, service.begin(asked.ask()))
    answer = _Answer(running, asked)
    return await answered(request, running.close, answer.whole, answer.chunks() if asked.stream else None)


class _Answer:
    """One request's answers as OpenAI writes them."""

    def __init__(self, running: Running, asked: ChatRequest) -> None:
        self._running, self._asked = running, asked
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": running.model.name,
            "system_fingerprint": "mlx-gemma3",
        }

    async def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": _message(done),
                "logprobs": self._logprobs(said(done)),
                "finish_reason": done["finish_reason"],
            }
            for index, done in enumerate(await self._running.replies())
        ]
        total = self._running.usage
        usage = {"usage": usage_of(total), "timings": timings(total)}
        return {**self._head, "object": "chat.completion", "choices": choices, **usage}

    async def chunks(self) -> AsyncIterator[bytes]:
        try:
            for index in range(len(self._running.streams)):
                yield self._chunk(index, {"role": "assistant", "content": ""})
            async for found in self._running.events():
                if found is None:
                    yield comment("waiting")
                    continue
                index, event = found
                if event["kind"] == "text":
                    yield self._chunk(index, {"content": event["text"]}, logprobs=event.get("logprobs"))
                elif event["kind"] == "thinking":
                    yield self._chunk(index, {"reasoning_content": event["text"]})
                elif event["kind"] == "tool_call":
                    yield self._chunk(index, {"tool_calls": [_call_delta(event)]})
                elif event["kind"] == "done":
                    last = len(self._running.done) == len(self._running.streams)
                    yield self._chunk(index, {}, event["finish_reason"], timed=event["usage"] if last else None)
                elif event["kind"] == "pending" and (text := reading(event)):
                    yield comment(text)
            if self._with_usage:
                total = self._running.usage
                yield sse({**self._chunk_head, "choices": [], "usage": usage_of(total), "timings": timings(total)})
            yield sse("[DONE]")
        except Gemma3Error as error:
            yield sse(failure(error))

    @property
    def _with_usage(self) -> bool:
        return self._asked.stream_options is not None and bool(self._asked.stream_options.include_usage)

    @property
    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        reason: str | None = None,
        logprobs: Sequence[TokenLogprob] | None = None,
        timed: Usage | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": self._logprobs(logprobs), "finish_reason": reason}
        usage = {"usage": None} if self._with_usage else {}
        more = {"timings": timings(timed)} if timed is not None else {}
        return sse({**self._chunk_head, "choices": [choice], **usage, **more})

    def _logprobs(self, found: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if not self._asked.logprobs or found is None:
            return None
        content = [{**_logprob(one), "top_logprobs": [_logprob(other) for other in one["top"]]} for one in found]
        return {"content": content, "refusal": None}


def _message(done: DoneEvent) -> dict[str, Any]:
    calls = done.get("tool_calls")
    more: dict[str, Any] = {"tool_calls": openai_calls(calls)} if calls else {}
    if "thinking" in done:  # as DeepSeek, vLLM and llama.cpp call it
        more["reasoning_content"] = done["thinking"]
    return {"role": "assistant", "content": (done["text"] or None) if calls else done["text"], "refusal": None, **more}


def _call_delta(event: ToolCallEvent) -> dict[str, Any]:
    """The first of a call names it; the others hold its arguments."""
    function = {"arguments": event["arguments"]}
    if event["arguments"]:
        return {"index": event["index"], "function": function}
    return {
        "index": event["index"],
        "id": event["call_id"],
        "type": "function",
        "function": {"name": event["name"], **function},
    }


def said(done: DoneEvent) -> Sequence[TokenLogprob] | None:
    """The likelihoods of an answer's tokens, but of the one that ended it, which no text shows."""
    found = done.get("logprobs")
    ended = done["finish_reason"] == "stop" and "stop" not in done
    if found and "parsed" in done and done["text"].endswith(found[-1]["text"]):
        ended = False  # a form was complete without such a token
    return found[:-1] if found and ended else found


def _logprob(one: Any) -> dict[str, Any]:
    return {"token": one["text"], "logprob": one["logprob"], "bytes": list(one["text"].encode("utf-8", "replace"))}


def usage_of(usage: Usage) -> dict[str, Any]:
    """Tokens, as OpenAI counts them."""
    prompt, written = usage["prompt_tokens"], usage["completion_tokens"]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": usage["cached_tokens"]},
    }


def timings(usage: Usage) -> dict[str, Any]:
    """Milliseconds and tokens a second, of reading and writing."""
    read = max(usage["prompt_tokens"] - usage["cached_tokens"], 0)
    reading_seconds, writing_seconds = usage["prompt_seconds"], usage["answer_seconds"]
    return {
        "cache_n": usage["cached_tokens"],
        "prompt_n": read,
        "prompt_ms": round(1000 * reading_seconds, 3),
        "prompt_per_second": round(read / reading_seconds, 3) if reading_seconds else 0.0,
        "predicted_n": usage["completion_tokens"],
        "predicted_ms": round(1000 * writing_seconds, 3),
        "predicted_per_second": round(usage["completion_tokens"] / writing_seconds, 3) if writing_seconds else 0.0,
    }

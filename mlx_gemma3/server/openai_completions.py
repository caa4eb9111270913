"""OpenAI's /v1/completions: texts and token ids to complete, with `echo` and log-probabilities of both.

Source: https://platform.openai.com/docs/api-reference/completions.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from itertools import accumulate
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from ..errors import Gemma3Error, RequestError
from ..runtime.events import DoneEvent, TokenLogprob
from .asking import Ask, Running, Service, reading
from .http import answered, body, comment, sse, until_gone
from .openai import failure
from .openai_chat import HARMLESS, Sampled, timings, usage_of


class CompletionRequest(Sampled):
    prompt: str | list[int] | list[str] | list[list[int]] = Field(union_mode="left_to_right")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = None
    suffix: str | None = None

    def asks(self) -> list[Ask]:
        """One for each prompt."""
        if self.suffix:
            raise RequestError("suffix", got="a text", want="none: Gemma 3 fills no gaps")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError("best_of", got=self.best_of, want="n, or none")
        if self.echo and self.stream:
            raise RequestError("echo", got="true beside stream", want="one of them")
        prompts: list[Any] = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        if not prompts or not all(prompts):
            raise RequestError("prompt", got="an empty one", want="a text or token ids")
        options = self.options
        options["logprobs"] = self.logprobs
        if self.echo:
            options["prompt_logprobs"] = self.logprobs or 0
        if self.max_tokens == 0:
            if not self.echo:
                raise RequestError("max_tokens", got=0, want=">= 1, or echo")
            options["max_tokens"] = 1  # and left out
        elif self.max_tokens is None:
            options["max_tokens"] = 16  # OpenAI's default
        return [Ask(model=self.model, prompt=prompt, options=options, n=self.n or 1, chat=False) for prompt in prompts]


async def completions(request: Request) -> Response:
    """POST /v1/completions"""
    service: Service = request.app.state.service
    asked = await body(request, CompletionRequest, HARMLESS)
    running = await until_gone(request, service.begin(*asked.asks()))
    answer = _Answer(running, asked)
    return await answered(request, running.close, answer.whole, answer.chunks() if asked.stream else None)


class _Answer:
    def __init__(self, running: Running, asked: CompletionRequest) -> None:
        self._running, self._asked = running, asked
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": running.model.name,
        }

    async def whole(self) -> dict[str, Any]:
        dones = await self._running.replies()
        choices = [self._choice(index, done) for index, done in enumerate(dones)]
        first = self._running.usage
        prompts = [done["usage"] for done in dones[:: self._asked.n or 1]]
        usage = usage_of(first)
        usage["prompt_tokens"] = sum(one["prompt_tokens"] for one in prompts)
        usage["completion_tokens"] = sum(len(self._written(done)) for done in dones)
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        return {**self._head, "choices": choices, "usage": usage, "timings": timings(first)}

    def _written(self, done: DoneEvent) -> list[int]:
        return [] if self._asked.max_tokens == 0 else done["tokens"]

    def _choice(self, index: int, done: DoneEvent) -> dict[str, Any]:
        nothing = self._asked.max_tokens == 0
        text = "" if nothing else done["text"]
        found: list[TokenLogprob | None] = (
            [] if nothing else [*done.get("logprobs", [])]
        )  # with the token that ended it, which lm-eval counts on
        if self._asked.echo:
            before = done.get("prompt_logprobs", [])
            text = self._prompt_text(index) + text
            found = [*before, *found]
        return {
            "index": index,
            "text": text,
            "logprobs": None if self._asked.logprobs is None else self._listed(found, index),
            "finish_reason": "length" if nothing else done["finish_reason"],
        }

    def _prompt_text(self, index: int) -> str:
        prompt = self._prompt(index)
        return prompt if isinstance(prompt, str) else self._running.decode(prompt)

    def _prompt(self, index: int) -> Any:
        given = self._asked.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            return given
        return given[index // (self._asked.n or 1)]

    def _listed(self, found: list[TokenLogprob | None], index: int) -> dict[str, Any]:
        """Lists side by side, as this endpoint has them. The prompt's first token has a place and no likelihood."""
        prompt = self._prompt(index)
        first = self._running.first_token(prompt)
        tokens = [first if one is None else one["text"] for one in found]
        tops = [None if one is None else _tops(one, self._asked.logprobs or 0) for one in found]
        return {
            "tokens": tokens,
            "token_logprobs": [None if one is None else one["logprob"] for one in found],
            "top_logprobs": tops,
            "text_offset": [0, *accumulate(map(len, tokens))][: len(tokens)],
        }

    async def chunks(self) -> AsyncIterator[bytes]:
        asked, usage = self._asked, self._asked.stream_options
        try:
            async for found in self._running.events():
                if found is None:
                    yield comment("waiting")
                    continue
                index, event = found
                if event["kind"] == "text":
                    likely = None if asked.logprobs is None else self._listed([*event.get("logprobs", [])], index)
                    yield self._chunk(index, event["text"], likely, None)
                elif event["kind"] == "done":
                    yield self._chunk(index, "", None, event["finish_reason"])
                elif event["kind"] == "pending" and (text := reading(event)):
                    yield comment(text)
            if usage is not None and usage.include_usage:
                total = self._running.usage
                yield sse({**self._head, "choices": [], "usage": usage_of(total), "timings": timings(total)})
            yield sse("[DONE]")
        except Gemma3Error as error:
            yield sse(failure(error))

    def _chunk(self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return sse({**self._head, "choices": [choice]})


def _tops(one: TokenLogprob, count: int) -> dict[str, float]:
    """By text; two tokens of one text are one, the likelier."""
    tops: dict[str, float] = {}
    for other in [*one["top"][:count], *([one] if count else [])]:
        tops.setdefault(other["text"], other["logprob"])
    return tops

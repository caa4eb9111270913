"""What a stream tells, as plain types: it crosses into Swift, and into lines of JSON."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict


class Logprob(TypedDict):
    """A token and its natural log-probability, before penalties, bias and temperature."""

    token: int
    text: str  # of this token alone; � where it is part of a character
    logprob: float


class TokenLogprob(Logprob):
    """A token of the answer, and the likeliest ones at its place."""

    top: list[Logprob]


class TextEvent(TypedDict):
    """Some text of the answer, and the ids behind it."""

    kind: Literal["text"]
    text: str
    tokens: list[int]
    logprobs: NotRequired[list[TokenLogprob]]  # when asked for, one for each of `tokens`


class ThinkingEvent(TypedDict):
    """Some text of what the model thinks before it answers, and the ids behind it (MedGemma)."""

    kind: Literal["thinking"]
    text: str
    tokens: list[int]


class ToolCall(TypedDict):
    """A tool that the model asks for."""

    id: str
    name: str
    arguments: dict[str, Any]


class ToolCallEvent(TypedDict):
    """A piece of a call; the first of each call says its name, with no arguments yet."""

    kind: Literal["tool_call"]
    index: int  # of the call in the answer
    call_id: str
    name: str
    arguments: str  # JSON, to be joined


class Usage(TypedDict):
    """What an answer took: tokens, seconds, bytes."""

    prompt_tokens: int
    cached_tokens: int  # of them not processed again
    cached_from: Literal["", "memory", "disk"]  # where these were; "" without any
    processed_tokens: int
    completion_tokens: int
    prompt_seconds: float  # from the answer's turn to the prompt read
    first_token_seconds: float  # from there to the first token
    answer_seconds: float  # from the prompt read to the end
    passes: int  # of the model over tokens of the answer
    drafted_tokens: int  # that were guessed, and checked in these passes
    accepted_tokens: int  # of them right
    peak_memory_bytes: int  # of the whole engine
    images: int
    images_encoded: int  # of them not seen before
    prepare_seconds: float  # pictures and prompt, beside the engine's thread


class DoneEvent(TypedDict):
    """The whole answer: the last event."""

    kind: Literal["done"]
    text: str
    thinking: NotRequired[str]  # what it thought before, when it did
    tokens: list[int]  # as generated, the one that ended the answer included
    finish_reason: Literal["stop", "length", "cancelled", "tool_calls"]
    stop: NotRequired[str]  # the string that ended it, where it was one
    parsed: NotRequired[Any]  # of an answer in a form, when it is whole: the value, or the text
    tool_calls: NotRequired[list[ToolCall]]  # when there are any; `text` is what was said beside them
    usage: Usage
    logprobs: NotRequired[list[TokenLogprob]]  # when asked for
    prompt_logprobs: NotRequired[list[TokenLogprob | None]]  # when asked for; of the first token there is none


class ErrorEvent(TypedDict):
    """What went wrong: the last event."""

    kind: Literal["error"]
    code: str  # errors.py
    message: str


Stage = Literal["download", "pictures", "prompt"]


class PendingEvent(TypedDict):
    """Nothing yet; or how far something is that takes its time."""

    kind: Literal["pending"]
    stage: NotRequired[Stage]
    done: NotRequired[int]
    total: NotRequired[int]


Event = TextEvent | ThinkingEvent | ToolCallEvent | DoneEvent | ErrorEvent | PendingEvent


def no_usage() -> Usage:
    """Of an answer that was never begun."""
    return Usage(
        prompt_tokens=0, cached_tokens=0, cached_from="", processed_tokens=0, completion_tokens=0, prompt_seconds=0.0,
        first_token_seconds=0.0, answer_seconds=0.0, passes=0, drafted_tokens=0, accepted_tokens=0, peak_memory_bytes=0,
        images=0, images_encoded=0, prepare_seconds=0.0,
    )  # fmt: skip

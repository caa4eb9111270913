"""One request on its way through the engine, from the line to its last event."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..errors import Gemma3Error
from ..generation.batch import Row, Written
from ..generation.choice import Score
from ..prompt.tokenizer import Tokenizer
from .answer import Answer, token_logprob
from .calls import Calls, FunctionCalls
from .events import DoneEvent, TextEvent, ThinkingEvent, Usage, no_usage
from .request import Prepared, Request
from .timeline import Timeline, Tokens

Encode = Callable[[str, NDArray[np.float32] | None], mx.array]  # digest and pixels to (T, D) features


class Job:
    """A request: what is known of it so far.

    In line it has no timeline. While its prompt is read it has one, and while its answer is written a row as well.
    """

    def __init__(self, request: Request) -> None:
        self.request, self.conversation = request, request.conversation
        self.preparing = False
        self.tokens: Tokens | None = None  # the whole prompt, once prepared
        self.timeline: Timeline | None = None
        self.recalling: bool | None = None  # whether a file of the prompt cache is read for it; None: never asked
        self.recalled: Timeline | None = None  # what was read
        self.row: Row | None = None
        self.answer: Answer | None = None
        count = request.options.prompt_logprobs
        self.score = None if count is None else Score(count)
        self.kv_bytes = 0  # that it may come to need
        self.error: Gemma3Error | None = None  # of preparing it
        self._calls: Calls | FunctionCalls | None = None
        if request.form is not None and request.form.tools:
            self._calls = Calls(request.put)
        self._words = ""  # of an answer that may call
        self._usage = no_usage()
        self._prepare_began = self._began = self._read = 0.0
        self._before: list[Any] | None = None  # exchanges of the conversation, to go back to
        self._last: tuple[Any, str] = (None, "")
        self._pixels: dict[str, NDArray[np.float32]] = {}
        self._features: dict[str, mx.array] = {}  # of the pictures that are read next

    def prepare_begins(self) -> None:
        self.preparing, self._prepare_began = True, time.perf_counter()

    def prepared(self, prepared: Prepared | None) -> None:
        """The prompt is there: of a conversation all turns, the new one among them.

        Args:
            prepared: None when the last turn is answered again.
        """
        if self._prepare_began:
            self._usage["prepare_seconds"] = time.perf_counter() - self._prepare_began
        self.preparing = False
        conversation = self.conversation
        if conversation is None:
            assert prepared is not None
            self.tokens, self._usage["images"] = prepared.tokens, prepared.images
            self._pixels = dict(prepared.pixels)
            return
        exchanges = conversation.exchanges
        self._before = list(exchanges)
        self._last = (exchanges[-1].said, exchanges[-1].reply) if exchanges else (None, "")
        if prepared is None:
            conversation.forget_answer()
        else:
            conversation.ask(self.request.prompt, prepared.tokens, prepared.images, prepared.pixels)
        self.tokens = conversation.prompt()
        self._usage["images"] = sum(exchange.images for exchange in exchanges)

    def recall_begins(self) -> None:
        """Its turn has come, with a file of the prompt cache."""
        self.recalling, self._began = True, time.perf_counter()

    def reads(self, timeline: Timeline, reused: int, *, recalled: bool = False) -> None:
        """Its turn has come: the prompt is read into this timeline, which may have been recalled from disk."""
        assert self.tokens is not None
        self.timeline, self._began = timeline, self._began or time.perf_counter()
        self._usage["prompt_tokens"], self._usage["cached_tokens"] = len(self.tokens), reused
        self._usage["cached_from"] = "" if not reused else "disk" if recalled else "memory"
        self.tell_progress()

    def tell_progress(self) -> None:
        """How far the prompt is read."""
        assert self.timeline is not None and self.tokens is not None
        reused = self._usage["cached_tokens"]
        total = len(self.tokens) - reused
        if total:
            self.request.put(
                {"kind": "pending", "stage": "prompt", "done": self.timeline.caches.offset - reused, "total": total}
            )

    def features(self, number: int, encode: Encode) -> mx.array:
        """(T, D) features of the n-th picture of its prompt."""
        assert self.tokens is not None
        name = self.tokens.digests[number]
        if self.conversation is not None:
            return self.conversation.rows(name, lambda view: encode(name, view))
        if name not in self._features:
            self._features[name] = encode(name, self._pixels.get(name))
        return self._features[name]

    def has_features(self, number: int, known: Callable[[str], bool]) -> bool:
        """Whether the tower is not needed for the n-th picture."""
        assert self.tokens is not None
        name = self.tokens.digests[number]
        own = self._features if self.conversation is None else self.conversation.features
        return name in own or known(name)

    @property
    def adapter(self) -> str | None:
        """What it is computed with: a conversation's own, or what was asked for."""
        if self.conversation is not None:
            return self.conversation.timeline.caches.adapter
        return self.request.options.adapter

    def encoded(self) -> None:
        """A picture went through the tower."""
        self._usage["images_encoded"] += 1

    def read(self) -> None:
        """A chunk of the prompt was read."""
        self._features.clear()
        self.tell_progress()

    def writes(self, row: Row, answer: Answer, *, functions: bool = False) -> None:
        """The prompt is read.

        Args:
            functions: calls come in FunctionGemma's form.
        """
        if functions:
            self._calls = FunctionCalls(self.request.put)
        self.row, self.answer, self._read = row, answer, time.perf_counter()
        self._usage["prompt_seconds"] = self._usage["first_token_seconds"] = self._read - self._began

    def take(self, written: Written) -> None:
        """A token of the answer: tell what can be shown of it. Raises what the caller's own code raised."""
        if written.error is not None:
            raise written.error
        assert self.answer is not None
        if not self.answer.tokens:
            self._usage["first_token_seconds"] = time.perf_counter() - self._began
        if (event := self.answer.push(written.token, written.likelihood)) is not None:
            self._tell(event)

    def _tell(self, event: TextEvent | ThinkingEvent) -> None:
        """Tell a piece of the answer; of a call, its name and arguments instead."""
        if self._calls is not None and event["kind"] == "text" and event["text"]:
            event["text"] = self._calls.push(event["text"])
            if not event["text"]:
                return
            self._words += event["text"]
        self.request.put(event)

    def ends(self, reason: str, eos_ids: frozenset[int], tokenizer: Tokenizer) -> DoneEvent:
        """The answer is over, the conversation goes on from here. Returns the event that tells it."""
        answer, usage, timeline = self.answer, self._usage, self.timeline
        ids: list[int] = []
        text = ""
        if timeline is not None:
            usage["processed_tokens"] = timeline.caches.offset - usage["cached_tokens"]
        if answer is not None and timeline is not None:
            if (event := answer.finish()) is not None:
                self._tell(event)
            if self._calls is not None and (words := self._calls.finish()):
                self._words += words
                self.request.put({"kind": "text", "text": words, "tokens": []})
            reason = "stop" if answer.ended else reason
            ids, text = answer.tokens, answer.text
            if isinstance(self._calls, FunctionCalls):
                text = self._words
            usage["processed_tokens"] = len(self.tokens or ()) - usage["cached_tokens"]
            usage["completion_tokens"], usage["answer_seconds"] = len(ids), time.perf_counter() - self._read
            if (row := self.row) is not None:
                usage["passes"], usage["drafted_tokens"], usage["accepted_tokens"] = (
                    row.passes, row.drafted, row.accepted,
                )  # fmt: skip
            timeline.wrote(tuple(ids))
        usage["peak_memory_bytes"] = mx.get_peak_memory() if timeline is not None else 0
        if self.conversation is not None and timeline is not None:
            calls = self._calls.found if self._calls is not None else []
            self.conversation.answered(ids, text, eos_ids, calls)
        done = done_event(text, ids, reason, usage)
        if answer is not None and answer.thinking:
            done["thinking"] = answer.thinking
        self._tell_form(done, text)
        if answer is not None and answer.stop is not None:
            done["stop"] = answer.stop
        if answer is not None and self.request.options.logprobs is not None:
            done["logprobs"] = answer.logprobs
        if self.score is not None and self.tokens is not None:
            scored = zip(self.tokens.ids[1:], self.score.found, strict=False)
            done["prompt_logprobs"] = [None, *(token_logprob(tokenizer, token, found) for token, found in scored)]
        return done

    def _tell_form(self, done: DoneEvent, text: str) -> None:
        """What an answer in a form comes to."""
        form = self.request.form
        if self._calls is not None and self._calls.found:
            done["text"] = text.strip() if isinstance(self._calls, FunctionCalls) else ""
            done["tool_calls"] = self._calls.found
            if done["finish_reason"] == "stop":
                done["finish_reason"] = "tool_calls"
        elif form is not None and form.text is not None and not form.tools and self.row is not None:
            done["parsed"] = form.parsed(self.row.chooser.constraint) if done["finish_reason"] == "stop" else None

    def undo(self) -> None:
        """It failed: of the conversation nothing was said."""
        if self.conversation is not None and self._before is not None:
            exchanges = self.conversation.exchanges
            exchanges[:] = self._before
            if exchanges:
                exchanges[-1].said, exchanges[-1].reply = self._last
            self.conversation.drop_pixels()


def done_event(text: str, tokens: list[int], reason: Any, usage: Usage) -> DoneEvent:
    """The last event of an answer."""
    return {"kind": "done", "text": text, "tokens": tokens, "finish_reason": reason, "usage": usage}

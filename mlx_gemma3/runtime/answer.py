"""One answer: a prompt is read into a timeline, pieces of text come out.

Owns the streaming of text, stop strings and the accounts (`usage`). Runs in the engine's thread and knows nothing of
threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from types import MappingProxyType
from typing import Any

import mlx.core as mx

from ..generation.sampling import Sampling
from ..prompt.tokenizer import Tokenizer
from .timeline import Timeline, Tokens

Event = dict[str, Any]  # plain types only: it crosses into Swift


def answer(
    timeline: Timeline,
    prompt: Tokens,
    tokenizer: Tokenizer,
    *,
    features: Callable[[int], mx.array],
    eos_ids: frozenset[int],
    check: Callable[[mx.array], None] = lambda logits: None,
    sampling: Sampling,
    max_tokens: int,
    max_context: int | None = None,
    stop: Sequence[str] = (),
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> Iterator[Event]:
    """Yield `text` events and in the end one `done` event.

    text: {"kind": "text", "text": str, "tokens": the ids behind it}. Never half a character; text that could be the
    start of a stop string is held back until it cannot be.
    done: {"kind": "done", "finish_reason": "stop" | "length" | "cancelled", "tokens": the ids since the last text
    event, "usage": {…}}. The ids include the one that ended the answer.

    Args:
        features: rows of the n-th picture of the prompt; see Timeline.read.
        eos_ids: tokens that end an answer.
        check: given the (1, V) logits of the first token; what it raises ends the answer.
        stop: strings that end an answer. The name of a control token in them means the token, which no text shows, as
            well as the same characters.
        max_context: most tokens of prompt and answer together; None for all that the model has positions for.

    Raises:
        ContextError: the prompt does not fit.
    """
    began = time.perf_counter()
    mx.reset_peak_memory()
    logits, reused = timeline.read(prompt, features, limit=max_context, progress=progress, cancelled=cancelled)
    read = first = time.perf_counter()
    processed = timeline.caches.offset - reused
    count, reason, waiting = 0, "length", []
    if logits is None:
        reason = "cancelled"
    else:
        check(logits)
        text = tokenizer.stream(skip_special=True)
        marks = _marks(stop, tokenizer)
        stopper = StopStrings(stop, {tokenizer.piece(token): mark for token, mark in marks.items()})
        with closing(timeline.write(logits, sampling=sampling, max_tokens=max_tokens, limit=max_context)) as steps:
            for token in steps:
                count += 1
                if count == 1:
                    first = time.perf_counter()
                waiting.append(token)
                if token in eos_ids:
                    reason = "stop"
                    break
                if piece := stopper.push(text.finish() + marks[token] if token in marks else text.push(token)):
                    yield {"kind": "text", "text": piece, "tokens": waiting}
                    waiting = []
                if stopper.found:
                    break
                if cancelled():
                    reason = "cancelled"
                    break
        if rest := stopper.push(text.finish()) + stopper.finish():
            yield {"kind": "text", "text": rest, "tokens": waiting}
            waiting = []
        reason = "stop" if stopper.found else reason
    usage = {
        "prompt_tokens": len(prompt),
        "cached_tokens": reused,
        "processed_tokens": processed,
        "completion_tokens": count,
        "prompt_seconds": read - began,
        "first_token_seconds": first - began,
        "answer_seconds": time.perf_counter() - read,
        "peak_memory_bytes": mx.get_peak_memory(),
    }
    yield {"kind": "done", "finish_reason": reason, "tokens": waiting, "usage": usage}


def _marks(stop: Sequence[str], tokenizer: Tokenizer) -> dict[int, str]:
    """The control tokens that the stop strings name, each with a character that stands for it: half of a surrogate
    pair, which no decoded text holds.
    """
    if not stop:
        return {}
    ids = sorted(token for token in tokenizer.special_ids if any(tokenizer.piece(token) in string for string in stop))
    return {token: chr(0xD800 + number) for number, token in enumerate(ids[:0x400])}


class StopStrings:
    """Lets text through until one of some strings appears, wherever the borders between pieces fall.

    `found` turns true when one did; what stood before it was let through, it and what follows are dropped.

    Args:
        strings: what to look for.
        names: by the name of a control token the character that stands for it in the text; never let through.
    """

    def __init__(self, strings: Sequence[str], names: Mapping[str, str] = MappingProxyType({})) -> None:
        self.strings = tuple(dict.fromkeys(both for one in strings for both in (one, _replaced(one, names))))
        self.found = False
        self._held = ""
        self._marks = str.maketrans(dict.fromkeys(names.values(), ""))

    def push(self, text: str) -> str:
        """Take more text; return what can no longer be part of a stop string."""
        if self.found or not self.strings:
            return "" if self.found else text
        self._held += text
        places = [place for string in self.strings if (place := self._held.find(string)) >= 0]
        if places:
            self.found = True
            out, self._held = self._held[: min(places)], ""
            return out.translate(self._marks)
        keep = max(_overlap(self._held, string) for string in self.strings)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out.translate(self._marks)

    def finish(self) -> str:
        """The text ended: return what was held back."""
        out, self._held = self._held, ""
        return out.translate(self._marks)


def _replaced(string: str, names: Mapping[str, str]) -> str:
    for name in sorted(names, key=len, reverse=True):
        string = string.replace(name, names[name])
    return string


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that `string` starts with, short of the whole string."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)

"""One timeline of tokens: a prompt is read into its caches, an answer comes out as pieces of text.

Owns the caches, the streaming of text, stop strings and the accounts (`usage`). Runs in the engine's thread and knows
nothing of threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import mlx.core as mx

from ..generation.loop import decode, prefill
from ..generation.sampling import Sampling
from ..model.gemma3 import Gemma3
from ..prompt.processor import Prompt
from ..prompt.tokenizer import Tokenizer

Event = dict[str, Any]  # plain types only: it crosses into Swift


class Session:
    """Reads one prompt and writes one answer.

    Args:
        eos_ids: tokens that end an answer.
    """

    def __init__(self, model: Gemma3, tokenizer: Tokenizer, eos_ids: frozenset[int]) -> None:
        self.model, self.tokenizer, self.eos_ids = model, tokenizer, eos_ids
        self.caches = model.make_caches()

    def answer(
        self,
        prompt: Prompt,
        *,
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str] = (),
        progress: Callable[[int, int], None],
        cancelled: Callable[[], bool],
    ) -> Iterator[Event]:
        """Yield `text` events and in the end one `done` event.

        text: {"kind": "text", "text": str, "tokens": the ids behind it}. Never half a character; text that could be
        the start of a stop string is held back until it cannot be.
        done: {"kind": "done", "finish_reason": "stop" | "length" | "cancelled", "tokens": the ids since the last text
        event, "usage": {…}}. The ids include the one that ended the answer.
        """
        began = time.perf_counter()
        mx.reset_peak_memory()
        logits = prefill(
            self.model,
            prompt.tokens,
            self.caches,
            pixels=prompt.pixels,
            spans=prompt.spans,
            progress=progress,
            cancelled=cancelled,
        )
        read = first = time.perf_counter()
        count, reason, waiting = 0, "length", []
        if logits is None:
            reason = "cancelled"
        else:
            text = self.tokenizer.stream(skip_special=True)
            stopper = StopStrings(stop)
            steps = decode(
                self.model, logits, self.caches, prompt=prompt.tokens, sampling=sampling, max_tokens=max_tokens
            )
            with closing(steps):
                for token in steps:
                    count += 1
                    if count == 1:
                        first = time.perf_counter()
                    waiting.append(token)
                    if token in self.eos_ids:
                        reason = "stop"
                        break
                    if piece := stopper.push(text.push(token)):
                        yield {"kind": "text", "text": piece, "tokens": waiting}
                        waiting = []
                    if stopper.found:
                        reason = "stop"
                        break
                    if cancelled():
                        reason = "cancelled"
                        break
            if rest := stopper.push(text.finish()) + stopper.finish():
                yield {"kind": "text", "text": rest, "tokens": waiting}
                waiting = []
            reason = "stop" if stopper.found else reason
        pictures = len(prompt.spans)
        usage = {
            "prompt_tokens": len(prompt.tokens),
            "cached_tokens": 0,
            "completion_tokens": count,
            "images": prompt.image_count,
            "images_encoded": pictures if logits is not None else 0,
            "prompt_seconds": read - began,
            "first_token_seconds": first - began,
            "answer_seconds": time.perf_counter() - read,
            "peak_memory_bytes": mx.get_peak_memory(),
        }
        yield {"kind": "done", "finish_reason": reason, "tokens": waiting, "usage": usage}


class StopStrings:
    """Lets text through until one of some strings appears, wherever the borders between pieces fall.

    `found` turns true when one did; what stood before it was let through, it and what follows are dropped.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self.found = False
        self._held = ""

    def push(self, text: str) -> str:
        """Take more text; return what can no longer be part of a stop string."""
        if self.found or not self.strings:
            return "" if self.found else text
        self._held += text
        places = [place for string in self.strings if (place := self._held.find(string)) >= 0]
        if places:
            self.found = True
            out, self._held = self._held[: min(places)], ""
            return out
        keep = max(_overlap(self._held, string) for string in self.strings)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def finish(self) -> str:
        """The text ended: return what was held back."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that `string` starts with, short of the whole string."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)

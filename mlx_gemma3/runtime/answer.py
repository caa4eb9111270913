"""The text of one answer: tokens in, events out. Owns streaming, stop strings, and what ends an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType

from ..generation.choice import Likelihood
from ..prompt.tokenizer import Tokenizer
from .events import Logprob, TextEvent, ThinkingEvent, TokenLogprob

_TITLE = "thought\n"  # how MedGemma's thinking part begins


class Answer:
    """What was written so far.

    Never half a character; text that could be the start of a stop string is held back until it cannot be.

    Args:
        eos_ids: tokens that end an answer.
        stop: strings that end an answer. The name of a control token in them means the token, which no text shows, as
            well as the same characters.
        kept: control tokens that stay in the text.
        thought: the tokens around a thinking part, which stands before the text.
        thinks: the prompt has opened that part.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        eos_ids: frozenset[int],
        stop: Sequence[str] = (),
        kept: Set[int] = frozenset(),
        thought: tuple[int, int] | None = None,
        thinks: bool = False,
    ) -> None:
        self.tokens: list[int] = []  # the one that ended the answer included
        self.text = ""
        self.thinking = ""
        self.logprobs: list[TokenLogprob] = []
        self.ended = False  # by an end token or a stop string
        self._tokenizer, self._eos_ids = tokenizer, eos_ids
        self._thought, self._thinks = thought, thinks
        self._title: str | None = "" if not thinks else None  # of the thinking part, while it may be one
        self._decoder = tokenizer.stream(skip_special=True, kept=kept)
        self._marks = _marks(stop, tokenizer)
        self._stopper = StopStrings(stop, {tokenizer.piece(token): mark for token, mark in self._marks.items()})
        self._told = 0  # tokens that an event told of

    def push(self, token: int, likelihood: Likelihood | None = None) -> TextEvent | ThinkingEvent | None:
        """Take a token; what can be shown of it now."""
        self.tokens.append(token)
        if likelihood is not None:
            self.logprobs.append(token_logprob(self._tokenizer, token, likelihood))
        if token in self._eos_ids:
            self.ended = True
            return None
        if self._thought is not None and self._takes_thought(token):
            return self._think(self._decoder.finish() if token == self._thought[1] else self._decoder.push(token))
        marks = self._marks
        text = self._decoder.finish() + marks[token] if token in marks else self._decoder.push(token)
        piece = self._stopper.push(text)
        self.ended = self._stopper.found is not None
        return self._event(piece) if piece else None

    def _takes_thought(self, token: int) -> bool:
        """Whether a token belongs to the thinking part."""
        assert self._thought is not None
        begins = token == self._thought[0] and not self.text.strip() and not self.thinking
        if not self._thinks and not begins:
            return False
        self._thinks = token != self._thought[1]
        return True

    def _think(self, text: str) -> ThinkingEvent | None:
        assert self._thought is not None
        if self.tokens[-1] == self._thought[0]:
            return None
        if self._title is not None:
            self._title += text
            if self._thinks and self._title != _TITLE and _TITLE.startswith(self._title):
                return None
            text, self._title = self._title.removeprefix(_TITLE), None
        if not text:
            return None
        self.thinking += text
        event: ThinkingEvent = {"kind": "thinking", "text": text, "tokens": self.tokens[self._told :]}
        self._told = len(self.tokens)
        return event

    def finish(self) -> TextEvent | ThinkingEvent | None:
        """The answer is over: what was held back."""
        if self._thinks:
            self._thinks = False
            return self._think(self._decoder.finish())
        rest = self._stopper.push(self._decoder.finish()) + self._stopper.finish()
        self.ended = self.ended or self._stopper.found is not None
        return self._event(rest) if rest else None

    @property
    def stop(self) -> str | None:
        """The stop string that ended it."""
        return self._stopper.found

    def _event(self, text: str) -> TextEvent:
        self.text += text
        event: TextEvent = {"kind": "text", "text": text, "tokens": self.tokens[self._told :]}
        if self.logprobs:
            event["logprobs"] = self.logprobs[self._told :]
        self._told = len(self.tokens)
        return event


def token_logprob(tokenizer: Tokenizer, token: int, likelihood: Likelihood) -> TokenLogprob:
    """What is told of a token's likelihood."""

    def one(token: int, logprob: float) -> Logprob:
        return {"token": token, "text": tokenizer.decode([token]), "logprob": logprob}

    return {**one(token, likelihood.logprob), "top": [one(*other) for other in likelihood.top]}


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

    `found` says which did; what stood before it was let through, it and what follows are dropped.

    Args:
        strings: what to look for.
        names: by the name of a control token the character that stands for it in the text; never let through.
    """

    def __init__(self, strings: Sequence[str], names: Mapping[str, str] = MappingProxyType({})) -> None:
        # as they may stand in the text → as they were given
        self.strings = {both: one for one in reversed(strings) for both in (_replaced(one, names), one)}
        self.found: str | None = None  # the string that appeared
        self._held = ""
        self._marks = str.maketrans(dict.fromkeys(names.values(), ""))

    def push(self, text: str) -> str:
        """Take more text; return what can no longer be part of a stop string."""
        if self.found or not self.strings:
            return "" if self.found else text
        self._held += text
        places = {place: string for string in self.strings if (place := self._held.find(string)) >= 0}
        if places:
            self.found = self.strings[places[min(places)]]
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

"""A form that an answer is held to, token by token: one for each answer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OptionError
from ..prompt.tokenizer import Tokenizer
from . import schema
from .vocabulary import built, llguidance

FENCE = "```json\n"  # what ends free text before a form, as Gemma writes it by itself
_NO_FORCING = '%llguidance {"no_forcing": true}\n'  # masks allow every spelling of a forced text, not one alone


class Grammar:
    """A grammar made for a tokenizer; compiled once, it begins any number of answers.

    Args:
        text: Lark, as llguidance takes it.
        name: what the user calls it, for errors.
        controls: control tokens that answers may hold: those that the grammar names.

    Raises:
        OptionError: llguidance cannot hold an answer to it, or is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, name: str, controls: Collection[int] = frozenset()) -> None:
        library = llguidance()
        self.tokenizer, self.name, self.controls = tokenizer, name, frozenset(controls)
        lark = library.LLMatcher.grammar_from_lark(_NO_FORCING + text)
        self._matcher = library.LLMatcher(built(tokenizer), lark, log_level=0)
        if self._matcher.is_error():
            raise refusal(name, self._matcher.get_error())

    def start(self, ends: Collection[int], *, rows: int = 0, free_first: int = 0) -> Matcher:
        """A new answer's.

        Args:
            ends: the tokens that end an answer.
            rows: how many ids the model has logits for, if those are more than have a piece.
            free_first: most tokens of free text before the form; 0: none.
        """
        return Matcher(self, self._matcher.deep_copy(), sorted(ends), rows, free_first)


class Matcher:
    """Where one answer stands in its form: a Constraint (generation/constraint.py).

    Free text before the form ends where a line holds only the fence, or by the fence when there were enough tokens.
    """

    def __init__(self, grammar: Grammar, matcher: Any, ends: list[int], rows: int, free_first: int) -> None:
        self._grammar, self._matcher, self._ends = grammar, matcher, ends
        self._tokenizer = grammar.tokenizer
        words = -(-max(self._tokenizer.vocab_size, rows) // 32)
        self._ending = _bits(ends, words)
        self._never = _bits(sorted((self._tokenizer.special_ids - grammar.controls) | set(ends)), words)
        self._free = free_first
        self._text = ""  # the end of the free text
        self._fence: list[int] = []  # the rest of the fence, where the free text was long enough
        self._taken: list[tuple[int, str, list[int], bool]] = []  # the state before each token, to go back to
        self._over = False  # a token ended it
        self._written: list[int] = []  # tokens of the form

    @property
    def in_form(self) -> bool:
        """Whether the form has begun: no free text comes any more."""
        return not self._free and not self._fence

    def allowed(self) -> NDArray[np.uint32]:
        """See Constraint."""
        if self._fence:
            return _bits(self._fence[:1], len(self._never))
        if self._free:
            return ~self._never
        mask = np.zeros_like(self._never)
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        mask[: len(found)] = found[: len(mask)]
        mask &= ~self._never
        return mask | self._ending if self._matcher.is_accepting() else mask

    def accept(self, token: int) -> None:
        """See Constraint.

        Raises:
            OptionError: the token is none of those allowed, or the form has become too complex to follow.
        """
        self._taken.append((self._free, self._text, list(self._fence), self._over))
        if self._fence:
            del self._fence[0]
        elif self._free:
            self._free -= 1
            self._text = (self._text + self._tokenizer.decode([token]))[-32:]
            if self._text.rstrip("\n").endswith(FENCE.strip()) and self._text.endswith("\n"):
                self._free = 0
            elif not self._free:
                self._fence = self._tokenizer.encode(("" if self._text.endswith("\n") else "\n") + FENCE)
        elif token in self._ends:
            self._over = True
        else:
            self._matcher.consume_token(token)
            self._written.append(token)
            self._check()

    def forced(self) -> Sequence[int]:
        """See Constraint."""
        if self._fence:
            return list(self._fence)
        if not self.in_form or self.complete:
            return ()
        self._matcher.compute_ff_bytes()  # the grammar forces nothing by itself: this looks ahead
        found: list[int] = self._matcher.compute_ff_tokens()
        return [] if any(token in self._ends for token in found) else found

    @property
    def complete(self) -> bool:
        """See Constraint."""
        return self._over or (self.in_form and bool(self._matcher.is_stopped()))

    @property
    def whole(self) -> bool:
        """Whether what was written is the form, so that the answer may end here."""
        return self.in_form and (self._over or bool(self._matcher.is_accepting()))

    @property
    def text(self) -> str:
        """What was written of the form."""
        return self._tokenizer.decode(self._written)

    def rewind(self, count: int) -> None:
        """See Constraint."""
        for _ in range(count):
            was_free, was_text, was_fence, was_over = self._taken.pop()
            if not was_free and not was_fence and not self._over:
                self._matcher.rollback(1)
                del self._written[-1]
            self._free, self._text, self._fence, self._over = was_free, was_text, was_fence, was_over

    def _check(self) -> None:
        if self._matcher.is_error():
            raise refusal(self._grammar.name, self._matcher.get_error())


def refusal(name: str, told: str) -> OptionError:
    """What llguidance finds wrong, in one line."""
    return OptionError(name, got=schema.told(" ".join(told.split())), want="a form that answers can be held to")


def _bits(tokens: Sequence[int], words: int) -> NDArray[np.uint32]:
    mask = np.zeros(words, np.uint32)
    for token in tokens:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return mask

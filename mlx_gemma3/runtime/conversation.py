"""A conversation: turns said one after another, on a timeline of its own.

The model's replies are kept as the ids it produced, not encoded again from their text, and each turn is prepared once.
Runs in the engine's thread; `engine.Session` is the handle that callers hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..errors import PromptError
from ..prompt import tools
from ..prompt.messages import items, role_of
from .events import ToolCall
from .timeline import Timeline, Tokens


@dataclass
class Turn:
    """One turn of the user's and the model's answer to it."""

    text: str  # what the user said
    images: int
    asked: Tokens  # from the border of the turn before to the model's own turn
    said: Tokens | None = None  # None while there is no answer
    reply: str = ""
    # of a checkpoint with a template of its own, as that reads it; None in a conversation from a file
    given: list[dict[str, Any]] | None = field(default=None, repr=False)
    calls: list[ToolCall] = field(default_factory=list)  # that the answer asks for


@dataclass
class Conversation:
    """What was said so far."""

    timeline: Timeline
    end_of_turn: int  # token id
    newline: tuple[int, ...]  # the ids of "\n"
    system: str | None = None
    exchanges: list[Turn] = field(default_factory=list)
    features: dict[str, mx.array] = field(default_factory=dict)  # (T, D) rows of its pictures by digest
    pixels: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # (S, S, 3) of those not yet encoded
    versions: set[str] = field(default_factory=set)  # digests of the files that it was read from or written to
    places: set[Path] = field(default_factory=set)  # where these were
    declared: list[dict[str, Any]] = field(default_factory=list)  # the tools that the model was told of
    own: bool = False  # written by the checkpoint's own template: each turn's tokens are those of the whole prompt
    thought: tuple[int, int] | None = None  # tokens around a thinking part, which is not kept
    turn: list[dict[str, Any]] | None = None  # of its own template, on the way

    def question(self, said: Any, images: int, declarations: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
        """The messages of the user's next turn: words, or content items with the places of its pictures; or what tools
        found. Tools that the model was not told of stand before it.

        Raises:
            PromptError: whole messages.
        """
        if not isinstance(said, str) and said and all(role_of(one) == "tool" for one in said):
            said = tools.plain(said)[0]["content"]
        if not isinstance(said, str) and any(isinstance(item, dict) and "role" in item for item in said):
            raise PromptError("turn", got="messages", want="words or content items", do="it knows the turns before")
        words = items(said, "turn")
        content = [*({"type": "image"} for _ in range(images)), *words] if isinstance(said, str) else words
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.system is not None and not self.exchanges:
            messages.insert(0, {"role": "system", "content": self.system})
        if declarations and list(declarations) != self.declared:
            self.declared = list(declarations)
            return tools.with_tools(messages, declarations)
        return messages

    def whole(self, turn: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All messages up to the user's next turn, for a template that writes them anew.

        Raises:
            PromptError: pictures that are not here any more.
        """
        made: list[dict[str, Any]] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for exchange in self.exchanges:
            if exchange.given is None and exchange.images:
                raise PromptError(
                    "conversation", got="pictures of a saved one", want="none: this checkpoint's own template writes "
                    "the whole conversation anew", do="begin a new one",
                )  # fmt: skip
            made += exchange.given or [{"role": "user", "content": exchange.text}]
            called = [{"type": "function", "id": one["id"], "function": one} for one in exchange.calls]
            made.append({"role": "assistant", "content": exchange.reply, **({"tool_calls": called} if called else {})})
        self.turn = turn
        return [*made, *turn]

    def ask(self, said: Any, asked: Tokens, images: int, pixels: Mapping[str, NDArray[np.float32]]) -> None:
        """Add a turn of the user's, prepared from its `question`.

        Args:
            pixels: (S, S, 3) of its pictures by digest.
        """
        text = "".join(item.get("text", "") for item in items(_results(said), "turn"))
        if self.own:
            turn, self.turn = self.turn or [], None
            self.pixels |= {name: view for name, view in pixels.items() if name not in self.features}
            self.exchanges.append(Turn(text, _pictures(turn), asked, given=turn))
            return
        if self.exchanges:  # the turn before ends with a newline, and <bos> was said once
            moved = tuple((start - 1, stop - 1) for start, stop in asked.spans)
            asked = Tokens(self.newline) + Tokens(asked.ids[1:], moved, asked.digests)
        self.pixels |= {name: view for name, view in pixels.items() if name not in self.features}
        self.exchanges.append(Turn(text, images, asked))

    def prompt(self) -> Tokens:
        """Everything up to the model's turn that comes next."""
        identity = self.timeline.identity
        tokens = Tokens((), adapter=None if identity is None else identity.adapter)
        for exchange in self.exchanges[-1:] if self.own else self.exchanges:
            tokens += exchange.asked
            if exchange.said is not None:
                tokens += exchange.said
                if exchange.said.ids[-1:] != (self.end_of_turn,):
                    tokens += Tokens((self.end_of_turn,))
        return tokens

    def answered(self, ids: Sequence[int], text: str, eos_ids: frozenset[int], calls: Sequence[ToolCall] = ()) -> None:
        """Keep the answer to the last turn. An end id other than <end_of_turn> is not part of the conversation, and no
        thinking part.
        """
        kept = tuple(ids)
        if self.thought is not None and kept[:1] == self.thought[:1]:
            kept = kept[kept.index(self.thought[1]) + 1 :] if self.thought[1] in kept else ()
        self.exchanges[-1].calls = list(calls)
        if kept and kept[-1] in eos_ids and kept[-1] != self.end_of_turn:
            kept = kept[:-1]
        self.exchanges[-1].said, self.exchanges[-1].reply = Tokens(kept), text

    def forget_answer(self) -> None:
        """The last turn is to be answered again. Raises PromptError when there is none."""
        if not self.exchanges:
            raise PromptError("conversation", got="no turn yet", want="one to answer again")
        self.exchanges[-1].said = None

    def withdraw(self) -> None:
        """Forget the last exchange. Raises PromptError when there is none."""
        if not self.exchanges:
            raise PromptError("conversation", got="no turn yet", want="one to go back to")
        self.exchanges.pop()
        self.drop_pixels()

    def drop_pixels(self) -> None:
        """Keep those of turns that are still there, which were cancelled before their pictures were encoded."""
        needed = {name for exchange in self.exchanges for name in exchange.asked.digests}
        self.pixels = {name: view for name, view in self.pixels.items() if name in needed}

    def rows(self, name: str, encode: Callable[[NDArray[np.float32] | None], mx.array]) -> mx.array:
        """(T, D) rows of a picture; `encode` makes them where it was not asked for before."""
        if name not in self.features:
            self.features[name] = encode(self.pixels.get(name))
            self.pixels.pop(name, None)
        return self.features[name]

    def messages(self) -> list[dict[str, Any]]:
        """As plain messages; a picture is an item of type image."""
        out: list[dict[str, Any]] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for exchange in self.exchanges:
            pictures = [{"type": "image"} for _ in range(exchange.images)]
            out.append({"role": "user", "content": [*pictures, {"type": "text", "text": exchange.text}]})
            if exchange.said is not None:
                out.append({"role": "assistant", "content": exchange.reply})
        return out


def _pictures(turn: Sequence[dict[str, Any]]) -> int:
    contents = [message.get("content") for message in turn]
    return sum(item.get("type") == "image" for content in contents if isinstance(content, list) for item in content)


def _results(said: Any) -> Any:
    """Messages of what tools found as the content of one turn; anything else as it is."""
    if isinstance(said, list) and said and all(role_of(one) == "tool" for one in said):
        return tools.plain(said)[0]["content"]
    return said

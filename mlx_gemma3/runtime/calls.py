"""Calls of tools out of an answer's text, as it comes: names and arguments, piece by piece."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable

from ..prompt.tool_calls import END, RESPONSE, START, read_call
from .events import ToolCall, ToolCallEvent

_HEAD = re.compile(r'\{"name": "([^"\\]+)", "parameters": ')


class Calls:
    """Follows an answer that its grammar lets be words or calls (grammar/tools.py)."""

    def __init__(self, put: Callable[[ToolCallEvent], None]) -> None:
        """put: takes the pieces of calls."""
        self.found: list[ToolCall] = []  # those that are whole
        self._put = put
        self._words: bool | None = None  # None before anything was written
        self._text = ""  # of calls, not looked at yet
        self._id, self._name = "", ""
        self._arguments: list[str] = []
        self._depth, self._quoted, self._escaped = 0, False, False

    def push(self, text: str) -> str:
        """Take more of the answer; returns what of it is words."""
        if self._words is None and text:
            self._words = text[0] not in "{["
        if self._words:
            return text
        self._text += text
        while self._text and self._step():
            pass
        return ""

    def finish(self) -> str:
        """The answer is over; returns what of it is words after all."""
        return ""

    def _step(self) -> bool:
        """Take a head or some arguments off the text; False when there is too little of it."""
        if not self._name:
            head = _HEAD.search(self._text)
            if head is None:
                return False
            self._name, self._id, self._text = head[1], _new_id(), self._text[head.end() :]
            self._tell("")
            return True
        end = self._end()
        piece, self._text = self._text[:end], self._text[end:]
        self._arguments.append(piece)
        self._tell(piece)
        if not self._depth:
            arguments = json.loads("".join(self._arguments))
            self.found.append({"id": self._id, "name": self._name, "arguments": arguments})
            self._name, self._arguments = "", []
        return True

    def _end(self) -> int:
        """How far the arguments go."""
        for place, letter in enumerate(self._text, start=1):
            if self._quoted:
                self._quoted = self._escaped or letter != '"'
                self._escaped = not self._escaped and letter == "\\"
            elif letter == '"':
                self._quoted = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if not self._depth:
                    return place
        return len(self._text)

    def _tell(self, arguments: str) -> None:
        at = len(self.found)
        self._put({"kind": "tool_call", "index": at, "call_id": self._id, "name": self._name, "arguments": arguments})


class FunctionCalls:
    """Follows an answer of FunctionGemma's: words, with calls between its own tokens. Each call comes whole."""

    def __init__(self, put: Callable[[ToolCallEvent], None]) -> None:
        """put: takes the calls, each as two pieces."""
        self.found: list[ToolCall] = []
        self._put = put
        self._call: str | None = None  # what was written of one that is open

    def push(self, text: str) -> str:
        """Take more of the answer, tokens by their names; returns what of it is words."""
        words = ""
        while text:
            if self._call is None:
                before, start, text = text.partition(START)
                words += before.replace(RESPONSE, "")
                if start:
                    self._call = ""
                continue
            self._call += text
            inside, end, text = self._call.partition(END)
            if not end:
                again = inside.find(START)
                if again < 0:
                    break
                inside, text = inside[:again], inside[again:]
            self._call = None
            words += self._take(inside, end)
        return words

    def finish(self) -> str:
        """The answer is over; returns what of it is words after all."""
        inside, self._call = self._call, None
        return "" if inside is None else self._take(inside.removesuffix(RESPONSE), "")

    def _take(self, inside: str, end: str) -> str:
        call = read_call(inside)
        if call is None:
            return f"{START}{inside}{end}"
        found = ToolCall(id=_new_id(), name=call["name"], arguments=call["arguments"])
        at = len(self.found)
        self.found.append(found)
        for arguments in ("", json.dumps(call["arguments"], ensure_ascii=False)):
            self._put(
                {
                    "kind": "tool_call",
                    "index": at,
                    "call_id": found["id"],
                    "name": found["name"],
                    "arguments": arguments,
                }
            )
        return ""


def _new_id() -> str:
    """A name for a call."""
    return f"call_{secrets.token_hex(12)}"

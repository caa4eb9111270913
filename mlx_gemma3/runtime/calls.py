"""Calls of tools out of an answer's text, as it comes: names and arguments, piece by piece."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable

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

    def _step(self) -> bool:
        """Take a head or some arguments off the text; False when there is too little of it."""
        if not self._name:
            head = _HEAD.search(self._text)
            if head is None:
                return False
            self._name, self._id, self._text = head[1], f"call_{secrets.token_hex(12)}", self._text[head.end() :]
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

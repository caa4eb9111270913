"""Tools that are really called: functions of the caller's, with what the model asks for, until it answers in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import OptionError
from ..grammar import tools as reading
from ..grammar.hints import instance, typed_arguments
from .events import ToolCall
from .stream import Messages, Reply

Asks = Callable[[str, Mapping[str, Any]], bool]  # a tool's name and arguments: whether it may run
Told = Callable[[str, str], None]  # a tool's name and what it found


class Functions:
    """Python's functions by the names that the model calls them by.

    Args:
        tools: functions; each has types for its arguments.
        asks: asked before a function runs; where it says no, the model is told that.
        told: told what it found.

    Raises:
        OptionError: a tool that is no function.
    """

    def __init__(self, tools: Sequence[Any], asks: Asks | None = None, told: Told | None = None) -> None:
        self._tools = {tool.name: tool for tool in reading.read(tools)}
        if missing := next((name for name, tool in self._tools.items() if tool.function is None), None):
            raise OptionError(f"tool {missing}", got="a description", want="a function, which can be run")
        self._asks, self._told = asks, told

    def results(self, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
        """Run what was asked for, one after another: a message of role tool for each.

        What a function raises is told to the model.
        """
        made = []
        for call in calls:
            content = self._run(call["name"], call["arguments"])
            if self._told is not None:
                self._told(call["name"], content)
            made.append({"role": "tool", "tool_call_id": call["id"], "name": call["name"], "content": content})
        return made

    def _run(self, name: str, arguments: dict[str, Any]) -> str:
        if self._asks is not None and not self._asks(name, arguments):
            return json.dumps({"error": "the user did not allow this call"})
        function = self._tools[name].function
        assert function is not None
        kinds = typed_arguments(function)
        try:
            found = function(**{key: instance(kinds[key], value) for key, value in arguments.items()})
            return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)
        except Exception as error:  # the caller's own code
            return json.dumps({"error": f"{type(error).__name__}: {error}"})


def run(
    generate: Callable[..., Reply],
    prompt: str | Messages,
    *,
    limit: int,
    asks: Asks | None,
    options: Mapping[str, Any],
) -> Reply:
    """See Engine.run."""
    if limit < 1:
        raise OptionError("limit", got=limit, want=">= 1")
    options = dict(options)
    if not options.get("tools"):
        raise OptionError("tools", got="none", want="functions")
    functions = Functions(options["tools"], asks)
    messages: list[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    for number in range(1, limit + 1):
        reply = generate(messages, **options)
        if not reply.tool_calls or number == limit:
            break
        if options.get("tool_choice") not in (None, "auto"):
            options["tool_choice"] = "auto"  # it was called: now it may answer
        messages += [
            {"role": "assistant", "content": None, "tool_calls": reply.tool_calls},
            *functions.results(reply.tool_calls),
        ]
    return reply

"""Tools: what callers hand in, the grammar of their calls, and calls as they are written.

A call is `{"name": "f", "parameters": {…}}`, several are a list (prompt/tools.py). An answer that does not begin as one
is words: where tools may be called, no words begin with a bracket or brace, nor with a fence of JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError
from .hints import parameters_of
from .schema import read as read_schema
from .schema import rule

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_WORDS = r"WORDS: /[^\s{\[`](.|\n)*|`{1,2}([^`](.|\n)*)?|```([^jt](.|\n)*)?/"
_WANT = 'a function, or {"type": "function", "function": {"name", "description", "parameters"}}'


@dataclass(frozen=True)
class Tool:
    """A function that the model may ask for."""

    name: str
    description: str
    parameters: Mapping[str, Any]  # a JSON schema of an object
    function: Callable[..., Any] | None = None  # None where the caller runs it

    @property
    def declaration(self) -> dict[str, Any]:
        """As the prompt says it."""
        about = {"description": self.description} if self.description else {}
        return {"name": self.name, **about, "parameters": dict(self.parameters)}


def read(tools: Sequence[Any]) -> list[Tool]:
    """Tools in any of the known shapes: Python's functions, OpenAI's two, Anthropic's.

    Raises:
        OptionError: none of these, or two of one name.
    """
    found = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
    names = [tool.name for tool in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise OptionError("tools", got=f"{twice} twice", want="a name for each")
    return found


def lark(tools: Sequence[Tool], *, choice: str, parallel: bool) -> str:
    """The grammar of an answer.

    Args:
        choice: "auto": calls or words; "required": calls; or the name of the one to call.
        parallel: whether it may hold several calls.

    Raises:
        OptionError: no tool of that name, or parameters that no grammar can promise.
    """
    chosen = [tool for tool in tools if choice in ("auto", "required", tool.name)]
    if not chosen:
        raise OptionError("tool_choice", got=choice, want="auto, none, required, or a tool's name")
    calls = 'call | "[" call (", " call)* "]"' if parallel else "call"
    lines = [f"start: {'WORDS | ' if choice == 'auto' else ''}{calls}", *([_WORDS] if choice == "auto" else [])]
    lines.append("call: " + " | ".join(f"call_{number}" for number in range(len(chosen))))
    for number, tool in enumerate(chosen):
        head = json.dumps('{"name": ' + json.dumps(tool.name) + ', "parameters": ')
        lines.append(f'call_{number}: {head} {rule(tool.parameters, f"tool {tool.name}: parameters")} "}}"')
    return "\n".join(lines) + "\n"


def _tool(tool: Any, where: str) -> Tool:
    if callable(tool) and not isinstance(tool, type):
        about, parameters = parameters_of(tool)
        return Tool(_name(getattr(tool, "__name__", None), where), about, parameters, tool)
    if not isinstance(tool, Mapping):
        raise OptionError(where, got=type(tool).__name__, want=_WANT)
    if tool.get("type") not in (None, "function", "custom") or (
        tool.get("type") == "custom" and "input_schema" not in tool
    ):
        raise OptionError(where, got=f"type {tool['type']!r}", want=_WANT)
    inner = tool.get("function", tool)
    if not isinstance(inner, Mapping):
        raise OptionError(where, got=type(inner).__name__, want=_WANT)
    name = _name(inner.get("name"), where)
    parameters = inner.get("parameters") or inner.get("input_schema") or {"properties": {}}
    schema = {"type": "object", **read_schema(parameters, f"tool {name}: parameters")}
    if schema["type"] != "object":
        raise OptionError(f"tool {name}: parameters", got=f"type {schema['type']}", want="type object")
    description = inner.get("description") or ""
    return Tool(name, description if isinstance(description, str) else str(description), schema)


def _name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise OptionError(f"{where}: name", got=name, want="1 to 64 letters, digits, dots, dashes, underscores")
    return name

"""Forms and tools as the dialects ask for them → the engine's options; calls as messages of OpenAI's kind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError
from ..runtime.events import ToolCall

_CHOICES = ("auto", "none", "required")


def answer_form(form: Mapping[str, Any] | None, name: str = "response_format") -> dict[str, Any]:
    """Options for OpenAI's response_format, or text.format of its Responses.

    Raises:
        RequestError: a form that is none of theirs.
    """
    kind = None if form is None else form.get("type")
    if form is None or kind in (None, "text"):
        return {}
    if kind == "json_object":
        return {"schema": {"type": "object"}}
    inner = form.get("json_schema", form) if kind == "json_schema" else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("schema"), Mapping):
        got = kind if inner is None else "no schema"
        raise RequestError(name, got=got, want="text, json_object, or json_schema with a schema")
    return {"schema": inner["schema"]}


def tool_options(tools: Sequence[Any] | None, choice: Any = None, parallel: bool | None = None) -> dict[str, Any]:
    """Options for tools as OpenAI's endpoints have them.

    Raises:
        RequestError: a choice that is none.
    """
    if not tools:
        if choice not in (None, "auto", "none"):
            raise RequestError("tool_choice", got=choice, want="none: there are no tools")
        return {}
    if isinstance(choice, Mapping):
        inner = choice.get("function", choice)
        choice = inner.get("name") if choice.get("type") == "function" and isinstance(inner, Mapping) else choice
    if choice is not None and not isinstance(choice, str):
        raise RequestError("tool_choice", got=json.dumps(choice), want=f"{', '.join(_CHOICES)}, or a function")
    return {"tools": list(tools), "tool_choice": choice, "parallel_tool_calls": parallel}


def openai_calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Calls as OpenAI's chat has them."""
    return [
        {"id": one["id"], "type": "function", "function": {"name": one["name"], "arguments": _text(one["arguments"])}}
        for one in calls
    ]


def from_responses(items: Sequence[Any]) -> list[Any]:
    """Items of OpenAI's Responses as messages: calls of one answer are one message."""
    made: list[Any] = []
    for item in items:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "function_call":
            call = {"id": item.get("call_id"), "function": {key: item.get(key) for key in ("name", "arguments")}}
            if made and made[-1].get("tool_calls"):
                made[-1]["tool_calls"].append(call)
            else:
                made.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif kind == "function_call_output":
            found = item.get("output")
            content = found if isinstance(found, str | list) else json.dumps(found)
            made.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        else:
            made.append(item)
    return made


def from_anthropic(messages: Sequence[Any]) -> list[Any]:
    """Anthropic's messages with calls and results as OpenAI has them, each result a message before the user's words."""
    made: list[Any] = []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        blocks = content if isinstance(content, list) else []
        kinds = [block.get("type") if isinstance(block, Mapping) else None for block in blocks]
        if "tool_use" not in kinds and "tool_result" not in kinds:
            made.append(message)
            continue
        rest = [block for block, kind in zip(blocks, kinds, strict=True) if kind not in ("tool_use", "tool_result")]
        calls = [block for block, kind in zip(blocks, kinds, strict=True) if kind == "tool_use"]
        for block, kind in zip(blocks, kinds, strict=True):
            if kind == "tool_result":
                found = "" if block.get("content") is None else block["content"]
                made.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": found})
        if calls:
            named = [
                {"id": one.get("id"), "function": {"name": one.get("name"), "arguments": one.get("input") or {}}}
                for one in calls
            ]
            made.append({**message, "content": rest or None, "tool_calls": named})
        elif rest:
            made.append({**message, "content": rest})
    return made


def anthropic_options(tools: Sequence[Any] | None, choice: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options for Anthropic's tools.

    Raises:
        RequestError: a choice that is none.
    """
    kind = (choice or {}).get("type", "auto")
    names = {"auto": "auto", "any": "required", "none": "none", "tool": (choice or {}).get("name")}
    if kind not in names or not isinstance(names[kind], str):
        raise RequestError("tool_choice", got=json.dumps(choice), want="auto, any, none, or tool with a name")
    return tool_options(tools, names[kind] if tools else None, not (choice or {}).get("disable_parallel_tool_use"))


def _text(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False)

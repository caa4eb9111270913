"""Tools in a prompt, as Google documents them for Gemma 3, which has no tokens of its own for them.

    user   You have access to functions. …  [declarations]  the question
    model  {"name": "f", "parameters": {"x": 1}}            several: [{…}, {…}]
    user   ```tool_output … ```                             what a tool found

Knows nothing of types or grammars: declarations come as plain objects.

Source: https://ai.google.dev/gemma/docs/capabilities/function-calling, the JSON form, and Google's guides for the
fence of results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..boundary.arguments import described, elements
from ..errors import PromptError
from .messages import role_of

_SAID = (
    "You have access to functions. If you decide to invoke any of the function(s),\n"
    "you MUST put it in the format of\n"
    '{"name": function name, "parameters": dictionary of argument name and its value}\n'
    "\n"
    "You SHOULD NOT include any other text in the response if you call a function\n"
)
RESULTS = ("tool", "function", "ipython")  # roles of a message that tells what a tool found


def declared(declarations: Sequence[Mapping[str, Any]]) -> str:
    """What is said of the tools, before the question."""
    return _SAID + json.dumps(list(declarations), indent=2, ensure_ascii=False) + "\n"


def with_tools(messages: Sequence[Any], declarations: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Messages of which the first of the user's begins with the declarations. Nothing else changes."""
    said, made, done = declared(declarations), [], False
    for message in messages:
        if not done and role_of(message) == "user":
            message, done = {**message, "content": _before(said, message.get("content"))}, True
        made.append(message)
    return made


def plain(messages: Any) -> Any:
    """Messages in which calls and results of tools are words of the model and of the user; others as they are.

    The results of one turn stand in the order of its calls, where they name these.

    Raises:
        PromptError: a call that is none, a result without content.
    """
    given = None if isinstance(messages, str | bytes | Mapping) else elements(messages)
    if given is None or not any(isinstance(one, Mapping) and _concerned(one) for one in given):
        return messages
    made: list[Any] = []
    order: list[Any] = []  # ids of the calls that were made last
    results: list[Mapping[str, Any]] = []
    for number, message in enumerate(given, start=1):
        if role_of(message) in RESULTS:
            if message.get("content") is None:
                raise PromptError(f"message {number}: content", got="none", want="what the tool found")
            results.append(message)
            continue
        if results:
            made.append(_found(results, order))
            results = []
        if isinstance(message, Mapping) and _calls(message):
            calls = elements(message["tool_calls"]) or []
            order = [one.get("id") if isinstance(one, Mapping) else None for one in calls]
            message = _called(message, calls, f"message {number}")
        made.append(message)
    return [*made, _found(results, order)] if results else made


def results_text(results: Sequence[str]) -> str:
    """What tools found, as the user's words."""
    return "\n".join(f"```tool_output\n{one}\n```" for one in results)


def written(calls: Sequence[tuple[str, Any]]) -> str:
    """Calls, (name, arguments), as the model writes them."""
    one = [json.dumps({"name": name, "parameters": given}, ensure_ascii=False) for name, given in calls]
    return one[0] if len(one) == 1 else "[" + ", ".join(one) + "]"


def _concerned(message: Mapping[str, Any]) -> bool:
    return role_of(message) in RESULTS or _calls(message)


def _calls(message: Mapping[str, Any]) -> bool:
    """Whether something stands where its calls would."""
    calls = message.get("tool_calls")
    return calls is not None and not (isinstance(calls, Sequence) and not calls)


def _called(message: Mapping[str, Any], calls: list[Any], where: str) -> dict[str, Any]:
    found = []
    for number, call in enumerate(calls, start=1):
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        name = inner.get("name") if isinstance(inner, Mapping) else None
        given: Any = inner.get("arguments", {}) if isinstance(inner, Mapping) else None
        if isinstance(given, str):
            try:
                given = json.loads(given or "{}")
            except ValueError:
                given = None
        if not isinstance(name, str) or not isinstance(given, Mapping):
            raise PromptError(f"{where}: tool call {number}", got=call, want='{"name", "arguments"}')
        found.append((name, given))
    try:
        text = written(found)
    except (TypeError, ValueError) as error:
        raise PromptError(f"{where}: tool calls", got=error, want="arguments that JSON has") from None
    content = message.get("content")
    rest = {key: value for key, value in message.items() if key not in ("tool_calls", "content")}
    if isinstance(content, str) or not content:
        return {**rest, "content": f"{content}\n{text}" if content else text}
    return {**rest, "content": [*(elements(content) or []), {"type": "text", "text": text}]}


def _found(results: list[Mapping[str, Any]], order: list[Any]) -> dict[str, Any]:
    """One turn of the user's with all results; pictures in one stay pictures."""
    place = {described(name): number for number, name in enumerate(order) if name is not None}
    results = sorted(results, key=lambda one: place.get(described(one.get("tool_call_id")), len(place)))
    contents = [one["content"] for one in results]
    if all(isinstance(content, str) for content in contents):
        return {"role": "user", "content": results_text(contents)}
    items: list[Any] = []
    for content in contents:
        inner = [{"type": "text", "text": content}] if isinstance(content, str) else elements(content) or []
        if isinstance(content, Mapping):
            try:
                inner = [{"type": "text", "text": json.dumps(content, ensure_ascii=False)}]
            except (TypeError, ValueError) as error:
                raise PromptError("what a tool found", got=error, want="a text, or values that JSON has") from None
        items += [_fence("```tool_output\n"), *inner, _fence("\n```\n")]
    return {"role": "user", "content": _joined(items)}


def _fence(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _joined(items: list[Any]) -> list[Any]:
    """Texts side by side as one: the template trims each by itself."""
    made: list[Any] = []
    for item in items:
        if made and all(isinstance(one, Mapping) and isinstance(one.get("text"), str) for one in (made[-1], item)):
            made[-1] = {"type": "text", "text": made[-1]["text"] + item["text"]}
        else:
            made.append(item)
    return made


def _before(said: str, content: Any) -> Any:
    if isinstance(content, str):
        return said + content
    first = {"type": "text", "text": said}
    return _joined([first, *(elements(content) or [] if not isinstance(content, Mapping) else [content])])

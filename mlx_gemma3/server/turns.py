"""Messages as clients send them → turns that alternate, as Gemma's template wants them.

Messages of one role in a row are one turn, an empty line between them. A system message later than the first is part of
the user's turn that follows, or of the last one. A last message of the assistant is gone on with.
"""

from __future__ import annotations

from typing import Any

from ..errors import PromptError

_BETWEEN = {"type": "text", "text": "\n\n"}


def merged(said: list[Any]) -> list[Any]:
    """Messages in the template's own form, alternating; what is no message is left for the template to judge.

    Raises:
        PromptError: content that is neither a text nor a list.
    """
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in said):
        return said
    for number, message in enumerate(said, start=1):
        content = message.get("content")
        if content is not None and not isinstance(content, str | list):
            raise PromptError(f"message {number}: content", got=type(content).__name__, want="a text or items")
    turns: list[dict[str, Any]] = []
    system: list[dict[str, Any]] = []
    for message in said:
        role = "assistant" if message["role"] == "model" else message["role"]
        if role == "system":
            if not turns:
                system.append(message)
                continue
            role = "user"
        if turns and turns[-1]["role"] == role:
            turns[-1] = {**turns[-1], "content": _joined([turns[-1], message])}
        else:
            turns.append({**message, "role": role})
    if system:
        content = _joined(system)
        text = content if isinstance(content, str) else "".join(item.get("text", "") for item in content)
        turns.insert(0, {"role": "system", "content": text})
    return turns


def goes_on(said: list[Any]) -> bool:
    """Whether the last message is the assistant's, so that the answer continues it."""
    if not said or not isinstance(said[-1], dict) or said[-1].get("tool_calls"):
        return False
    return said[-1].get("role") in ("assistant", "model")


def _joined(messages: list[dict[str, Any]]) -> Any:
    contents: list[Any] = [message.get("content") for message in messages]
    contents = [content for content in contents if content not in (None, "", [])]
    if all(isinstance(content, str) for content in contents):
        return "\n\n".join(contents)
    items: list[Any] = []
    for content in contents:
        if items:
            items.append(_BETWEEN)
        items += [{"type": "text", "text": content}] if isinstance(content, str) else content
    return items

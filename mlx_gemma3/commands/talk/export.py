"""A conversation as a document: Markdown to read, JSON to go on with elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...boundary.writing import refusal, write_whole
from ...errors import OptionError

Messages = Sequence[dict[str, Any]]


def write(path: Path, messages: Messages, model: str) -> None:
    """Write a conversation, for its owner only.

    Args:
        path: ends in .md or .json.
        messages: `{"role", "content"}` dicts; a picture's item may say its `path`.

    Raises:
        OptionError: another ending.
        OutputError: the file cannot be written; what was there before stays.
    """
    kinds = {".md": markdown, ".json": as_json}
    if path.suffix.lower() not in kinds:
        raise OptionError(f"/export {path.name}", got=path.suffix or "no ending", want=".md or .json")
    text = kinds[path.suffix.lower()](messages, model)
    try:
        write_whole(path, text.encode("utf-8", "backslashreplace"), follow=False)
    except OSError as error:
        raise refusal(path, error) from None


def as_json(messages: Messages, model: str) -> str:
    """{"model": …, "messages": […]}, as `Engine.generate` takes them."""
    return json.dumps({"model": model, "messages": list(messages)}, ensure_ascii=False, indent=2) + "\n"


def markdown(messages: Messages, model: str) -> str:
    """A heading for each turn; pictures as pictures where their place is known."""
    parts = [f"# A conversation with {model}"]
    headings = {"system": "System", "user": "You", "assistant": "Gemma"}
    for message in messages:
        parts.append(f"## {headings[message['role']]}")
        content = message["content"]
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts += [shown for item in items if (shown := _item(item))]
    return "\n\n".join(parts) + "\n"


def _item(item: dict[str, Any]) -> str:
    if item["type"] == "text":
        return str(item["text"]).strip()
    if "path" not in item:
        return "*(a picture)*"
    place = str(item["path"])  # or address
    return f"![{place.rpartition('/')[2]}](<{place}>)"

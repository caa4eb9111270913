"""What a client says of pictures and messages, in JSON: paths that are whole, addresses, and bytes in base64."""

from __future__ import annotations

import base64
import contextlib
import io
from pathlib import Path
from typing import Any

from ..prompt import messages
from ..prompt.address import opened, remote


def told(source: Any) -> dict[str, str]:
    """A picture of a request, as the protocol has it. The worker fetches addresses; of others it sees no text.

    Raises:
        PromptError, ImageError: it is no picture.
    """
    if remote(source):
        return {"url": source}
    content, _ = opened(source)
    if isinstance(content, str | Path):
        return {"path": absolute(content)}
    if isinstance(content, bytearray | memoryview):
        content = bytes(content)
    if not isinstance(content, bytes):
        from ..prompt.images import load_image

        buffer = io.BytesIO()
        load_image(content).save(buffer, "PNG", compress_level=1)
        content = buffer.getvalue()
    return {"base64": base64.b64encode(content).decode("ascii")}


def spoken(said: Any) -> Any:
    """Words, messages, or the items of one turn, with their pictures as `told` has them.

    Raises:
        PromptError, ImageError: an item that is neither text nor picture.
    """
    if isinstance(said, str):
        return said
    if all(isinstance(item, dict) and "role" in item for item in said):
        return [_message(message) for message in messages.read(said)]
    return [_item(item) for item in messages.items(said, "turn")]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return message | {"content": [_item(item) for item in content]}


def _item(item: dict[str, Any]) -> dict[str, Any]:
    return item if "image" not in item else {"type": "image", **told(item["image"])}


def absolute(path: str | Path) -> str:
    """The worker may have another working directory."""
    with contextlib.suppress(RuntimeError):  # `~name` of nobody, which the worker tells
        path = Path(path).expanduser()
    return str(Path(path).absolute())

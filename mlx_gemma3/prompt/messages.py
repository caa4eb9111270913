"""Messages as programs write them → messages as the template reads them. One place for every shape that is known.

    OpenAI chat          {"type": "text" | "image_url" | "refusal"}
    OpenAI Responses     {"type": "input_text" | "output_text" | "input_image"}
    Anthropic            {"type": "image", "source": {"type": "base64" | "url", …}}
    transformers         {"type": "image", "image" | "path" | "url" | "base64": …}
    LangChain            {"type": "image", "base64" | "url" | "data": …, "mime_type": …}, loose strings
    Gemini               {"text": …}, {"inline_data": {"mime_type", "data"}}; "parts" in the place of "content"
    Bedrock              {"text": …}, {"image": {"source": {"bytes": …}}}
    Ollama               "images" beside a message's "content"

What is none of these is refused by its name: an item that the template leaves out would be a picture that nobody sees.
Knows nothing of turns, and opens no picture.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..boundary.arguments import described, elements
from ..errors import PromptError, TemplateError
from .address import decoded

_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # type → where its text is
_PICTURES = ("image", "image_url", "input_image", "media", "inline_data")
_SOURCES = ("image", "path", "url", "base64", "image_url", "source", "data", "inline_data", "inlineData", "bytes")
_ELSEWHERE = ("file_id", "fileId", "file_uri", "fileUri", "id")  # pictures that some other machine keeps
_ASKS = ("tool_calls", "function_call", "functionCall", "audio")  # keys of a message that mean more than its content
_ROLES = {"developer": "system", "human": "user", "ai": "assistant"}  # other names of the template's roles
ROLES = ("system", "user", "assistant", "model")
_DO = "Gemma 3 reads text and pictures"


def read(messages: Any) -> Any:
    """Messages in the template's own form: new dicts, a picture's source under "image".

    What is no list of dicts, and content that is neither text nor items, is left for the template to judge.

    Raises:
        PromptError: an item that is no text and no picture, or a message that asks for more.
    """
    given = None if isinstance(messages, str | bytes | Mapping) else elements(messages)
    if given is None:
        return messages
    made = [_message(message, number) for number, message in enumerate(given, start=1)]
    if made and isinstance(made[0], dict) and isinstance(role := made[0].get("role"), str) and role == "system":
        made[0] = _system(made[0])
    return made


def kept(messages: Any) -> Any:
    """Messages for a checkpoint's own template: texts and pictures in its form, everything else as it is.

    Roles of LangChain's have their usual names, arguments of calls that a program wrote as JSON are objects, and what a
    tool found says the tool's name, where the call that asked for it is there. What is no list of dicts is left for
    the template to judge.

    Raises:
        PromptError: an item that is a picture of no known shape.
    """
    given = None if isinstance(messages, str | bytes | Mapping) else elements(messages)
    if given is None:
        return messages
    names: dict[Any, Any] = {}  # of tools by the ids of calls
    return [_kept(message, number, names) for number, message in enumerate(given, start=1)]


def _kept(message: Any, number: int, names: dict[Any, Any]) -> Any:
    if not isinstance(message, Mapping):
        return message
    where = f"message {number}"
    made = {key: value for key, value in message.items() if key not in ("images", "parts")}
    role = message.get("role", message.get("type"))
    if isinstance(role, str) and role != "developer" and ("role" in message or role in _ROLES or role in ROLES):
        made["role"] = {"human": "user", "ai": "assistant"}.get(role, role)
    if message.get("content") is None and message.get("parts") is not None:
        made["content"] = message["parts"]
    content = made.get("content")
    if not isinstance(content, str | bytes | Mapping) and made.get("role") != "tool" and content is not None:
        made["content"] = [
            _kept_item(item, f"{where}, item {place}") for place, item in enumerate(elements(content) or [], start=1)
        ]
    if message.get("images") is not None:
        said = made.get("content") or []
        said = [{"type": "text", "text": said}] if isinstance(said, str) else said
        made["content"] = [*_beside(message["images"], where), *said]
    if calls := elements(message.get("tool_calls") or ()):
        made["tool_calls"] = [_kept_call(call, names) for call in calls]
    if role == "tool" and message.get("name") is None and message.get("tool_call_id") in names:
        made["name"] = names[message["tool_call_id"]]
    return made


def _kept_item(item: Any, where: str) -> Any:
    if isinstance(item, str):
        return {"type": "text", "text": item}
    if not isinstance(item, Mapping):
        return item
    kind = item.get("type")
    known = (*_TEXTS, *_PICTURES, None)
    if kind in known and not (kind in (None, "image") and item.keys().isdisjoint(("text", *_SOURCES))):
        return {**{key: one for key, one in item.items() if key not in _SOURCES}, **_item(item, where)}
    return dict(item)


def _kept_call(call: Any, names: dict[Any, Any]) -> Any:
    if not isinstance(call, Mapping):
        return call
    inner = call.get("function", call)
    if not isinstance(inner, Mapping):
        return call
    inner = {**inner, "arguments": arguments_of(inner.get("arguments", {}))}
    names[call.get("id")] = inner.get("name")
    return {**call, "function": {key: value for key, value in inner.items() if key not in ("id", "type", "function")}}


def arguments_of(value: Any) -> Any:
    """Arguments of a call as templates want them: the object, where a program wrote its JSON."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value or "{}")
    except ValueError:
        return value
    return found if isinstance(found, dict) else value


def role_of(message: Any) -> str:
    """Of a message in whatever shape; "" where it has no role that is a text."""
    role = message.get("role") if isinstance(message, Mapping) else None
    return role if isinstance(role, str) else ""


def check_roles(messages: Iterable[Any]) -> None:
    """Refuse what no turn of Gemma 3's is for. The reference writes any name into the turn that is not the user's.

    Raises:
        TemplateError: a role that is none of ROLES.
    """
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role is not None and not (isinstance(role, str) and role in ROLES):
            tool = isinstance(role, str) and role in ("tool", "function", "ipython")
            raise TemplateError(
                f"message {number}: role",
                got=described(role),
                want=", ".join(ROLES),
                do="say what a tool found in a user message" if tool else "",
            )


def items(content: Any, where: str = "content") -> list[dict[str, Any]]:
    """The items of one turn's content: {"type": "text", "text"} and {"type": "image"}, this with "image" or without.

    Raises:
        PromptError: an item that is no text and no picture.
    """
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, Mapping):
        content = [content] if content else []
    given = None if isinstance(content, bytes | bytearray | memoryview) else elements(content)
    if given is None:
        raise PromptError(where, got=type(content).__name__, want="a text or a list of items")
    return [_item(item, f"{where}, item {number}") for number, item in enumerate(given, start=1)]


def _message(message: Any, number: int) -> Any:
    if not isinstance(message, Mapping):
        return message
    where = f"message {number}"
    for key in _ASKS:
        if message.get(key):
            raise PromptError(f"{where}: {key}", got="a value", want="none", do=_DO)
    made = {key: value for key, value in message.items() if key not in ("images", "parts")}
    role = message.get("role", message.get("type"))  # LangChain's own messages have a type
    if isinstance(role, str) and ("role" in message or role in _ROLES or role in ROLES):
        made["role"] = _ROLES.get(role, role)
    if message.get("content") is None and message.get("parts") is not None:
        made["content"] = message["parts"]
    elif "content" not in message and "role" in message:
        raise PromptError(f"{where}: content", got=f"none, only {', '.join(map(str, message))}", want="a text or items")
    content = made.get("content")
    if not isinstance(content, str | bytes | bytearray | memoryview) and (given := elements(content)) is not None:
        made["content"] = items(content if isinstance(content, Mapping) else given, where)
    pictures = message.get("images")
    if pictures is not None:
        made["content"] = [*_beside(pictures, where), *items(made.get("content") or [], where)]
    return made


def _system(message: dict[str, Any]) -> dict[str, Any]:
    """All the texts of a system message as one, for the template reads the first alone."""
    content = message.get("content")
    if not isinstance(content, list) or not content:
        return message
    if any(item["type"] == "image" for item in content):
        raise PromptError("system message", got="a picture", want="text", do="put pictures in a user message")
    return message | {"content": "".join(item["text"] for item in content)}


def _beside(pictures: Any, where: str) -> list[dict[str, Any]]:
    """Ollama's pictures: they stand before the message's words."""
    if isinstance(pictures, str | bytes) or not isinstance(pictures, Sequence):
        pictures = [pictures]
    return [_picture({"image": source}, "image", f"{where}: images") for source in pictures]


def _item(item: Any, where: str) -> dict[str, Any]:
    if isinstance(item, str):
        return {"type": "text", "text": item}
    if not isinstance(item, Mapping):
        raise PromptError(where, got=type(item).__name__, want="an object with a type, or a text")
    kind = item.get("type")
    if kind is not None and not isinstance(kind, str):
        raise PromptError(f"{where}: type", got=type(kind).__name__, want="a text")
    if kind is None:
        kind = next((key for key in ("text", *_SOURCES) if item.get(key) is not None), None)
        kind = "text" if kind == "text" else "image" if kind is not None else None
    if kind in _TEXTS:
        text = item.get(_TEXTS[kind])
        if not isinstance(text, str):
            got = type(text).__name__ if _TEXTS[kind] in item else f"none, only {', '.join(map(str, item))}"
            raise PromptError(f"{where}: {_TEXTS[kind]}", got=got, want="a text")
        return {"type": "text", "text": text}
    if kind in _PICTURES:
        return _picture(item, kind, where)
    got = f"type {kind!r}" if kind is not None else f"no type, and {', '.join(map(str, item)) or 'nothing else'}"
    raise PromptError(where, got=got, want="text or image", do=_DO)


def _picture(item: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    """A picture's item. Without a source it is a place for one of `images`, as in the reference."""
    key = next((key for key in _SOURCES if item.get(key) is not None), None)
    if key is None:
        kept = next((name for name in _ELSEWHERE[:-1] if item.get(name) is not None), None)
        if kept is not None or item.get("source_type") == "id":
            raise PromptError(where, got=f"a picture by its {kept or 'id'}", want="its address or its bytes")
        if kind != "image":
            raise PromptError(where, got=f"type {kind!r} without a picture", want="an address or bytes")
        return {"type": "image"}
    return {"type": "image", "image": _source(key, item[key], item, where)}


def _source(key: str, value: Any, item: Mapping[str, Any], where: str, depth: int = 0) -> Any:
    """The address, path, bytes or Pillow image that a key holds."""
    kind = item.get("mime_type") or item.get("mimeType") or item.get("media_type")
    if isinstance(kind, str) and "/" in kind and not kind.startswith("image/"):
        raise PromptError(where, got=f"data of type {kind!r}", want="a picture", do=_DO)
    if isinstance(value, Mapping):  # OpenAI's {"url", "detail"}, Anthropic's and Bedrock's source, Gemini's data
        inner = next(
            (name for name in ("url", "data", "source", "bytes", "base64") if value.get(name) is not None), None
        )
        if inner is None or depth > 2:
            got = f"a picture by its {', '.join(map(str, value))}" if value else "nothing"
            raise PromptError(f"{where}: {key}", got=got, want="its address or its bytes")
        return _source(inner, value[inner], value, where, depth + 1)
    if isinstance(value, str) and not value:
        raise PromptError(f"{where}: {key}", got="an empty text", want="an address, a path or base64")
    if key == "base64" or (key == "data" and isinstance(value, str)):
        return _unpacked(value, where)
    return value


def _unpacked(value: Any, where: str) -> bytes:
    from .images import format_of

    if isinstance(value, bytes | bytearray | memoryview):
        content = bytes(value)
        return content if format_of(content[:64]) is not None else decoded(content)
    if not isinstance(value, str):
        raise PromptError(f"{where}: base64", got=type(value).__name__, want="a text")
    return decoded(value)

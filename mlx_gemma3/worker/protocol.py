"""The lines of the worker: what a request may hold, and how a line becomes one.

Knows nothing of MLX or threads. docs/worker.schema.json says the same for other programs; a test compares the two.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from ..errors import RequestError
from ..prompt.address import is_address

VERSION = 1
ENDS = ("ok", "done", "error")  # each request gets exactly one event of these kinds, its last
AT_ONCE = ("cancel", "status", "shutdown")  # the others are done in the order in which they came
MAX_ID = 200  # characters of an id that is a string
Id = str | int


class Field(NamedTuple):
    """A field of a request."""

    kind: str  # of _KINDS
    needed: bool = False


_TURN = {"images": Field("pictures"), "options": Field("object")}
_SESSION = {"session": Field("text", True)}
REQUESTS: Mapping[str, Mapping[str, Field]] = {
    "load": {
        "model": Field("text", True),
        "dtype": Field("text"),
        "text_only": Field("bool"),
        "kv_bits": Field("int"),
        "local_kv_bits": Field("int"),
        "max_context": Field("int"),
        "parallel": Field("int"),
        "adapters": Field("object"),
        "draft": Field("text"),
        "speculation": Field("bool"),
        "force": Field("bool"),
    },
    "unload": {},
    "generate": {"prompt": Field("text"), "messages": Field("list"), **_TURN},
    "session.open": {**_SESSION, "system": Field("text"), "resume": Field("text"), "adapter": Field("text")},
    "session.send": {**_SESSION, "content": Field("content", True), **_TURN},
    "session.retry": {**_SESSION, "options": Field("object")},
    "session.undo": _SESSION,
    "session.messages": _SESSION,
    "session.save": {**_SESSION, "path": Field("text", True), "replace": Field("bool")},
    "session.close": _SESSION,
    "cancel": {"target": Field("id", True)},
    "status": {},
    "shutdown": {},
}

_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "text": ((str,), "a string"),
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "id": ((str, int), f"a whole number or a string of 1 to {MAX_ID} characters"),
    "object": ((dict,), "an object"),
    "list": ((list,), "a list of objects"),
    "content": ((str, list), "a string or a list of objects"),
    "pictures": ((list,), 'a list of {"path": …}, {"url": …} or {"base64": …}'),
}


def lines(source: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """Each line without its end; None in place of one with more than `limit` bytes, which is never held whole."""
    while line := source.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line.rstrip(b"\r\n")
            continue
        while (rest := source.readline(1 << 16)) and not rest.endswith(b"\n"):
            pass
        yield None


def decode(line: bytes) -> dict[str, Any]:
    """A line as an object. Raises RequestError when it is none."""
    try:
        message = json.loads(line.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise RequestError("line", got=f"{line[:40]!r} ({what})", want="a JSON object in UTF-8") from None
    if not isinstance(message, dict):
        raise RequestError("line", got=type(message).__name__, want="a JSON object")
    return message


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)


def identity(message: Mapping[str, Any]) -> Id:
    """The id of a request. Raises RequestError without a usable one."""
    value: Any = message.get("id")
    if not _is(value, "id"):
        raise RequestError("id", got=_short(value), want=_KINDS["id"][1])
    found: Id = value
    return found


def check(message: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The op of a request and its fields, of the right kinds; pictures as paths, addresses and bytes.

    Raises:
        RequestError: an unknown op or field, one that is missing, or of a wrong kind.
    """
    op = message.get("op")
    if not isinstance(op, str) or op not in REQUESTS:
        raise RequestError("op", got=_short(op), want=", ".join(REQUESTS))
    fields = REQUESTS[op]
    values = {name: value for name, value in message.items() if name not in ("id", "op")}
    for name, value in values.items():
        if name not in fields:
            raise RequestError(f"{op}: {name[:40]}", got="an unknown field", want=", ".join(fields) or "none")
        if not _is(value, fields[name].kind):
            raise RequestError(f"{op}: {name}", got=_short(value), want=_KINDS[fields[name].kind][1])
    missing = [name for name, field in fields.items() if field.needed and name not in values]
    if missing:
        raise RequestError(op, got=f"no {missing[0]}", want=", ".join(name for name in fields if fields[name].needed))
    if op == "generate" and ("prompt" in values) == ("messages" in values):
        raise RequestError(op, got="both or neither", want="either prompt or messages")
    if "images" in values:
        values["images"] = [_picture(item) for item in values["images"]]
    return op, values


def _is(value: object, kind: str) -> bool:
    types = _KINDS[kind][0]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        return False
    if kind == "id" and isinstance(value, str):
        return 1 <= len(value) <= MAX_ID
    return not isinstance(value, list) or all(isinstance(item, dict) for item in value)


def _picture(item: dict[str, Any]) -> Path | bytes | str:
    if set(item) == {"path"} and isinstance(item["path"], str):
        return Path(item["path"])
    if set(item) == {"url"} and is_address(item["url"]):
        return str(item["url"])
    if set(item) == {"base64"} and isinstance(item["base64"], str):
        try:
            return base64.b64decode(item["base64"], validate=True)
        except (ValueError, binascii.Error) as error:
            raise RequestError("images: base64", got=error, want="base64 of a picture file") from None
    raise RequestError("images", got=_short(item), want=_KINDS["pictures"][1])


def encode(event: Mapping[str, Any]) -> bytes:
    """An event as a line: ASCII, so that nothing between two programs can break it."""
    return json.dumps(event, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "…"

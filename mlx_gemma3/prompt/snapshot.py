"""A request as it is when it is made: what its caller changes afterwards changes nothing.

Everything in it that can change is copied: lists and dicts, buffers, Pillow images, of which a lazy one is read. Paths
and addresses stay, and are read when the request's turn comes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import ImageError, OptionError, PromptError

_DEPTH = 32  # of lists and dicts in one another; messages have five


def pictures(images: Any) -> list[Any]:
    """The pictures of a request: one alone as a list of one, None as none.

    Raises:
        OptionError: it is neither a picture nor a list.
    """
    if images is None:
        return []
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview) or is_image(images):
        return [images]
    if not isinstance(images, Sequence | Iterator):
        raise OptionError(
            "images", got=type(images).__name__, want="a list of paths, addresses, bytes or Pillow images"
        )
    return list(images)


def said(prompt: Any) -> Any:
    """The words or messages of a request, its own.

    Raises:
        PromptError: neither a text nor a list.
    """
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence | Iterator) or isinstance(prompt, bytes | bytearray | memoryview):
        do = "put it in a list" if isinstance(prompt, Mapping) else ""
        raise PromptError("prompt", got=type(prompt).__name__, want="a text, or a list of messages or items", do=do)
    return [copied(inner, 1) for inner in list(prompt)]


def copied(value: Any, depth: int = 0) -> Any:
    """The same, and its caller's no more."""
    if isinstance(value, str | int | float) or value is None or depth > _DEPTH:
        return value
    if isinstance(value, Mapping):
        return {key: copied(inner, depth + 1) for key, inner in dict(value).items()}
    if isinstance(value, list | tuple | Iterator):
        return [copied(inner, depth + 1) for inner in list(value)]
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if is_image(value):
        from .images import load_image

        try:
            return load_image(value)
        except ImageError:
            return value  # refused again, and told, when its turn comes
    return value


def is_image(value: object) -> bool:
    """Whether it is a Pillow image. Does not import Pillow: without it there is none."""
    kind = getattr(sys.modules.get("PIL.Image"), "Image", None)  # None too while another thread imports it
    return kind is not None and isinstance(value, kind)

"""Gemma 3 on MLX: words and pictures in, the reference's answer out.

The public names, loaded when first used: importing the package imports neither MLX nor Pillow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .boundary.system import check_system, keep_float32
from .errors import Gemma3Error

if TYPE_CHECKING:
    from .checkpoint.load import load_model
    from .config import Config
    from .convert import convert
    from .prompt import images
    from .prompt.chat_template import ChatTemplate
    from .prompt.processor import Processor, Prompt
    from .prompt.template import render_chat
    from .prompt.tokenizer import Tokenizer
    from .prompt.tool_calls import parse_tool_calls
    from .runtime.engine import Engine, Reply, Session, Stream, load
    from .tune import tune

__all__ = [
    "ChatTemplate",
    "Config",
    "Engine",
    "Gemma3Error",
    "Processor",
    "Prompt",
    "Reply",
    "Session",
    "Stream",
    "Tokenizer",
    "convert",
    "images",
    "load",
    "load_model",
    "parse_tool_calls",
    "render_chat",
    "tune",
]
__version__ = "0.1.0"

_HOME = {
    "ChatTemplate": "prompt.chat_template",
    "Config": "config",
    "Engine": "runtime.engine",
    "Processor": "prompt.processor",
    "Prompt": "prompt.processor",
    "Reply": "runtime.engine",
    "Session": "runtime.engine",
    "Stream": "runtime.engine",
    "Tokenizer": "prompt.tokenizer",
    "load": "runtime.engine",
    "load_model": "checkpoint.load",
    "parse_tool_calls": "prompt.tool_calls",
    "render_chat": "prompt.template",
}


keep_float32()


def __getattr__(name: str) -> Any:
    if name in __all__:
        check_system()
    if name in ("convert", "images", "tune"):  # packages that are called, and a module
        return import_module(f".{name}" if name != "images" else ".prompt.images", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Whether a checkpoint is tuned for chat: what its files say, and its name only where they say nothing.

A chat template means tuned. Google's own conversion writes one for the tuned checkpoints and none for the base ones
(transformers 5.23, convert_gemma3_weights.py), and who tunes a base checkpoint for chat adds one. `eos_token_id`
decides nothing: a fine-tune keeps that of its base, and transformers 5 saves `1` alone.

Without a template a name with the word "it", "instruct" or "chat" means tuned (older MLX uploads hold no template), and
the person is told. Words such as "pt" or "base" mean nothing: a checkpoint without a template is a base checkpoint
whatever it is called.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..boundary.gguf_header import GGUFHeader
from ..boundary.reading import read_json
from ..errors import ConfigError
from ..prompt.chat_template import ChatTemplate
from ..prompt.template_files import DEFAULT, TemplateFiles, find_templates
from ..visible import shortened, visible

_BLOB = re.compile(r"sha256[-:][0-9a-f]+")  # how Ollama calls its files
_WORDS = frozenset(("it", "instruct", "chat"))


def judge(name: str, template: ChatTemplate | None, others: Iterable[str]) -> tuple[bool, list[str]]:
    """Whether the checkpoint is tuned for chat, and what a person should know of how that was decided.

    Args:
        name: as the user said it.
        template: its chat templates, None without one.
        others: more names of it: the folder's or file's, what a GGUF calls itself.
    """
    shown = shortened(visible(name), 100)
    if template is not None:
        if template.reads("messages"):
            return True, []
        return True, [
            f"the chat template of {shown} does not read the messages and is not used: turns are written as Gemma 3 "
            "writes them"
        ]
    names = (name.rstrip("/").rpartition("/")[2], *others)
    if not _WORDS.intersection(word for one in names for word in re.split(r"[^a-z0-9]+", one.lower())):
        if _BLOB.fullmatch(names[0]) is None:
            return False, []
        return False, [
            f"{shown} holds no chat template, and its name does not say what it is: it completes text; to chat with "
            "it, link it under a name with -it"
        ]
    return True, [
        f"{shown} has no chat template: by its name it is tuned for chat, and turns are written as Gemma 3 writes "
        "them; generate --raw (raw=True) completes text instead"
    ]


def find_template(folder: Path) -> tuple[str, str] | None:
    """(file, text) of a folder's chat template; of several named ones the default. None without one.

    Raises:
        ConfigError: a file that cannot be read, or a template that is no text.
    """
    found = find_templates(folder, anywhere=True)
    if found is None:
        return None
    return found.file, found.texts.get(DEFAULT, next(iter(found.texts.values())))


def folder_template(folder: Path) -> ChatTemplate | None:
    """A folder's chat templates. Raises ConfigError: as `find_template`."""
    found = find_templates(folder, anywhere=True)
    return None if found is None else ChatTemplate(found)


def own_template() -> str:
    """A template that writes what `render_chat` does, for a checkpoint without one: the demo's."""
    values = read_json(Path(__file__).resolve().parent.parent / "demo" / "chat_template.json", ConfigError)
    text: str = values["chat_template"]
    return text


def gguf_template(header: GGUFHeader) -> str | None:
    """The chat template of a GGUF file."""
    template = header.settings.get("tokenizer.chat_template")
    return template if isinstance(template, str) and template.strip() else None


def gguf_templates(header: GGUFHeader) -> ChatTemplate | None:
    """The chat templates of a GGUF file."""
    template = gguf_template(header)
    return None if template is None else ChatTemplate(TemplateFiles({DEFAULT: template}, header.path.name))

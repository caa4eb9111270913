"""Where a checkpoint keeps its chat templates, and which of its files says the last word.

    of a tokenizer     chat_template.jinja and additional_chat_templates/NAME.jinja, where there is any of these;
                       else chat_template of tokenizer_config.json: a text, or a list of {"name", "template"}
    of a processor     chat_template of processor_config.json, else chat_template.json, else the .jinja files

A folder with the settings of a processor is read as one, and as a tokenizer's where it has no template for that. Knows
nothing of what stands in a template.

Source: transformers 5.23, tokenization_utils_base.py and processing_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..boundary.reading import open_regular, read_json
from ..errors import ConfigError

JINJA, JSON, SETTINGS, ADDITIONAL = (
    "chat_template.jinja", "chat_template.json", "tokenizer_config.json", "additional_chat_templates",
)  # fmt: skip
_OF_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_LARGEST = 256 << 10  # bytes of one template: the longest known has 17 thousand
DEFAULT, TOOL_USE = "default", "tool_use"
_TOKENS = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad", "mask")}


@dataclass(frozen=True)
class TemplateFiles:
    """The templates of a checkpoint."""

    texts: Mapping[str, str]  # by name; the one that is used unless another is asked for is "default"
    file: str  # where it stands, or another where it stands in none
    processor: bool = False  # of a processor, which takes "tool_use" only when it is asked for
    tokens: Mapping[str, str] = field(default_factory=lambda: dict(_TOKENS))  # special tokens: "bos_token" → "<bos>"

    @property
    def default(self) -> str | None:
        return self.texts.get(DEFAULT)


def find_templates(folder: Path, *, anywhere: bool = False) -> TemplateFiles | None:
    """A folder's templates; None without one.

    Args:
        anywhere: take chat_template.json for a tokenizer's too, which transformers does not.

    Raises:
        ConfigError: a file that cannot be read, or a template that is no text.
    """
    jinja = _jinja_files(folder)
    processor = any((folder / name).is_file() for name in _OF_PROCESSORS)
    found = _of_processor(folder, jinja) if processor else None
    of_processor = found is not None
    if found is None:
        found = (jinja, _place(jinja)) if jinja else _of_tokenizer(folder)
    if found is None and anywhere:
        found = _of_processor(folder, jinja)
    if found is None:
        return None
    return TemplateFiles(found[0], found[1], of_processor, _special_tokens(folder))


def _of_processor(folder: Path, jinja: dict[str, str]) -> tuple[dict[str, str], str] | None:
    settings = folder / _OF_PROCESSORS[0]
    if settings.is_file() and (found := _named(settings, _values(settings).get("chat_template"))):
        return found, settings.name
    if (path := folder / JSON).is_file() and (found := _named(path, _values(path).get("chat_template"))):
        if jinja.keys() - {DEFAULT}:
            got = f"{JSON} beside {ADDITIONAL}"
            raise ConfigError(f"{folder}: chat templates", got=got, want=f"{JINJA} beside it", do=f"remove {JSON}")
        return found, JSON
    return (jinja, _place(jinja)) if jinja else None


def _of_tokenizer(folder: Path) -> tuple[dict[str, str], str] | None:
    path = folder / SETTINGS
    found = _named(path, _values(path).get("chat_template")) if path.is_file() else {}
    return (found, SETTINGS) if found else None


def _jinja_files(folder: Path) -> dict[str, str]:
    found = {}
    if (path := folder / JINJA).is_file():
        found[DEFAULT] = _read(path)
    if (more := folder / ADDITIONAL).is_dir():
        found |= {path.name.removesuffix(".jinja"): _read(path) for path in sorted(more.glob("*.jinja"))}
    return {name: text for name, text in found.items() if text.strip()}


def _place(jinja: Mapping[str, str]) -> str:
    return JINJA if DEFAULT in jinja else ADDITIONAL


def _named(path: Path, value: Any) -> dict[str, str]:
    """Templates as JSON holds them: a text, or a list of {"name", "template"}."""
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        value = {str(item.get("name")): item.get("template") for item in value}
    else:
        value = {} if value is None else {DEFAULT: value}
    if not all(isinstance(text, str) for text in value.values()):
        raise ConfigError(f"{path}: chat_template", got="no text", want="a text or a list of named texts")
    return {name: text for name, text in value.items() if text.strip()}


def _special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens by the names that templates know them by."""
    found: dict[str, Any] = dict(_TOKENS)
    for name in ("special_tokens_map.json", SETTINGS):
        if (path := folder / name).is_file():
            values = _values(path)
            found |= {key: value for key, value in values.items() if key.endswith("_token")}
            if isinstance(more := values.get("extra_special_tokens"), Mapping):
                found |= more
    tokens = {name: one.get("content") if isinstance(one, Mapping) else one for name, one in found.items()}
    return {name: one for name, one in tokens.items() if isinstance(one, str)}


def _read(path: Path) -> str:
    try:
        with open_regular(path) as file:
            raw = file.read(_LARGEST + 1)
        if len(raw) > _LARGEST:
            raise ConfigError(f"{path}", got=f"more than {_LARGEST >> 10} kB", want="a chat template")
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}", got="bytes that are not UTF-8", want="a chat template") from None
    except OSError as error:
        raise ConfigError(f"{path}", got=error.strerror or error, want="a readable template") from None


def _values(path: Path) -> dict[str, Any]:
    values = read_json(path, ConfigError)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}", got=type(values).__name__, want="a JSON object")
    return values

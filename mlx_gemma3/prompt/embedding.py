"""A text, or token ids, as an embedding model reads it: prefix, prompt, text, suffix, cut to what the model takes."""

from __future__ import annotations

from dataclasses import dataclass

from ..embedder_config import EmbedderConfig
from ..errors import ContextError, OptionError, PromptError
from .tokenizer import Tokenizer

# What sentence-transformers takes for a prompt where a model has none of that name.
_OTHER_NAMES = {"document": ("passage", "corpus")}


@dataclass(frozen=True)
class EmbedText:
    """One text, ready to be read."""

    ids: tuple[int, ...]
    skipped: int = 0  # first tokens that do not count in the mean
    cut: int = 0  # tokens of the text that were left out at its end


def prompt_of(config: EmbedderConfig, kind: str | None) -> str:
    """The prompt of a name; of none the model's default, which may be none.

    Raises:
        OptionError: the model has no prompt of that name.
    """
    if kind is None:
        return "" if config.default_prompt is None else config.prompts[config.default_prompt]
    for name in (kind, *_OTHER_NAMES.get(kind, ())):
        if name in config.prompts:
            return config.prompts[name]
    known = ", ".join(config.prompts)
    do = "leave it out, or write the prompt into the texts" if not known else ""
    raise OptionError("kind", got=repr(kind), want=known or "none: this model has no prompts", do=do)


def read_text(tokenizer: Tokenizer, config: EmbedderConfig, text: str, prompt: str, *, truncate: bool) -> EmbedText:
    """The token ids of a text behind a prompt. The names of control tokens in it are these tokens, as in the reference.

    Args:
        truncate: cut what is too long; else refuse it.

    Raises:
        ContextError: more tokens than the model takes.
        PromptError: a text that UTF-8 cannot say.
    """
    ids = tokenizer.encode(prompt + text)
    room = config.max_length - len(config.prefix) - len(config.suffix)
    if len(ids) > room and not truncate:
        raise _too_long(len(ids) + config.max_length - room, config)
    whole = (*config.prefix, *ids[:room], *config.suffix)
    if not whole:
        raise PromptError("text", got="no tokens", want="at least one")
    skipped = 0
    if prompt and not config.include_prompt:  # as many as the prompt has alone, whatever it merges with
        skipped = len(config.prefix) + min(len(tokenizer.encode(prompt)), room)
    return EmbedText(whole, skipped, max(0, len(ids) - room))


def read_ids(config: EmbedderConfig, ids: list[int], vocabulary: int) -> EmbedText:
    """Token ids as they are: nothing is put around them.

    Args:
        vocabulary: how many rows the model has for ids.

    Raises:
        PromptError: none, or one that the model does not have.
        ContextError: more than the model takes.
    """
    if not ids or not all(0 <= token < vocabulary for token in ids):
        wrong = next((token for token in ids if not 0 <= token < vocabulary), "none")
        raise PromptError("token ids", got=wrong, want=f"at least one, each 0 to {vocabulary - 1}")
    if len(ids) > config.max_length:
        raise _too_long(len(ids), config)
    return EmbedText(tuple(ids))


def _too_long(count: int, config: EmbedderConfig) -> ContextError:
    return ContextError(
        "text", got=f"{count} tokens", want=f"at most {config.max_length}", do="cut it into parts, or let it be cut"
    )

"""What `evaluate` reads: a checkpoint in memory, alone or with an adapter beside its weights, and a text as ids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.adapter import read_adapter
from ..checkpoint.load import Checkpoint, load_model, open_checkpoint
from ..checkpoint.source import resolve
from ..errors import PromptError, TokenizerError
from ..model.runner import Runner, on_device
from ..prompt.tokenizer import Tokenizer

MIN_TOKENS = 16  # fewer say nothing


@dataclass(frozen=True, eq=False)
class Opened:
    """A checkpoint in memory: what `evaluate` reads, once for several comparisons."""

    name: str
    runner: Runner
    tokenizer: Tokenizer
    instruct: bool  # asked about pictures in a chat; else it completes a text
    notes: tuple[str, ...] = ()  # of the checkpoint
    adapter: str | None = None  # its name in the runner


def open_model(
    source: str | Path | Checkpoint, *, dtype: str = "auto", text_only: bool = True, adapter: str | Path | None = None
) -> Opened:
    """Load a checkpoint for `evaluate`. Arguments and errors are those of `load_model`; not a download bar."""
    if not isinstance(source, Checkpoint):
        source = open_checkpoint(resolve(source, text_only=text_only, quiet=True), text_only=text_only)
    model = load_model(source, dtype=dtype, text_only=text_only)
    opened = Opened(source.name, on_device(model), source.tokenizer(), source.instruct, source.notes)
    return opened if adapter is None else with_adapter(opened, adapter, text_only=text_only)


def with_adapter(opened: Opened, adapter: str | Path, *, text_only: bool = True) -> Opened:
    """The same weights with an adapter beside them. Raises what `load_model` does."""
    read = read_adapter(adapter, opened.runner.config, model=opened.name, text_only=text_only)
    opened.runner.add_adapter(read.fingerprint, read.matrices)
    name = f"{opened.name} with {read.path.name}"
    return replace(opened, name=name, adapter=read.fingerprint, notes=(*opened.notes, *read.notes))


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        PromptError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PromptError(f"{path}", got=error.strerror or error, want="a readable text file") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}", got=f"bytes that are not UTF-8 at {error.start}", want="a text file") from None


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, names of control tokens as plain characters. Raises PromptError where they are too few."""
    ids = tokenizer.encode(text, special=False)
    if len(ids) < MIN_TOKENS:
        raise PromptError("text", got=f"{len(ids)} tokens", want=f"at least {MIN_TOKENS}")
    return ids


def check_vocabularies(one: Opened, other: Opened) -> None:
    """Refuse two vocabularies that say different things with the same ids.

    One may have control tokens more at its end: GGUF files lack <image_soft_token>.
    """
    short, long = sorted((one, other), key=lambda subject: subject.tokenizer.vocab_size)
    for token in range(long.tokenizer.vocab_size):
        piece, same = long.tokenizer.piece(token), short.tokenizer.piece(token)
        extra = token >= short.tokenizer.vocab_size and token in long.tokenizer.special_ids
        if piece != same and not extra:
            raise TokenizerError(
                f"vocabularies of {long.name} and {short.name}",
                got=f"{piece!r} and {same!r} for id {token}",
                want="the same",
                do="only checkpoints with one vocabulary can be compared",
            )

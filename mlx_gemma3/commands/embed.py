"""`mlx-gemma3 embed`: texts to vectors, from files or from the lines of standard input."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import typer

from ..boundary.writing import check_writable, write_whole
from ..errors import OptionError, PromptError
from .streams import Piped
from .terminal import Status, emit, print_notes, say, tell

_MOST_NOTES = 3
_BEAT = 0.2  # seconds between two looks at how far it is


def embed(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text files in UTF-8, each of them one text; none, or -, for the lines of standard input.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Alias, folder, owner/name on the Hub, or .gguf file.")
    ] = "embeddinggemma-300m",
    kind: Annotated[
        str | None,
        typer.Option(help="The name of the prompt before each text: query, document, …", show_default="the model's"),
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option(help="Only the first numbers of each vector.", show_default="all")
    ] = None,
    normalize: Annotated[bool, typer.Option(help="Bring vectors that were cut to length 1 again.")] = True,
    lines: Annotated[bool, typer.Option("--lines", help="Each line of a file is a text.")] = False,
    npy: Annotated[
        Path | None, typer.Option(help="Write the vectors into this NumPy file, float32.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Load even where memory will not do.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for each text.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")] = False,
) -> None:
    """Turn texts into vectors with an embedding model: a line of numbers for each text, in their order."""
    if npy is not None and as_json:
        raise OptionError("--npy", got="--json as well", want="one or the other")
    if npy is not None:
        npy = check_writable(npy)
    names, texts = _texts(files or ["-"], lines=lines)
    if not texts:
        raise PromptError("texts", got="none", want="a file, or lines on standard input")

    from ..runtime.engine import Engine

    status = Status(not quiet and not as_json)
    status.show(f"loading {model}")
    with Engine(model, dtype=dtype, text_only=True, force=force, quiet=quiet or as_json) as engine:
        status.clear()
        print_notes(engine.about["notes"], quiet=quiet)
        work = engine.embedding(texts, kind=kind, dimensions=dimensions, normalize=normalize)
        while not work.wait(_BEAT):
            status.bar(work.done, work.total, f"{work.done:,} of {work.total:,} texts")
        status.clear()
        vectors = work.array()
    if not quiet:
        _tell_cuts([(name, cut) for name, cut in zip(names, work.cut, strict=True) if cut], max(work.tokens))
    if npy is not None:
        write_whole(npy, _npy(vectors), mode=0o666)
        return
    for name, tokens, cut, vector in zip(names, work.tokens, work.cut, vectors, strict=True):
        if as_json:
            emit({"text": name, "tokens": tokens, "cut": cut, "embedding": vector.tolist()})
        else:
            say(" ".join(f"{number:.9g}" for number in vector.tolist()))


def _tell_cuts(cuts: list[tuple[str, int]], most: int) -> None:
    """Which texts were too long."""
    for name, cut in cuts[:_MOST_NOTES]:
        tell(f"note: {name}: its last {cut:,} tokens were cut off; the model reads {most:,}")
    if len(cuts) > _MOST_NOTES:
        tell(f"note: {len(cuts) - _MOST_NOTES:,} more texts were cut off; --json shows which")


def _texts(files: list[str], *, lines: bool) -> tuple[list[str], list[str]]:
    """Names for messages, and the texts.

    Raises:
        PromptError: a file that cannot be read or is not UTF-8.
        OptionError: standard input twice.
    """
    if files.count("-") > 1:
        raise OptionError("FILES", got="- twice", want="standard input once")
    names, texts = [], []
    for file in files:
        text = _piped() if file == "-" else _read(file)
        if lines or file == "-":
            found = text.split("\n")
            found = found[:-1] if found[-1] == "" else found
            names += [f"line {n}" if file == "-" else f"{file}:{n}" for n in range(1, len(found) + 1)]
            texts += [line.removesuffix("\r") for line in found]
        else:
            names.append(file)
            texts.append(text)
    return names, texts


def _read(file: str) -> str:
    from ..measure.evaluate import read_text

    return read_text(Path(file))


def _piped() -> str:
    try:
        return Piped(None).content().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError("standard input", got=f"bytes that are not UTF-8 at {error.start}", want="text") from None


def _npy(vectors: Any) -> bytes:
    import numpy as np

    file = io.BytesIO()
    np.save(file, vectors)
    return file.getvalue()

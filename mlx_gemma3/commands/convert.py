"""`mlx-gemma3 convert`: a checkpoint to MLX's packed groups, or back to plain weights."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from ..visible import visible
from .terminal import Status, emit, print_notes, say


def convert(
    source: Annotated[str, typer.Argument(help="Alias, folder, owner/name on the Hub, or .gguf file.")],
    out: Annotated[
        Path | None, typer.Argument(help="The folder to make.", show_default="the source's name with its bits")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="2, 3, 4, 5, 6 or 8.", show_default="4; a GGUF keeps its own")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="32, 64 or 128.", show_default="64")] = None,
    mode: Annotated[str, typer.Option(help="affine, mxfp4, mxfp8 or nvfp4.")] = "affine",
    preset: Annotated[
        str | None, typer.Option(help="small, balanced or quality, instead of bits and group.", show_default=False)
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN=BITS[:GROUP], PATTERN=MODE or PATTERN=none; again for more.", show_default=False),
    ] = None,
    search: Annotated[
        bool,
        typer.Option(
            "--search",
            help="Try several ranges for each group: slower, closer. Presets small and balanced do.",
        ),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of plain tensors, scales and biases: float32, bfloat16 or float16.",
            show_default="bfloat16; from a GGUF, what rounds nothing",
        ),
    ] = None,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="Write plain weights.")] = False,
    text_only: Annotated[bool, typer.Option("--text-only", help="Leave the vision tower out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    compare: Annotated[
        Path | None,
        typer.Option(help="A text file on which to compare the result with the source.", show_default=False),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="The folder of an adapter, to be melted in.", show_default=False)
    ] = None,
    upload: Annotated[
        str | None, typer.Option(help="Then upload it to this repository, owner/name.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")] = False,
) -> None:
    """Write a checkpoint as a folder that every MLX program loads, and say what was lost."""
    from ..convert.converter import convert as run
    from ..measure.evaluate import read_text

    if out is None:
        out = Path(_name(source, adapter=adapter, bits=bits, mode=mode, preset=preset, dequantize=dequantize))
    text = read_text(compare) if compare is not None else None
    if upload is not None:
        from ..convert.upload import check_repository

        check_repository(upload)
    status = Status(not quiet and not as_json)

    def progress(done: int, total: int, name: str) -> None:
        status.bar(done, total, name.removeprefix("language_model.").removesuffix(".weight"))

    with _leaving_nothing():
        report = run(
            source,
            out,
            bits=bits,
            group_size=group_size,
            mode=mode,
            preset=preset,
            overrides=override or [],
            search=search,
            dtype=dtype,
            dequantize=dequantize,
            text_only=text_only,
            overwrite=overwrite,
            compare=text,
            adapter=adapter,
            quiet=quiet or as_json,
            command=visible(shlex.join(["mlx-gemma3", *sys.argv[1:]])),
            progress=progress,
        )
    status.clear()
    print_notes(report.notes, quiet=quiet)
    if not as_json:
        say(report.text())
    url = None
    if upload is not None:
        from ..convert.upload import upload as send

        url = send(out, upload, quiet=quiet or as_json)
    if as_json:
        emit(report.to_dict() | {"url": url})
    elif url:
        say(f"\n{url}")


@contextlib.contextmanager
def _leaving_nothing() -> Iterator[None]:
    """Ctrl-C, a hang-up or the request to end leave at once, and the half of a folder does not stay."""
    from ..convert import output

    def end(number: int, _: FrameType | None) -> None:
        for name in _ENDS:
            signal.signal(name, signal.SIG_IGN)
        output.abandon()
        os._exit(128 + number)

    before = {name: handler for name in _ENDS if (handler := signal.getsignal(name)) not in (None, signal.SIG_IGN)}
    for name in before:
        signal.signal(name, end)
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _name(
    source: str, *, adapter: Path | None, bits: int | None, mode: str, preset: str | None, dequantize: bool
) -> str:
    """The source's last name with what is done to it: gemma-3-4b-it-4bit."""
    stem = Path(source.rstrip("/")).name.removesuffix(".gguf").partition("@")[0]
    if adapter is not None:
        stem += f"-{adapter.resolve().name.removesuffix('.adapter')}"
    if dequantize:
        return f"{stem}-plain"
    if preset is not None or mode != "affine":
        return f"{stem}-{preset or mode}"
    if bits is None and source.endswith(".gguf"):
        return f"{stem}-mlx"
    return f"{stem}-{bits or 4}bit"

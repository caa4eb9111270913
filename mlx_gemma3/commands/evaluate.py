"""`mlx-gemma3 evaluate`: how well a checkpoint predicts a text, and how far it is from another one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError
from .terminal import Status, emit, print_notes, say


def evaluate(
    model: Annotated[str, typer.Argument(help="Alias, folder, owner/name on the Hub, or .gguf file.")],
    text: Annotated[
        Path | None, typer.Option(help="A text file in UTF-8; needed unless there are pictures.", show_default=False)
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The checkpoint to compare with, named likewise.", show_default=False)
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="The folder of an adapter, for the model.", show_default=False)
    ] = None,
    against_adapter: Annotated[
        Path | None, typer.Option(help="Another, for the checkpoint to compare with.", show_default=False)
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            "-i",
            help="A picture to compare on; again for more. Needs --against.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of the text that are read together.")] = 2048,
    max_tokens: Annotated[int | None, typer.Option(help="Only the text's first ones.", show_default="all")] = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Leave the vision tower out.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the divergence into this .png or .svg. Needs --against.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")] = False,
) -> None:
    """Measure perplexity on a text, and with --against the divergence from another checkpoint, on pictures too."""
    from ..measure.evaluate import evaluate as run
    from ..measure.evaluate import read_text

    if plot is not None:
        from ..measure.plot import check_plot

        if against is None:
            raise OptionError("--plot", got="one checkpoint", want="--against as well")
        check_plot(plot)
    words = read_text(text) if text is not None else ""
    status = Status(not quiet and not as_json)
    evaluation = run(
        model,
        text=words,
        against=against,
        adapter=adapter,
        against_adapter=against_adapter,
        images=[str(path) for path in image or []],
        window=window,
        max_tokens=max_tokens,
        dtype=dtype,
        text_only=text_only,
        progress=lambda what, done, total: status.show(what if not total else f"reading {what}", done, total),
    )
    status.clear()
    print_notes(evaluation.notes, quiet=quiet)
    if plot is not None:
        from ..measure.plot import plot as draw

        draw(evaluation, plot)
    if as_json:
        emit(evaluation.to_dict())
    else:
        say(evaluation.text())

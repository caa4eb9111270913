"""The command line: `mlx-gemma3`. The answer goes to stdout, everything else to stderr.

Exit status: 0 done, 1 an error of ours (one line: what, and what to do), 2 usage, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from typing import Annotated

import typer

from .commands.bench import bench
from .commands.chat import chat
from .commands.convert import convert
from .commands.evaluate import evaluate
from .commands.fit import fit
from .commands.generate import generate
from .commands.inspect import inspect
from .commands.terminal import leave
from .commands.worker import worker
from .errors import Gemma3Error

app = typer.Typer(
    name="mlx-gemma3",
    help="Gemma 3 on Apple Silicon, on MLX: words and pictures, exact and fast.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    pass


app.command()(generate)
app.command()(chat)
app.command()(convert)
app.command()(evaluate)
app.command()(inspect)
app.command()(fit)
app.command()(bench)
app.command()(worker)


def main() -> None:
    """Run the program; an error of ours is one line on stderr."""
    signal.signal(signal.SIGINT, leave)
    # Pillow warns of corrupt EXIF data; the picture is read all the same, and errors come as ImageError.
    warnings.filterwarnings("ignore", module="PIL")
    try:
        app()
    except Gemma3Error as error:
        sys.stdout.flush()
        typer.echo(f"mlx-gemma3: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        # The reader went away (`… | head`): nobody to write to, nothing to say.
        os._exit(1)


if __name__ == "__main__":
    main()

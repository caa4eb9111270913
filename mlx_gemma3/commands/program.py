"""The program as a whole: its commands, and what becomes of an error."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections import UserDict
from importlib import import_module
from typing import Annotated, Any

import typer

from ..boundary.launch import launched
from ..boundary.system import check_system
from ..errors import Gemma3Error, OptionError
from ..visible import one_line
from .machines import ALONE, ON_MACHINES, follow_first
from .streams import OutputLost
from .terminal import say, tell

_NAMES = (
    "generate",
    "chat",
    "embed",
    "classify",
    "convert",
    "tune",
    "evaluate",
    "inspect",
    "fit",
    "bench",
    "serve",
    "worker",
)


class _Commands(UserDict[str, Any]):
    """By name; a command's file is imported when it is asked for, so that none waits for the others."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(_NAMES))

    def __getitem__(self, name: str) -> Any:
        if self.data[name] is None:
            alone = typer.Typer(add_completion=False)
            alone.command()(getattr(import_module(f".{name}", __package__), name))
            self.data[name] = typer.main.get_command(alone)
        return self.data[name]


class _Program(typer.core.TyperGroup):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Commands()


app = typer.Typer(
    name="mlx-gemma3",
    cls=_Program,
    help="Gemma 3 on Apple Silicon, on MLX: words and pictures, exact and fast.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_UsageError: Any = typer.BadParameter.__base__  # of click, or of the copy of it that is in typer
_ClickError: Any = _UsageError.__base__


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        say(__version__)
        raise typer.Exit


@app.callback()
def _program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    check_system()
    if launched() and context.invoked_subcommand in ON_MACHINES:
        follow_first()
    elif launched() and context.invoked_subcommand in ALONE:
        raise OptionError(
            context.invoked_subcommand, got="several machines (mlx.launch)", want="one", do="run it without mlx.launch"
        )


def run() -> int:
    """Run the command that was asked for; returns the exit status."""
    # Pillow warns of corrupt EXIF data; the picture is read all the same, and errors come as ImageError.
    warnings.filterwarnings("ignore", module="PIL")
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except Gemma3Error as error:
        with contextlib.suppress(OutputLost):
            sys.stdout.flush()
        tell(f"mlx-gemma3: {error}")
        return 1
    except _ClickError as error:
        return _usage(error)
    except BrokenPipeError:
        # The reader went away (`… | head`): nobody to write to, nothing to say.
        os._exit(1)
    except typer.Abort:
        return 1
    except Exception:  # nobody foresaw it: the frames help whoever mends it
        tell(traceback.format_exc().rstrip("\n"))
        return 1


def _usage(error: Any) -> int:
    """Say what is wrong with the words of the command line."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return int(error.exit_code)
    context = getattr(error, "ctx", None)
    if context is not None:
        tell(one_line(context.get_usage()))
    command = context.command_path if context is not None else "mlx-gemma3"
    tell(f"mlx-gemma3: {one_line(error.format_message())} (see {command} --help)")
    return int(error.exit_code)

"""`mlx-gemma3 chat`: a conversation at a terminal, or with a program that writes questions line by line."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..boundary.writing import check_writable
from ..errors import Gemma3Error, OptionError, PromptError
from .adapters import only
from .answers import answering
from .speculation import Draft, Off, guessed_by
from .streams import OutputLost, was_closed
from .terminal import leave, own

if TYPE_CHECKING:
    from ..runtime.engine import Engine, Session
    from .talk.input import Input
    from .talk.screen import Terminal
    from .talk.talk import ChatState


@answering(talk=True)
def chat(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Alias, folder, owner/name on the Hub, or .gguf file.")
    ] = "gemma-3-4b-it",
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            "-i",
            help="A picture for the first question, its path or its address; again for more.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="Said before the first turn.", show_default=False)] = None,
    session: Annotated[
        Path | None,
        typer.Option(help="Go on with the conversation in this file, and keep it there.", show_default=False),
    ] = None,
    tools: Annotated[
        Path | None,
        typer.Option(help="A Python file: the model may ask for its functions, and you are asked.", show_default=False),
    ] = None,
    *,
    options: dict[str, Any],
    adapter: Annotated[
        list[str] | None, typer.Option(help="An adapter to answer with, as NAME=PATH or PATH.", show_default=False)
    ] = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Leave the vision tower out.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    kv_bits: Annotated[int, typer.Option(help="Bits of cached keys and values: 16, 8 or 4.")] = 16,
    max_context: Annotated[
        int | None, typer.Option(help="Most tokens of the conversation.", show_default="the model's")
    ] = None,
    draft: Draft = None,
    no_speculation: Off = False,
    force: Annotated[bool, typer.Option("--force", help="Load even where memory will not do.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes: answers and errors only.")] = False,
) -> None:
    """Talk with a model, in words and pictures. /help shows the commands."""
    from ..prompt.address import is_address
    from ..runtime.fetching import must_be_fetched
    from .talk.loading import Loading
    from .talk.screen import Plain, Screen, Terminal
    from .talk.settings import Settings
    from .talk.signals import Leave, as_exceptions
    from .talk.talk import ChatState
    from .talk.tools import Tools

    settings, adapters, guesses = Settings(options), only(adapter), guessed_by(draft, off=no_speculation)
    if was_closed(0):
        raise PromptError("standard input", got="a closed one", want="questions")
    if image and text_only:
        raise OptionError("--image", got="--text-only as well", want="one or the other")
    session = None if session is None else check_writable(session)
    resume = session if session is not None and session.exists() else None
    if resume is not None and system is not None:
        raise OptionError("--system", got="a text for a conversation that has begun", want="none")

    def make_engine() -> Engine:
        from ..runtime.engine import load

        return load(
            model,
            dtype=dtype,
            text_only=text_only,
            kv_bits=kv_bits,
            max_context=max_context,
            adapters=adapters,
            **guesses,
            force=force,
            quiet=quiet or hidden,
        )

    def make_session(engine: Engine) -> Session:
        return engine.session(system=system, resume=resume, adapter=next(iter(adapters), None))

    terminal = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    at = Terminal(quiet=quiet) if terminal else None
    screen: Screen = at or Plain(quiet=quiet)
    hidden = not (terminal and must_be_fetched(model))
    loading = Loading(model, make_engine, make_session)
    talk = ChatState(loading, screen, settings, system, session, next(iter(adapters), None))
    if tools is not None:
        talk.tools = Tools(tools, screen)
    for source in image or []:
        if source == "-":
            raise PromptError(
                "--image -", got="standard input", want="a path or an address", do="questions come from there"
            )
        talk.attach(source if is_address(source) else Path(source))
    asker = _input(talk) if terminal else None
    loading.start()  # from here on it wants the processor too
    status: int = 0
    try:
        with _as_found(at is not None), as_exceptions():
            if at is None or asker is None:
                status = _line_by_line(talk)
            else:
                status = _at_a_terminal(talk, at, asker, wait=not hidden)
    except Leave as left:
        status = int(left.code or 0)
    except KeyboardInterrupt:
        status = 130
    finally:
        signal.signal(signal.SIGINT, leave)
        if loading.ended() and loading.failure is None:
            talk.save_or_beside()
            talk.engine.close()
    if not loading.ended() or status == 128 + signal.SIGHUP:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)  # not waiting for a model that nobody wants; with no terminal to say anything to
    raise typer.Exit(status)


def _input(talk: ChatState) -> Input:
    """The line that is typed on, and what stands below it."""
    from ..boundary.paths import data_folder
    from .talk.input import Input

    def state() -> str:
        name = talk.loading.model
        waiting = ", ".join(picture.name for picture in talk.pictures)
        parts = [name if talk.loading.ended() else f"loading {name} …", "editing" if talk.editing else ""]
        return " · ".join(filter(None, [*parts, f"with {waiting}" if waiting else "", "Esc Enter: new line"]))

    return Input(data_folder() / "chat_history", talk.loading, state)


def _at_a_terminal(talk: ChatState, screen: Terminal, asker: Input, *, wait: bool) -> int:
    """Ask and answer until the person leaves; returns the exit status."""
    if wait:
        _ = talk.session
    on = f" · goes on with {talk.file}" if talk.file is not None and talk.file.exists() else ""
    talk.screen.note(f"{talk.loading.model}{on} · /help shows the commands, Ctrl-D leaves")
    while not talk.ended:
        default, talk.prefill = talk.prefill, ""
        try:
            line = asker.ask(default, screen.typed())
            talk.stopped = False
            if line.strip():
                _take(talk, line)
                own("\n")
            else:
                talk.editing = False
        except KeyboardInterrupt:
            if talk.stopped:
                return 130
            talk.stopped, talk.editing = True, False
            talk.screen.note("Ctrl-C again leaves")
        except EOFError:
            break
    return 0


def _line_by_line(talk: ChatState) -> int:
    """Each line of standard input is a question or a command; returns 1 when something went wrong."""
    try:
        while not talk.ended and (line := sys.stdin.readline()):
            if line.strip():
                _take(talk, line)
            if talk.stopped:
                return 130
        _ = talk.session
    except UnicodeDecodeError as error:
        raise PromptError("standard input", got=f"bytes that are not UTF-8 at {error.start}", want="text") from None
    return 1 if talk.failed else 0


def _take(talk: ChatState, line: str) -> None:
    """Do what a line says; an error of ours is one line, and the chat goes on."""
    from .talk.lines import Command, read
    from .talk.verbs import run

    try:
        said = read(line)
        if isinstance(said, Command):
            talk.editing = False
            run(talk, said)
        else:
            talk.say(said)
    except Gemma3Error as error:
        if talk.loading.failure is not None or isinstance(error, OutputLost):
            raise
        talk.failed = True
        talk.screen.error(str(error))


@contextlib.contextmanager
def _as_found(terminal: bool) -> Iterator[None]:
    """Leave the terminal as it was found."""
    import termios

    found = termios.tcgetattr(0) if terminal else None
    try:
        yield
    finally:
        if found is not None:
            with contextlib.suppress(termios.error):  # it is gone
                termios.tcsetattr(0, termios.TCSANOW, found)

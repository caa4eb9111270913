"""`mlx-gemma3 worker`: an engine for another program, which speaks with it in JSON lines."""

from __future__ import annotations

import os
import signal
from typing import Annotated

import typer

from ..errors import WorkerError
from .prompt_cache import Folder, Size, kept_in
from .streams import was_closed


def worker(
    max_line: Annotated[
        int, typer.Option(min=1, max=1 << 20, help="Longest request, in MiB; a picture in base64 is in it.")
    ] = 64,
    max_queued: Annotated[int, typer.Option(min=1, max=1 << 20, help="Most requests that wait.")] = 64,
    max_sessions: Annotated[int, typer.Option(min=0, max=1 << 20, help="Most sessions that are open.")] = 16,
    prompt_cache: Folder = None,
    prompt_cache_size: Size = "20GB",
) -> None:
    """Serve another program: requests on standard input, events on standard output, one JSON object a line.

    Ends when standard input does. docs/worker.md says what the lines hold.
    """
    from .. import __version__
    from ..worker.server import Limits, Server

    if not os.isatty(0):  # Ctrl-C at the terminal of the program that started it is not for the worker
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    limits = Limits(line_bytes=max_line << 20, queued=max_queued, sessions=max_sessions)
    settings = kept_in(prompt_cache, prompt_cache_size)
    requests, events = _own(0, os.O_RDONLY), _own(1, os.O_WRONLY)
    _send(1, 2)  # what a library prints goes to stderr
    with os.fdopen(requests, "rb") as source, os.fdopen(events, "wb", buffering=0) as sink:

        def write(line: bytes) -> None:
            rest = memoryview(line)
            while rest:
                rest = rest[sink.write(rest) or 0 :]

        Server(source, write, limits, __version__, leave=lambda: os._exit(1), settings=settings).run()


def _own(descriptor: int, mode: int) -> int:
    """Take a standard stream for ourselves alone: in its place, nothing can be read or written by anybody else."""
    if was_closed(descriptor):
        raise WorkerError(f"standard {'output' if descriptor else 'input'}", got="none", want="a pipe")
    mine = os.dup(descriptor)
    nothing = os.open(os.devnull, mode)
    os.dup2(nothing, descriptor)
    os.close(nothing)
    return mine


def _send(descriptor: int, to: int) -> None:
    try:
        os.dup2(to, descriptor)
    except OSError:  # there is no stderr: it goes nowhere
        return

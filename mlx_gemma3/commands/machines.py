"""A command under `mlx.launch`: the first machine runs it, the others follow."""

from __future__ import annotations

import signal

import typer

from ..errors import Gemma3Error
from .streams import leave
from .terminal import tell

ON_MACHINES = frozenset(("generate", "chat", "serve", "bench"))
ALONE = frozenset(("embed", "evaluate", "tune", "worker"))


def follow_first() -> None:
    """Find the other machines. On the first one return, on the others stay until it ends, and leave.

    Raises:
        OptionError: the others cannot be found.
    """
    from ..runtime.machines import join

    machines = join()
    if machines is None or machines.rank == 0:
        return
    from ..runtime.loading import follow

    signal.signal(signal.SIGINT, leave)
    try:
        follow(machines, lambda sentence: tell(f"mlx-gemma3: {sentence}"))
    except Gemma3Error as error:
        machines.leave(error)
    raise typer.Exit

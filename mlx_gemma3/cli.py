"""The command line: `mlx-gemma3`. The answer goes to stdout, everything else to stderr.

Exit status: 0 done, 1 an error of ours (one line: what, and what to do), 2 usage, 130 interrupted. What the commands
are is commands/program.py's, which is imported when Ctrl-C and the standard streams are in order.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

from .commands.streams import leave, open_streams


def main() -> None:
    """Run the program; an error of ours is one line on stderr."""
    signal.signal(signal.SIGINT, leave)
    open_streams()
    from .commands.program import run

    sys.exit(run())


def __getattr__(name: str) -> Any:
    if name == "app":
        from .commands.program import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    main()

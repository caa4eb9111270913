"""Whether this process is one of several that were started together, on one machine or on many."""

from __future__ import annotations

import os
from collections.abc import Mapping

_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `mlx.launch` or `mpirun` started it. Its standard input is then a pipe that nobody closes."""
    return any(name in environment for name in _VARIABLES)

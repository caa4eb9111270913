"""Processes that find each other over MLX's ring on this machine, as `mlx.launch` starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# The limits of runtime/machines.py are made shorter, then the command is run.
MAIN = """
import sys
from mlx_gemma3.runtime import machines
machines.LIMIT, machines.LOADING, machines.GRACE = {limit}, {limit}, 0.5
sys.argv[0] = "mlx-gemma3"
from mlx_gemma3.cli import main
main()
"""


def ports(count: int) -> list[int]:
    """Free ones."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found: list[int] = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return found


class Rank:
    """One process. Its standard input is a pipe that stays open, as mlx.launch's does."""

    def __init__(self, folder: Path, rank: int, hosts: Path, code: str, words: Sequence[str]) -> None:
        self.rank, self._out, self._err = rank, folder / f"out{rank}", folder / f"err{rank}"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *words],
                env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
            )

    @property
    def out(self) -> list[str]:
        return self._out.read_text(encoding="utf-8").splitlines()

    @property
    def told(self) -> list[str]:
        """What it told on stderr, but for MLX's own lines."""
        return [line for line in self._err.read_text(encoding="utf-8").splitlines() if not line.startswith("[ring]")]

    def wait(self, timeout: float = 120) -> int:
        """The status with which it ends."""
        return self.process.wait(timeout)

    def close_stdin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


@contextmanager
def ranks(size: int, *words: str, code: str = "", limit: float = 60) -> Iterator[list[Rank]]:
    """So many processes of a command.

    Args:
        code: what runs in the place of the command.
        limit: seconds of silence after which they take each other for gone.
    """
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports(size)]), encoding="utf-8")
        code = code or MAIN.format(limit=limit)
        started = [Rank(Path(folder), rank, hosts, code, words) for rank in range(size)]
        try:
            yield started
        finally:
            for one in started:
                one.process.kill()
                one.process.wait()
                one.close_stdin()

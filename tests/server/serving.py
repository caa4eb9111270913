"""A server in a process of its own, as a user starts it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PICTURE = ROOT / "examples" / "pictures" / "shapes.png"
QUESTION = "How many circles are there?"  # about PICTURE; the demo says 3


class Server:
    """One that runs; `address` is its http address."""

    def __init__(
        self,
        *arguments: str,
        code: str = "from mlx_gemma3.cli import main; main()",
        launch: Sequence[str] = (),
        **env: str,
    ) -> None:
        """
        Args:
            code: what the process runs, with the command's words in sys.argv.
            launch: a program that runs it.
        """
        command = [
            *launch,
            sys.executable,
            "-c",
            f"import sys; sys.argv[0] = 'mlx-gemma3'; {code}",
            "serve",
            *arguments,
        ]
        if "--port" not in arguments:
            command += ["--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **env})
        self.lines: list[str] = []
        self.address = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait(120)
        assert self.address, self.lines

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if found := re.fullmatch(r"serving .* at (http://\S+)", self.lines[-1]):
                self.address = found[1]
                self._ready.set()
        self._ready.set()

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def ask(
        self, path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status, and what came: JSON decoded, else text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, content, headers or {})
            answer = connection.getresponse()
            text = answer.read().decode()
            self.headers = dict(answer.getheaders())
        finally:
            connection.close()
        kind = answer.headers.get("content-type", "")
        return answer.status, json.loads(text) if kind == "application/json" else text

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = self.ask("/metrics")[1]
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and wait for the end."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        status = self.process.wait(60)
        self._reader.join(10)
        return status


@contextmanager
def serving(*arguments: str, **more: Any) -> Iterator[Server]:
    server = Server(*arguments, **more)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.wait()
        assert server.process.stderr is not None
        server.process.stderr.close()


def events(text: str) -> list[Any]:
    """The data of server-sent events; JSON decoded."""
    found = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [data if data == "[DONE]" else json.loads(data) for data in found]

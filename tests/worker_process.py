"""A worker process for the tests: lines in, events out, each checked against the schema."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import schema

ENDS = ("ok", "done", "error")


class Worker:
    """`mlx-gemma3 worker`, or another command that becomes one."""

    def __init__(self, *options: str, command: tuple[str, ...] = (), cwd: Path | None = None) -> None:
        command = command or (sys.executable, "-W", "error", "-X", "dev", "-m", "mlx_gemma3.cli", "worker", *options)
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=cwd, env=environment)
        self.events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.raw: list[bytes] = []  # lines that are no JSON
        self.said = b""  # on stderr
        self._readers = [threading.Thread(target=self._read), threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:  # type: ignore[union-attr]
            try:
                self.events.put(json.loads(line))
            except ValueError:
                self.raw.append(line)
        self.events.put(None)

    def _read_errors(self) -> None:
        self.said = self.process.stderr.read()  # type: ignore[union-attr]

    def send(self, *requests: dict[str, Any] | bytes) -> None:
        for request in requests:
            if isinstance(request, dict):
                assert not schema.problems(request, "request"), schema.problems(request, "request")
                request = json.dumps(request).encode()
            self.process.stdin.write(request + b"\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]

    def next(self, timeout: float = 60) -> dict[str, Any] | None:
        """The next event; None when there will be no more."""
        event = self.events.get(timeout=timeout)
        if event is not None:
            assert not schema.problems(event, "event"), schema.problems(event, "event")
        return event

    def ends(self, count: int = 1) -> list[dict[str, Any]]:
        """Wait for so many ends of requests."""
        found: list[dict[str, Any]] = []
        while len(found) < count:
            event = self.next()
            assert event is not None, f"ended: {self.said!r}"
            if event["kind"] in ENDS:
                found.append(event)
        return found

    def ask(self, request: dict[str, Any] | bytes) -> dict[str, Any]:
        """Send one request and wait for one end."""
        self.send(request)
        return self.ends()[0]

    def close(self) -> int:
        """Close its standard input; what it still says may be read afterwards. Returns its exit status."""
        self.process.stdin.close()  # type: ignore[union-attr]
        status = self.process.wait(30)
        for reader in self._readers:
            reader.join(10)
        self.process.stdout.close()  # type: ignore[union-attr]
        self.process.stderr.close()  # type: ignore[union-attr]
        return status

    def __enter__(self) -> Worker:
        hello = self.next()
        assert hello is not None and hello["kind"] == "hello", self.said
        return self

    def __exit__(self, *_: object) -> None:
        if not self.process.stdin.closed:  # type: ignore[union-attr]
            try:
                self.close()
            finally:
                if self.process.poll() is None:
                    self.process.kill()

"""Runs a target of targets.py over many hostile inputs, in a child with bounds on memory and time.

What is allowed is success or one of our errors: one sentence, within two seconds of processor time. Anything else (a
traceback, a signal, a hang) is a fault, returned with the file that caused it.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 2.0  # of processor time, for one input
HANG = 30.0  # seconds by the clock before a child is killed
LONGEST = 1400  # characters of a message: four parts of at most 300, and the words between


@dataclass
class Outcome:
    """How a run of many inputs ended."""

    good: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)  # "file: what happened"


class _Child:
    def __init__(self, target: str) -> None:
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("child.py")), target]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        if not self.lines.get():
            raise RuntimeError(f"{target}: the child does not start")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def run(self, path: Path) -> dict[str, object]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(str(path)) + "\n")
        self.process.stdin.flush()
        try:
            line = self.lines.get(timeout=HANG)
        except queue.Empty:
            return {"died": f"hangs for {HANG:.0f} s"}
        return json.loads(line) if line else {"died": f"ended with status {self.process.wait()}"}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def run(target: str, paths: Iterable[Path]) -> Outcome:
    """Give each path to `targets.TARGET`. A child that died is replaced for the next input."""
    outcome, child = Outcome(), None
    try:
        for path in paths:
            child = child or _Child(f"targets:{target}")
            result = child.run(path)
            if "died" in result:
                outcome.faults.append(f"{path}: {result['died']}")
                child.close()
                child = None
            elif "trace" in result:
                outcome.faults.append(f"{path}: {result['trace']}")
            elif float(str(result["seconds"])) > SECONDS:
                outcome.faults.append(f"{path}: {result['seconds']:.1f} s of processor time")
            elif result["ok"]:
                outcome.good += 1
            else:
                message = str(result["message"])
                if "\n" in message or len(message) > LONGEST or not message.isprintable():
                    outcome.faults.append(f"{path}: no sentence: {message!r}")
                outcome.refused += 1
    finally:
        if child is not None:
            child.close()
    return outcome

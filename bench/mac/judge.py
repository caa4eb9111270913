"""Runs checks one after another, each in a process of its own, and writes what came of them into one file.

A check is a function of a Report. It notes figures, and says what it expects of them; it may skip itself. Whatever
happens to it (an exception, a crash of the GPU's driver, no end) is its own outcome, and the next one runs.
Knows no check, and nothing of MLX.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mlx_gemma3.boundary.writing import write_whole

ROOT = Path(__file__).resolve().parents[2]
MARK = "outcome: "  # begins the child's last line
OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"


class Skipped(Exception):
    """A check that cannot be run here; the text says why."""


@dataclass(frozen=True)
class Settings:
    """What the person who runs the checks asked for."""

    quick: bool = False  # what ends in three minutes on a small Mac
    peers: str = ""  # an interpreter that has mlx-lm and mlx-vlm


@dataclass
class Report:
    """What one check finds."""

    settings: Settings = Settings()
    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        """A line of figures, not judged."""
        self.lines.append(line)

    def expect(self, right: bool, what: str, *, got: object, want: object) -> None:
        """Fail, and go on, unless it is right."""
        if not right:
            self.failures.append(f"{what}: got {got}, want {want}")

    def at_most(self, what: str, got: float, most: float, unit: str = "") -> None:
        """A figure that is noted, with its bound; a NaN is above every bound."""
        unit = f" {unit}" if unit else ""
        self.note(f"{what}: {got:.3g}{unit} (at most {most:.3g})")
        self.expect(got <= most, what, got=f"{got:.3g}{unit}", want=f"at most {most:.3g}")


@dataclass(frozen=True)
class Outcome:
    """How a check ended."""

    name: str
    status: str  # OK, FAILED or SKIPPED
    why: str = ""
    lines: Sequence[str] = ()
    seconds: float = 0.0

    @property
    def headline(self) -> str:
        return f"{self.name}: {self.status}" + (f" ({self.why})" if self.why else "")


Check = Callable[[Report], None]


def attempt(check: Check, report: Report) -> tuple[str, str]:
    """Run a check here: its status, and why."""
    try:
        check(report)
    except Skipped as reason:
        if not report.failures:
            return SKIPPED, str(reason)
        report.note(f"the rest was skipped: {reason}")
    except Exception as error:
        report.expect(False, "an error", got=f"{type(error).__name__}: {error}", want="none")
    return (FAILED, "; ".join(report.failures)) if report.failures else (OK, "")


def run(name: str, check: Check, *, settings: Settings, seconds: float) -> Outcome:
    """Run a check in a process of its own, which imports it by its module and name, for at most so many seconds."""
    words = [f"{check.__module__}:{check.__name__}", json.dumps(asdict(settings))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", "from mac.judge import child; child()", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            said, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return Outcome(name, FAILED, f"time: got no end, want one within {seconds:.0f} s", seconds=seconds)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # what it started, too
                os.killpg(process.pid, signal.SIGKILL)
    took = time.monotonic() - began
    last = said.strip().splitlines()[-1:]
    if process.returncode or not last or not last[0].startswith(MARK):
        reason = " ".join(errors.strip().splitlines()[-1:]) or "nothing on stderr"
        return Outcome(
            name, FAILED, f"its process: got exit {process.returncode}, {reason}, want an outcome", seconds=took
        )
    return Outcome(name, seconds=took, **json.loads(last[0].removeprefix(MARK)))


def run_all(checks: Sequence[tuple[str, Check]], place: Path, head: str, *, settings: Settings, seconds: float) -> int:
    """Run all of them; the file is whole after each. Returns the exit status: 1 if any failed."""
    outcomes: list[Outcome] = []
    for name, check in checks:
        outcomes.append(run(name, check, settings=settings, seconds=seconds))
        print("\n".join(_section(outcomes[-1])), flush=True)
        left = [name for name, _ in checks[len(outcomes) :]]
        write_whole(place, written(head, outcomes, left).encode(), mode=0o644)
    return int(any(outcome.status == FAILED for outcome in outcomes))


def written(head: str, outcomes: Sequence[Outcome], left: Sequence[str]) -> str:
    """The file: a head, one line a check, then what each found.

    Args:
        left: names of checks that have not ended yet.
    """
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in (OK, FAILED, SKIPPED)}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines = [head, summary, ""]
    lines += [outcome.headline for outcome in outcomes]
    lines += [f"{name}: not ended" for name in left]
    for outcome in outcomes:
        lines += ["", *_section(outcome)]
    return "\n".join(lines) + "\n"


def _section(outcome: Outcome) -> list[str]:
    return [f"{outcome.headline}, {outcome.seconds:.1f} s", *(f"    {line}" for line in outcome.lines)]


def child() -> None:
    """In a check's own process: MODULE:FUNCTION SETTINGS. Its outcome is the last line of stdout."""
    name, settings = sys.argv[1:]
    report = Report(Settings(**json.loads(settings)))

    def imported(report: Report) -> None:
        module, function = name.split(":")
        getattr(importlib.import_module(module), function)(report)

    status, why = attempt(imported, report)
    print(f"\n{MARK}" + json.dumps({"status": status, "why": " ".join(why.split()), "lines": report.lines}))

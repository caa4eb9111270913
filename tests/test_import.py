"""Importing the package changes nothing in the process: it may live inside somebody else's program."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

LOOK = """
import atexit, gc, json, locale, logging, os, signal, sys, threading, warnings
def look():
    hooks = (sys.excepthook, sys.displayhook, sys.unraisablehook, threading.excepthook)
    return {
        "signals": {str(number): repr(signal.getsignal(number)) for number in signal.valid_signals()},
        "argv": list(sys.argv), "path": list(sys.path), "finders": [repr(f) for f in sys.meta_path],
        "folder": os.getcwd(), "umask": [os.umask(0o22), os.umask(0o22)], "environment": dict(os.environ),
        "threads": [thread.name for thread in threading.enumerate()], "exit": atexit._ncallbacks(),
        "streams": [id(sys.stdin), id(sys.stdout), id(sys.stderr)], "hooks": [id(hook) for hook in hooks],
        "warnings": [repr(f) for f in warnings.filters], "log": [repr(h) for h in logging.getLogger().handlers],
        "switch": sys.getswitchinterval(), "recursion": sys.getrecursionlimit(), "gc": gc.get_threshold(),
        "locale": locale.setlocale(locale.LC_ALL), "files": sorted(os.listdir("/dev/fd")),
    }
import asyncio, concurrent.futures, numpy
"""
AFTER = """
after = look()
sys.stderr.write(json.dumps({name: [before[name], after[name]] for name in before if before[name] != after[name]}))
sys.stderr.write("\\n" + json.dumps(sorted(sys.modules)))
"""


def changed_by(code: str, *, first: str = "") -> tuple[dict[str, Any], list[str], str]:
    """What differs after the code ran in a process of its own, its modules, and what it wrote on stdout."""
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", f"{LOOK}{first}\nbefore = look()\n{code}{AFTER}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    changes, modules = done.stderr.splitlines()
    return json.loads(changes), json.loads(modules), done.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import mlx_gemma3",
        "import mlx_gemma3\nassert mlx_gemma3.Config and mlx_gemma3.__dir__()",
        "import mlx_gemma3.worker.client",
    ],
)
def test_importing_the_package_changes_nothing(code: str) -> None:
    changes, modules, out = changed_by(code)
    assert (changes, out) == ({}, "")
    assert not any(name == "mlx" or name.startswith("mlx.") for name in modules)


def test_importing_the_engine_changes_nothing_either() -> None:
    """What MLX itself does when it is imported is compared with, and nothing may be computed."""
    code = "import mlx_gemma3.runtime.engine, mlx_gemma3.runtime.session_file\nassert mlx.core.get_peak_memory() == 0"
    changes, modules, out = changed_by(code, first="import mlx.core, mlx.nn, mlx.utils")
    assert (changes, out) == ({}, "") and "mlx_gemma3.runtime.thread" in modules


def test_the_comparison_notices() -> None:
    changes, _, out = changed_by(
        "signal.signal(signal.SIGTERM, print); atexit.register(id, 0); os.chdir('/'); print('x')"
    )
    assert changes.keys() == {"signals", "exit", "folder"} and out == "x\n"

"""Schemathesis makes requests of the OpenAPI document: none is answered with a 500."""

from __future__ import annotations

import subprocess
import sys

import pytest
from serving import Server, serving

pytestmark = pytest.mark.clients


def test_schemathesis() -> None:
    with serving("-m", "demo", "--max-context", "256", "--quiet") as server:  # answers of any length would take hours
        check(server)


def check(server: Server) -> None:
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{server.address}/openapi.json", "--url", server.address,
        "--checks", "not_a_server_error", "--max-examples", "40", "--seed", "1", "--request-timeout", "60",
        "--workers", "1", "--phases", "fuzzing,coverage",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert server.ask("/health")[0] == 200

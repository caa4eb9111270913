"""OpenAI's client against `mlx.launch -n 2 mlx-gemma3 serve`: the tests of test_clients.py once more."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import ports
from serving import Server
from test_clients import (  # noqa: F401
    oai,
    test_openai_chat,
    test_openai_chat_streamed,
    test_openai_completions,
    test_openai_errors,
    test_openai_responses,
    test_openai_settings,
)

pytestmark = pytest.mark.slow
LAUNCH = Path(sys.executable).parent / "mlx.launch"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """As a user starts it, on two machines that are one."""
    (port,) = ports(1)
    launch = (str(LAUNCH), "-n", "2", "--starting-port", str(port))
    running = Server("-m", "demo", "--alias", "gpt-4o-mini=demo", "--alias", "claude-sonnet=demo", launch=launch)
    try:
        yield running
    finally:
        running.process.terminate()
        running.wait()
        assert running.process.stderr is not None
        running.process.stderr.close()

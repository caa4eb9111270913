"""The server that most tests share: the demo model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import Server, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with serving("-m", "demo", "--alias", "gpt-4o-mini=demo", "--alias", "claude-sonnet=demo") as running:
        yield running

"""Heavy clients of the server: `make test-clients` makes an environment with them (the extra `clients`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched: models and tokenizers are local
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "server"))

from serving import Server, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with serving("-m", "demo") as running:
        yield running

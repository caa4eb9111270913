"""Servers of the demo model, and a browser that shows the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from serving import Server, serving

if TYPE_CHECKING:
    import page_stand_in
    from page_reader import Browser, Page


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """As a user starts it."""
    with serving("-m", "demo", "--alias", "gpt-4o-mini=demo", "--alias", "claude-sonnet=demo") as running:
        yield running


# Not for the whole session: playwright holds the thread's event loop while it runs, and other tests want their own.
@pytest.fixture(scope="module")
def page_server() -> Iterator[page_stand_in.Server]:
    """One whose answers are scripts."""
    from page_stand_in import serving

    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from page_reader import chromium

    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser: Browser, page_server: page_stand_in.Server) -> Iterator[Page]:
    """The page in a browser that knows nothing of it. Errors of the page, and requests to others, fail the test."""
    from page_reader import shown

    page_server.asked.clear()
    with shown(browser, page_server.address) as opened:
        yield opened

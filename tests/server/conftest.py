"""A server that serves the page, and a browser that shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from page_reader import Browser, Page
    from page_stand_in import Server


# Not for the whole session: playwright holds the thread's event loop while it runs, and other tests want their own.
@pytest.fixture(scope="module")
def page_server() -> Iterator[Server]:
    from page_stand_in import serving

    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from page_reader import chromium

    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser: Browser, page_server: Server) -> Iterator[Page]:
    """The page in a browser that knows nothing of it. Errors of the page, and requests to others, fail the test."""
    from page_reader import shown

    page_server.asked.clear()
    with shown(browser, page_server.address) as opened:
        yield opened

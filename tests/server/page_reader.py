"""What a reader of the page does, in a real browser. Without one the tests that import this are skipped."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from page_stand_in import Server

pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright (the extra dev)")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("the page is tested in a browser: apt-get install chromium", allow_module_level=True)

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright  # noqa: E402

PICTURES = Path(__file__).resolve().parents[2] / "examples" / "pictures"
SHAPES = PICTURES / "shapes.png"
QUESTION = "How many circles are there?"  # of shapes.png: the demo model says 3
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
expect.set_options(timeout=20_000)  # the machine may be busy


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with a new, empty profile."""
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield opened
        opened.close()


@contextmanager
def shown(browser: Browser, address: str) -> Iterator[Page]:
    """The page, in a profile of its own. At the end: it had no errors, and asked nobody else for anything."""
    with browser.new_context(viewport={"width": 1280, "height": 800}) as context:
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        wrong: list[str] = []

        def heard(message: ConsoleMessage) -> None:
            if message.type == "error" and not message.text.startswith("Failed to load resource"):  # 401, a cut
                wrong.append(message.text)

        page.on("console", heard)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith((address, "data:", "blob:")) or wrong.append(asked.url))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        ready(page, address)
        yield page
        assert wrong == []


def ready(page: Page, address: str | None = None) -> None:
    """Open an address, or the same again, and wait for the page's script."""
    _ = page.goto(address) if address else page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")


def field(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Message")


def ask(page: Page, words: str) -> None:
    field(page).fill(words)
    page.keyboard.press("Enter")


def answered(page: Page, words: str, number: int = 1) -> Locator:
    """Wait for the answer with this number to be there whole; it has these words."""
    answer = page.get_by_role("article").filter(has=page.get_by_role("heading", name="Answer")).nth(number - 1)
    expect(answer).to_have_attribute("aria-busy", "false")
    expect(answer.locator(".markdown")).to_have_text(words)
    return answer


def button(page: Page | Locator, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def transfer(page: Page, path: Path, kind: str = "image/png") -> object:
    """A DataTransfer in the page that holds a file."""
    code = """([bytes, name, type]) => {
        const transfer = new DataTransfer();
        const content = Uint8Array.from(atob(bytes), (character) => character.charCodeAt(0));
        transfer.items.add(new File([content], name, { type }));
        return transfer;
    }"""
    return page.evaluate_handle(code, [base64.b64encode(path.read_bytes()).decode(), path.name, kind])


def sent_picture(server: Server) -> tuple[str, bytes]:
    """Type and bytes of the picture in the last message asked."""
    item = server.asked[-1]["messages"][-1]["content"][0]
    head, content = item["image_url"]["url"].split(",")
    return head, base64.b64decode(content)

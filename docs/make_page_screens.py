"""Makes the pictures of the page: a conversation, wide and narrow, light and dark. Needs chromium.

python docs/make_page_screens.py          write docs/page-*.png

The demo model answers the questions about pictures. It knows simple drawings only, so the last answer, which shows a
table and a program, is written here, its tokens/s too.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "server"))
from page_stand_in import Server, serving  # noqa: E402

SIZES = ((1280, 1110), (390, 844))
EARLIER = (
    ("letters.png", "What does it say?"),
    ("heart.png", "What shape is this?"),
    ("number.png", "What number is this?"),
)
WRITTEN = """There are **three circles**, one more than all other shapes together:

| shape | colour | count |
|:------|:-------|------:|
| circle | red, blue | 3 |
| star | yellow | 1 |
| triangle | green | 1 |

To count them in a program:

```python
circles = [shape for shape in shapes if shape.kind == "circle"]
print(len(circles))
```
"""


def main() -> None:
    """Write docs/page-*.png."""
    with serving() as server, sync_playwright() as playwright:
        server.script("Put all of them in a table.", WRITTEN)
        flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        for size in SIZES:
            for scheme in ("light", "dark"):
                _screen(browser, server, size, scheme)
        browser.close()


def _screen(browser: Browser, server: Server, size: tuple[int, int], scheme: str) -> None:
    width, height = size
    with browser.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce") as context:
        page = context.new_page()
        page.emulate_media(color_scheme=scheme)
        page.goto(server.address)
        page.wait_for_selector("html[data-ready]", state="attached")
        for picture, words in (*EARLIER, ("shapes.png", "How many circles are there?")):
            page.locator(".new:visible").last.click()
            expect(page.locator(".turn")).to_have_count(0)
            page.set_input_files("input[type=file]", ROOT / "examples" / "pictures" / picture)
            _ask(page, words)
        _ask(page, "Put all of them in a table.")
        page.evaluate("document.activeElement.blur()")
        page.mouse.move(0, 0)
        target = ROOT / "docs" / f"page-{width}-{scheme}.png"
        page.screenshot(path=target)
        assert target.stat().st_size < 150_000, target


def _ask(page: Page, words: str) -> None:
    page.get_by_role("textbox", name="Message").fill(words)
    page.keyboard.press("Enter")
    last = page.locator(".answer").last
    expect(last).to_contain_text("tokens/s")


if __name__ == "__main__":
    main()

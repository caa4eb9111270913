"""The page in a real browser, for everyone: keyboards, narrow pages, screen readers, calm eyes."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from page_reader import PICTURES, SHAPES, Page, answered, ask, button, expect, field
from page_stand_in import Server

axe_playwright_python = pytest.importorskip("axe_playwright_python", reason="faults are looked for with axe")
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


def focused(page: Page) -> tuple[str, bool]:
    """The name of what has the focus, and whether one sees that: a frame around it, or around the composer's field."""
    code = """() => {
        const one = document.activeElement;
        const framed = one.matches("textarea") ? one.closest("form") : one;
        return [one.getAttribute("aria-label") || one.textContent.trim(), getComputedStyle(framed).outlineStyle];
    }"""
    name, style = page.evaluate(code)
    return ("", True) if page.evaluate("document.activeElement === document.body") else (name, style != "none")


def test_everything_is_reached_by_keyboard_and_shows_the_focus(page: Page, page_server: Server) -> None:
    page_server.script("One\ntwo", "Three.")
    expect(field(page)).to_be_focused()  # from the start
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    answered(page, "Three.")
    expect(field(page)).to_be_focused()
    order = []
    for _ in range(13):
        page.keyboard.press("Tab")
        name, seen = focused(page)
        assert seen, name
        order.append(name)
    assert order == [
        "Add pictures", "Send", "",  # from the end to the beginning, by way of the browser's own buttons
        "New conversation", "One two", "Rename One two", "Delete One two", "Settings",
        "Turns", "Edit this turn", "Copy this answer", "Answer again", "Message",
    ]  # fmt: skip
    for _ in range(5):
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Settings")
    expect(dialog).to_be_visible()
    expect(dialog.get_by_label("System text")).to_be_focused()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert focused(page) == ("Settings", True)


def test_an_input_methods_enter_does_not_send(page: Page, page_server: Server) -> None:
    field(page).fill("你好")
    composing = {"key": "Enter", "bubbles": True, "cancelable": True, "isComposing": True}
    page.dispatch_event("#foot textarea", "keydown", composing)
    expect(field(page)).to_have_value("你好")
    assert page_server.asked == []


def test_the_list_is_a_drawer_on_a_narrow_page(page: Page, page_server: Server) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page_server.script("Narrow", "Yes.")
    ask(page, "Narrow")
    answered(page, "Yes.")
    expect(page.get_by_role("link", name="Narrow")).to_be_hidden()
    opening = button(page, "Conversations and settings")
    opening.click()
    expect(opening).to_have_attribute("aria-expanded", "true")
    expect(page.get_by_role("link", name="Narrow")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("link", name="Narrow")).to_be_hidden()
    expect(opening).to_be_focused()
    opening.click()
    page.get_by_role("navigation").get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_role("link", name="Narrow")).to_be_hidden()


ALL = """# A heading

Some **bold** words, `code`, [a link](https://example.org/a) and ~~struck~~ ones.

1. One
   - inner

| left | right |
|:-----|------:|
| `a` | 2 |

> A quote

```python
print("a program")
```
"""
WIDE = (
    f"{'wide' * 60}\n\n| {'heading | ' * 12}\n|{'---|' * 12}\n| {'cell of a table | ' * 12}\n\n"
    f"```\n{'x = 1; ' * 60}\n```\n"
)


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_page(page: Page, page_server: Server, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page_server.script("W" * 300, WIDE)
    page.set_input_files("input[type=file]", [PICTURES / name for name in ("heart.png", "stars.png", "shapes.png")])
    ask(page, "W" * 300)
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
    expect(page.locator("table")).to_be_attached()
    places = ["html", "body", "main", "#scroller"]
    over = "(place) => { const one = document.querySelector(place); return one.scrollWidth - one.clientWidth; }"
    assert [page.evaluate(over, place) for place in places] == [0, 0, 0, 0]
    assert page.locator("pre").evaluate("(one) => { one.scrollLeft = 50; return one.scrollLeft; }") == 50
    assert page.locator(".table").evaluate("(one) => { one.scrollLeft = 50; return one.scrollLeft; }") == 50
    if width == 390:
        button(page, "Conversations and settings").click()
    button(page, "Settings").click()
    dialog = page.get_by_role("dialog", name="Settings")
    assert dialog.evaluate("(one) => one.scrollWidth - one.clientWidth") == 0
    assert page.evaluate("document.scrollingElement.scrollWidth") == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_no_serious_fault(page: Page, page_server: Server, scheme: str, width: int) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 800})
    axe(page, "empty")
    page_server.script("All of it", ALL)
    page_server.script("And wrong", "Half ", RuntimeError("it went wrong"))
    page.set_input_files("input[type=file]", SHAPES)
    ask(page, "All of it")
    expect(page.locator(".answer").first).to_have_attribute("aria-busy", "false")
    ask(page, "And wrong")
    expect(page.locator(".error").last).to_be_visible()
    page.set_input_files("input[type=file]", SHAPES)
    page.mouse.move(0, 0)
    axe(page, "conversation")
    button(page, "Edit this turn").first.click(force=True)
    axe(page, "edit")
    page.keyboard.press("Escape")
    if width == 390:
        button(page, "Conversations and settings").click()
        axe(page, "list")
    button(page, "Settings").click()
    axe(page, "settings")
    page.keyboard.press("Escape")
    button(page, "Delete All of it").click()
    axe(page, "delete")


def axe(page: Page, where: str) -> None:
    page.evaluate(AXE)
    found = page.evaluate("axe.run().then(({ violations, passes }) => ({ violations, passes: passes.length }))")
    assert found["passes"] > 15, where  # it did look
    serious = [
        (where, fault["id"], [node["target"] for node in fault["nodes"]])
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
    ]
    assert serious == [], json.dumps(serious)


def test_motion_is_left_out_for_who_wants_none(page: Page, page_server: Server) -> None:
    page_server.script("Wait.", ("reading", 0, 0), threading.Event())
    duration = "getComputedStyle(document.querySelector('progress')).animationDuration"
    ask(page, "Wait.")
    expect(page.locator(".progress")).to_have_text("Reading the prompt: 0 of 0 tokens")  # no more is drawn after this
    page.evaluate("document.querySelector('progress').removeAttribute('value')")
    assert page.evaluate(duration) == "1.8s"
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate(duration) == "0s"

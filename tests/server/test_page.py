"""The page in a real browser: pictures that are asked about, and answers while and after they come."""

from __future__ import annotations

import base64
import re
import threading
from pathlib import Path

import pytest
from page_reader import (
    PICTURES,
    QUESTION,
    SHAPES,
    Page,
    answered,
    ask,
    button,
    expect,
    field,
    ready,
    sent_picture,
    transfer,
)
from page_stand_in import CUT, END, Server


def test_a_picture_that_was_picked_is_asked_about(page: Page, page_server: Server) -> None:
    page.set_input_files("input[type=file]", SHAPES)
    expect(page.get_by_role("img", name="shapes.png")).to_be_visible()
    ask(page, QUESTION)
    expect(answered(page, "3")).to_contain_text("tokens/s")
    assert sent_picture(page_server) == ("data:image/png;base64", SHAPES.read_bytes())
    assert page_server.asked[-1]["messages"][-1]["content"][1] == {"type": "text", "text": QUESTION}


def test_a_picture_that_was_dropped_is_asked_about(page: Page, page_server: Server) -> None:
    dropped = {"dataTransfer": transfer(page, SHAPES)}
    page.dispatch_event("#scroller", "dragenter", dropped)
    expect(page.get_by_text("Drop pictures here")).to_be_visible()
    page.dispatch_event("#scroller", "drop", dropped)
    expect(page.get_by_text("Drop pictures here")).to_be_hidden()
    expect(page.get_by_role("img", name="shapes.png")).to_be_visible()
    ask(page, QUESTION)
    answered(page, "3")
    assert sent_picture(page_server)[1] == SHAPES.read_bytes()


def test_a_picture_that_was_pasted_is_asked_about(page: Page) -> None:
    copying = """async (bytes) => {
        const content = Uint8Array.from(atob(bytes), (character) => character.charCodeAt(0));
        const picture = new Blob([content], { type: "image/png" });
        await navigator.clipboard.write([new ClipboardItem({ "image/png": picture })]);
    }"""
    page.evaluate(copying, base64.b64encode(SHAPES.read_bytes()).decode())
    field(page).focus()
    page.keyboard.press("Control+V")
    expect(page.locator(".preview img")).to_be_visible()
    ask(page, QUESTION)
    answered(page, "3")


def test_words_are_pasted_as_words_also_where_a_picture_of_them_is_there(page: Page) -> None:
    code = """() => {
        const transfer = new DataTransfer();
        transfer.setData("text/plain", "cells of a table");
        transfer.items.add(new File(["x"], "cells.png", { type: "image/png" }));
        const event = new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true });
        return document.querySelector("#foot textarea").dispatchEvent(event);
    }"""
    assert page.evaluate(code)  # not prevented: the browser pastes the words
    expect(page.locator(".preview")).to_have_count(0)


def test_a_picture_is_taken_out_again_and_a_file_that_is_none_is_told(page: Page) -> None:
    page.set_input_files("input[type=file]", [SHAPES, PICTURES / "heart.png"])
    button(page, "Remove shapes.png").click()
    expect(page.locator(".preview")).to_have_count(1)
    expect(page.get_by_role("img", name="heart.png")).to_be_visible()
    page.dispatch_event(
        "#scroller", "drop", {"dataTransfer": transfer(page, PICTURES / "questions.jsonl", "text/plain")}
    )
    expect(page.get_by_text("Not a picture that can be read: questions.jsonl")).to_be_visible()
    expect(page.locator(".preview")).to_have_count(1)


def test_heic_is_a_tile_with_its_name_and_is_sent_as_it_is(page: Page, page_server: Server) -> None:
    content = b"\0\0\0\x18ftypheic" + bytes(40)
    page_server.script("What is this?", "A photo.")
    page.set_input_files("input[type=file]", {"name": "IMG_1.HEIC", "mimeType": "", "buffer": content})
    expect(page.locator(".preview .named")).to_have_text("IMG_1.HEIC")
    ask(page, "What is this?")
    answered(page, "A photo.")
    assert sent_picture(page_server) == ("data:image/heic;base64", content)
    expect(page.locator(".said .named")).to_have_text("IMG_1.HEIC")


def test_a_file_without_a_type_is_a_picture_by_its_name(page: Page, page_server: Server, tmp_path: Path) -> None:
    (tmp_path / "scan.tiff").write_bytes(b"II*\0")
    page_server.script("What is this?", "A scan.")
    page.dispatch_event("#scroller", "drop", {"dataTransfer": transfer(page, tmp_path / "scan.tiff", "")})
    ask(page, "What is this?")
    answered(page, "A scan.")
    assert sent_picture(page_server) == ("data:image/tiff;base64", b"II*\0")


def test_a_picture_of_the_conversation_is_shown_large(page: Page) -> None:
    page.set_input_files("input[type=file]", SHAPES)
    ask(page, QUESTION)
    answered(page, "3")
    button(page, "Show shapes.png large").click()
    shown = page.get_by_role("dialog", name="shapes.png")
    expect(shown.get_by_role("img")).to_be_visible()
    page.keyboard.press("Escape")
    expect(shown).to_be_hidden()
    expect(button(page, "Show shapes.png large")).to_be_focused()


def test_a_model_without_a_tower_is_offered_no_pictures(page: Page, page_server: Server) -> None:
    page_server.pictures = False
    try:
        ready(page)
        expect(button(page, "Add pictures")).to_be_hidden()
        page.dispatch_event("#scroller", "drop", {"dataTransfer": transfer(page, SHAPES)})
        expect(page.get_by_text("This model reads no pictures.")).to_be_visible()
        expect(page.locator(".preview")).to_have_count(0)
    finally:
        page_server.pictures = True


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_an_answer_is_stopped_and_keeps_what_had_come(page: Page, page_server: Server, how: str) -> None:
    page_server.script("Count.", "One, two, ", threading.Event())
    left = page_server.left
    ask(page, "Count.")
    expect(page.locator(".markdown")).to_have_text("One, two,")
    _ = page.keyboard.press("Escape") if how == "Escape" else button(page, "Stop").click()
    expect(answered(page, "One, two,")).to_contain_text("Stopped")
    expect(button(page, "Send")).to_be_visible()
    page.wait_for_function("document.querySelector('#list a')")
    for _ in range(200):
        if page_server.left > left:
            break
        page.wait_for_timeout(20)
    assert page_server.left == left + 1  # the server was told


def test_a_last_answer_is_asked_for_again(page: Page, page_server: Server) -> None:
    page_server.script("A number?", "4")
    ask(page, "A number?")
    answered(page, "4")
    page_server.script("A number?", "7")
    button(page, "Answer again").click()
    answered(page, "7")
    expect(page.locator(".turn")).to_have_count(2)
    assert [message["role"] for message in page_server.asked[-1]["messages"]] == ["user"]


def test_an_earlier_turn_is_edited_and_the_conversation_goes_on_from_there(page: Page, page_server: Server) -> None:
    page.set_input_files("input[type=file]", SHAPES)
    ask(page, "What colour is the star?")
    answered(page, "yellow")
    page_server.script("More?", "More.")
    ask(page, "More?")
    answered(page, "More.", 2)
    field(page).fill("A draft")
    button(page, "Edit this turn").first.click()
    editing = page.get_by_role("textbox", name="What you said")
    expect(editing).to_be_focused()
    expect(editing).to_have_value("What colour is the star?")
    editing.fill(QUESTION)
    page.keyboard.press("Enter")
    answered(page, "3")
    expect(page.locator(".turn")).to_have_count(2)
    assert len(page_server.asked[-1]["messages"]) == 1
    assert sent_picture(page_server)[1] == SHAPES.read_bytes()
    expect(page.get_by_role("heading", level=1)).to_have_text(QUESTION)
    expect(field(page)).to_have_value("A draft")


def test_an_edit_that_is_left_changes_nothing(page: Page, page_server: Server) -> None:
    page_server.script("First", "1")
    ask(page, "First")
    answered(page, "1")
    button(page, "Edit this turn").click()
    page.get_by_role("textbox", name="What you said").fill("Something else")
    page.keyboard.press("Escape")
    expect(page.locator(".words")).to_have_text("First")
    expect(button(page, "Edit this turn")).to_be_focused()
    answered(page, "1")
    assert len(page_server.asked) == 1


def test_an_answer_and_its_code_are_copied(page: Page, page_server: Server) -> None:
    page_server.script("Code?", "Here:\n\n```make\nall:\n\tcc *.c\n```\n")
    ask(page, "Code?")
    answer = answered(page, re.compile("Here:"))
    button(answer, "Copy code").click()
    expect(page.locator("#status")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "all:\n\tcc *.c"
    button(answer, "Copy this answer").click()
    page.wait_for_function("navigator.clipboard.readText().then((text) => text.startsWith('Here'))")
    assert page.evaluate("navigator.clipboard.readText()") == "Here:\n\n```make\nall:\n\tcc *.c\n```\n"


def test_an_answer_is_copied_where_the_browser_has_no_clipboard_for_pages(page: Page, page_server: Server) -> None:
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")  # as over plain http
    page_server.script("Copy?", "**Copied.**")
    ask(page, "Copy?")
    button(answered(page, "Copied."), "Copy this answer").click()
    expect(page.locator("#status")).to_have_text("Copied")
    expect(button(page, "Copy this answer")).to_be_focused()
    field(page).focus()
    page.keyboard.press("Control+V")
    expect(field(page)).to_have_value("**Copied.**")


def test_how_far_the_prompt_is_read_is_shown(page: Page, page_server: Server) -> None:
    pictures, words = threading.Event(), threading.Event()
    page_server.script("Read.", ("pictures", 1, 2), pictures, ("reading", 512, 8000), words, "Read.")
    ask(page, "Read.")
    expect(page.locator(".progress")).to_have_text("Looking at the pictures: 1 of 2")
    pictures.set()
    expect(page.locator(".progress")).to_have_text("Reading the prompt: 512 of 8,000 tokens")
    bar = page.get_by_role("progressbar")
    assert bar.evaluate("(bar) => [bar.value, bar.max]") == [512, 8000]
    words.set()
    answered(page, "Read.")
    expect(page.locator(".progress")).to_be_hidden()


def test_what_a_model_thinks_stands_apart_and_is_not_sent_back(page: Page, page_server: Server) -> None:
    words = threading.Event()
    page_server.script("Why?", ("thinking", "First, <b>the sky</b>.\n"), ("thinking", "Then light."), words, "Blue.")
    ask(page, "Why?")
    thoughts = page.locator(".thoughts")
    expect(thoughts.locator("summary")).to_have_text("Thinking: 34 characters")
    expect(page.locator(".progress")).to_be_hidden()
    words.set()
    answered(page, "Blue.")
    expect(thoughts.locator("summary")).to_have_text("What it thought")
    expect(thoughts.locator("p")).to_be_hidden()
    thoughts.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(thoughts.locator("p")).to_have_text("First, <b>the sky</b>.\nThen light.")
    page_server.script("And?", "Green.")
    ask(page, "And?")
    answered(page, "Green.", 2)
    assert page_server.asked[-1]["messages"][1] == {"role": "assistant", "content": "Blue."}
    expect(page.locator(".thoughts:visible")).to_have_count(1)
    page.reload()
    expect(page.locator(".thoughts:visible summary")).to_have_text("What it thought")


def test_an_error_in_mid_answer_is_told_in_place_and_asked_again(page: Page, page_server: Server) -> None:
    page_server.script("Try.", "Half of ", RuntimeError("memory: got 9 GB, want 8"))
    ask(page, "Try.")
    answer = answered(page, "Half of")
    expect(answer.locator(".error")).to_contain_text("memory: got 9 GB, want 8")
    ready(page)
    expect(page.locator(".error")).to_contain_text("memory: got 9 GB, want 8")  # kept with its conversation
    page_server.script("Try.", "Whole.")
    button(page, "Try again").click()
    answered(page, "Whole.")
    expect(page.locator(".error")).to_be_hidden()


def test_a_refusal_is_told_in_place(page: Page, page_server: Server) -> None:
    page_server.script("Now?", None, "257 answers wait, at most 256 may")
    ask(page, "Now?")
    expect(page.locator(".error")).to_contain_text("257 answers wait, at most 256 may")
    page_server.script("Later?", "Yes.")
    ask(page, "Later?")
    answered(page, "Yes.", 2)
    expect(button(page, "Try again")).to_be_hidden()  # only the last answer can be asked for again
    joined = [{"role": "user", "content": [{"type": "text", "text": text} for text in ("Now?", "Later?")]}]
    assert page_server.asked[-1]["messages"] == joined  # turns go on taking turns


@pytest.mark.parametrize(
    ("end", "told"), [(CUT, "The connection was lost."), (END, "The connection ended before the answer did.")]
)
def test_a_lost_connection_leaves_what_had_come(page: Page, page_server: Server, end: object, told: str) -> None:
    hold = threading.Event()
    page_server.script("Go.", "Half of it", hold, end)
    ask(page, "Go.")
    expect(page.locator(".markdown")).to_have_text("Half of it")
    hold.set()
    expect(answered(page, "Half of it").locator(".error")).to_contain_text(told)
    ready(page)
    answered(page, "Half of it")


def test_a_tab_that_is_closed_in_mid_answer_loses_a_second_at_most(page: Page, page_server: Server) -> None:
    hold = threading.Event()
    page_server.script("Slow.", "First ", hold, "second ", threading.Event())
    ask(page, "Slow.")
    expect(page.locator(".markdown")).to_have_text("First")
    page.wait_for_timeout(1100)
    hold.set()
    expect(page.locator(".markdown")).to_have_text("First second")
    page.wait_for_timeout(200)
    ready(page)
    expect(answered(page, "First second")).to_contain_text("Interrupted")


def test_only_a_finished_answer_is_announced(page: Page, page_server: Server) -> None:
    hold = threading.Event()
    page_server.script("Speak.", "**First** ", hold, "second.")
    ask(page, "Speak.")
    expect(page.locator(".markdown")).to_have_text("First")
    expect(page.get_by_role("article").last).to_have_attribute("aria-busy", "true")
    expect(page.locator("#status")).to_have_text("")
    assert page.locator("main [aria-live], main [role=log]").count() == 0
    hold.set()
    expect(page.locator("#status")).to_have_text("Answer: First second.")


def test_the_end_is_followed_unless_the_reader_scrolls_away(page: Page, page_server: Server) -> None:
    held = [threading.Event() for _ in range(3)]
    lines = "".join(f"Line {number}\n\n" for number in range(60))
    page_server.script("Long.", lines, held[0], lines, held[1], lines, held[2], "The end.")
    ask(page, "Long.")
    left = "({ scrollHeight, scrollTop, clientHeight }) => scrollHeight - scrollTop - clientHeight"
    scroller = page.locator("#scroller")
    expect(page.locator(".markdown p")).to_have_count(60)
    assert scroller.evaluate(left) < 5
    held[0].set()
    expect(page.locator(".markdown p")).to_have_count(120)
    assert scroller.evaluate(left) < 5
    scroller.evaluate("(scroller) => scroller.scrollTo(0, 100)")
    expect(button(page, "To the end")).to_be_visible()
    held[1].set()
    expect(page.locator(".markdown p")).to_have_count(180)
    assert scroller.evaluate("(scroller) => scroller.scrollTop") == 100
    held[2].set()
    expect(page.locator(".markdown p")).to_have_count(181)
    assert scroller.evaluate("(scroller) => scroller.scrollTop") == 100
    button(page, "To the end").click()
    assert scroller.evaluate(left) < 5

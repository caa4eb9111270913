"""The page in a real browser: conversations that it keeps, settings, and the key of a server that wants one."""

from __future__ import annotations

import threading

from page_reader import QUESTION, SHAPES, Page, answered, ask, button, expect, ready
from page_stand_in import Server


def test_a_conversation_and_its_picture_are_there_after_a_reload(page: Page, page_server: Server) -> None:
    page.set_input_files("input[type=file]", SHAPES)
    ask(page, QUESTION)
    answered(page, "3")
    ready(page, page_server.address)  # not the conversation's own address
    expect(page.locator(".turn")).to_have_count(0)
    page.get_by_role("link", name=QUESTION).click()
    answered(page, "3")
    picture = page.get_by_role("img", name="shapes.png")
    page.wait_for_function("document.querySelector('.said img').naturalWidth > 0")
    expect(picture).to_be_visible()
    ask(page, "What colour is the star?")
    answered(page, "yellow", 2)
    assert page_server.asked[-1]["messages"][0]["content"][0]["type"] == "image_url"


def test_conversations_are_renamed_and_deleted_and_stay_so(page: Page, page_server: Server) -> None:
    for words in ("Apples and pears, which of them are heavier on average?", "Plums"):
        page_server.script(words, "Fruit.")
        ask(page, words)
        answered(page, "Fruit.")
        button(page, "New conversation").click()
        expect(page.locator(".turn")).to_have_count(0)
    links = page.locator("#list a")
    expect(links).to_have_text(["Plums", "Apples and pears, which of them are heavier on…"])
    links.nth(1).click()
    page.locator("#list li").nth(1).get_by_role("button", name="Rename").click()
    title = page.get_by_role("dialog").get_by_label("Title")
    expect(title).to_be_focused()
    title.fill("Fruit by weight")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Fruit by weight")
    page.get_by_role("link", name="Plums").hover()
    button(page, "Delete Plums").click()
    page.keyboard.press("Escape")
    expect(links).to_have_count(2)
    button(page, "Delete Plums").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(links).to_have_text(["Fruit by weight"])
    ready(page)
    expect(links).to_have_text(["Fruit by weight"])
    answered(page, "Fruit.")


def test_nothing_of_a_deleted_conversation_is_left(page: Page) -> None:
    page.set_input_files("input[type=file]", SHAPES)
    ask(page, QUESTION)
    answered(page, "3")
    stored = """() => new Promise((resolve) => {
        const opening = indexedDB.open("gemma");
        opening.onsuccess = () => {
            const database = opening.result;
            const reading = database.transaction(["titles", "turns", "pictures"]);
            const counts = ["titles", "turns", "pictures"].map((name) => reading.objectStore(name).count());
            reading.oncomplete = () => { database.close(); resolve(counts.map((count) => count.result)); };
        };
    })"""
    assert page.evaluate(stored) == [1, 1, 1]
    button(page, f"Delete {QUESTION}").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("#list li")).to_have_count(0)
    expect(page.locator(".turn")).to_have_count(0)
    assert page.evaluate(stored) == [0, 0, 0]


def test_an_answer_goes_on_while_another_conversation_is_shown(page: Page, page_server: Server) -> None:
    hold = threading.Event()
    page_server.script("Slow", "One ", hold, "two.")
    page_server.script("Quick", "Done.")
    ask(page, "Slow")
    expect(page.locator(".markdown")).to_have_text("One")
    button(page, "New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    ask(page, "Quick")
    answered(page, "Done.")
    page.get_by_role("link", name="Slow").click()
    expect(page.locator(".markdown")).to_have_text("One")
    expect(button(page, "Stop")).to_be_visible()
    hold.set()
    answered(page, "One two.")
    expect(button(page, "Send")).to_be_visible()


def test_two_tabs_show_the_same_conversations(page: Page, page_server: Server) -> None:
    page_server.script("Here", "There.")
    other = page.context.new_page()
    ready(other, page_server.address)
    ask(page, "Here")
    answered(page, "There.")
    expect(other.get_by_role("link", name="Here")).to_be_visible()
    other.get_by_role("link", name="Here").click()
    answered(other, "There.")
    page_server.script("Here again", "Yes.")
    ask(page, "Here again")
    answered(page, "Yes.", 2)
    answered(other, "Yes.", 2)


def test_settings_go_with_each_question_and_are_kept(page: Page, page_server: Server) -> None:
    page_server.models = ["demo", "another"]
    page_server.script("Hello", "Hi.")
    try:
        ready(page)
        ask(page, "Hello")
        answered(page, "Hi.")
        assert {*page_server.asked[-1]} == {"model", "messages", "stream", "stream_options"}
        button(page, "Settings").click()
        dialog = page.get_by_role("dialog", name="Settings")
        dialog.get_by_label("Model").select_option("another")
        dialog.get_by_label("System text").fill("Be brief.")
        dialog.get_by_label("Temperature").fill("0.5")
        dialog.get_by_label("Longest answer").fill("33")
        button(dialog, "Save").click()
        ready(page)
        button(page, "Answer again").click()
        answered(page, "Hi.")
        expect(page.get_by_role("navigation")).to_contain_text("another")
    finally:
        page_server.models = ["demo"]
    asked = page_server.asked[-1]
    assert (asked["model"], asked["temperature"], asked["max_completion_tokens"]) == ("another", 0.5, 33)
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (asked["stream"], asked["stream_options"]) == (True, {"include_usage": True})


def test_settings_that_are_left_change_nothing_and_wrong_ones_are_not_taken(page: Page) -> None:
    button(page, "Settings").click()
    dialog = page.get_by_role("dialog", name="Settings")
    dialog.get_by_label("Temperature").fill("-1")
    button(dialog, "Save").click()
    expect(dialog).to_be_visible()
    button(dialog, "Cancel").click()
    expect(dialog).to_be_hidden()
    assert page.evaluate("localStorage.length") == 0
    button(page, "Settings").click()
    expect(dialog.get_by_label("Temperature")).to_have_value("")
    page.mouse.click(700, 5)  # beside it
    expect(dialog).to_be_hidden()


def test_a_server_with_a_key_is_given_it_once(page: Page, page_server: Server) -> None:
    page_server.script("Hello", "Hi.")
    page_server.key = "secret-1"
    try:
        ask(page, "Hello")
        dialog = page.get_by_role("dialog", name="Access key")
        dialog.get_by_label("Key").fill("wrong")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("That key was not accepted.")
        dialog.get_by_label("Key").fill("secret-1")
        page.keyboard.press("Enter")
        answered(page, "Hi.")
        ready(page)
        expect(dialog).to_be_hidden()
        button(page, "Answer again").click()
        answered(page, "Hi.")
    finally:
        page_server.key = None


def test_a_key_that_is_not_given_can_be_given_later(page: Page, page_server: Server) -> None:
    page_server.script("Hello", "Hi.")
    page_server.key = "secret-2"
    dialog = page.get_by_role("dialog", name="Access key")
    try:
        page.reload()
        expect(dialog).to_be_visible()  # asked for as soon as the page opens
        page.keyboard.press("Escape")
        ask(page, "Hello")
        button(dialog, "Cancel").click()
        expect(page.locator(".error")).to_contain_text("a key is wanted")
        button(page, "Try again").click()
        dialog.get_by_label("Key").fill("secret-2")
        page.keyboard.press("Enter")
        answered(page, "Hi.")
    finally:
        page_server.key = None

"""The page as `serve` serves it, in a real browser."""

from __future__ import annotations

import http.client

import pytest
from page_reader import QUESTION, SHAPES, Browser, answered, ask, chromium, expect, shown
from serving import Server, serving

from mlx_gemma3.server.app import PAGE_POLICY


@pytest.fixture(scope="module")
def browser() -> object:
    with chromium() as opened:
        yield opened


def test_a_picture_is_asked_about_and_found_again(browser: Browser, server: Server) -> None:
    with shown(browser, f"{server.address}/") as page:
        page.set_input_files("input[type=file]", SHAPES)
        ask(page, QUESTION)
        expect(answered(page, "3")).to_contain_text("tokens/s")
        ask(page, "hello")
        answered(page, "I only know simple drawings.", 2)
        page.reload()
        expect(page.get_by_role("img", name="shapes.png")).to_be_visible()
        answered(page, "I only know simple drawings.", 2)


def test_a_key_is_asked_for(browser: Browser) -> None:
    with serving("-m", "demo", "--api-key", "secret") as server, browser.new_context() as context:
        page = context.new_page()
        page.goto(f"{server.address}/")
        page.get_by_role("dialog").get_by_role("textbox").fill("secret")
        page.keyboard.press("Enter")
        ask(page, "hello")
        answered(page, "I only know simple drawings.")


def test_what_the_page_is_made_of(server: Server) -> None:
    status, text = server.ask("/")
    told = {name.lower(): value for name, value in server.headers.items()}
    assert status == 200 and text.startswith("<!") and told["content-security-policy"] == PAGE_POLICY
    assert server.ask("/page/page.js")[0] == 200 and server.headers["content-type"].startswith("text/javascript")
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    for path in ("/page/../app.py", "/page/%2e%2e%2fapp.py", "/page/__init__.py", "/page/", "/page/nothing.js"):
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 404 and answer.read(), path
    connection.close()

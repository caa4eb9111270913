"""The chat template against the reference's texts and errors, and which control tokens are its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gemma3.errors import PromptError, TemplateError
from mlx_gemma3.prompt.template import Control, render_chat, render_pieces

GOLDENS = Path(__file__).parent / "goldens" / "prompt"

contents = st.one_of(
    st.text(max_size=6),
    st.lists(
        st.one_of(
            st.just({"type": "image"}),
            st.builds(lambda text: {"type": "text", "text": text}, st.text(max_size=6)),
        ),
        max_size=3,
    ),
)


@st.composite
def chats(draw: st.DrawFn) -> list[dict[str, Any]]:
    turns = draw(st.lists(contents, min_size=1, max_size=4))
    return [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(turns)]


def test_texts_and_errors_of_the_reference() -> None:
    for line in (GOLDENS / "chats.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "text" in row:
            assert render_chat(row["messages"], **row["options"]) == row["text"], row
            continue
        with pytest.raises(TemplateError) as caught:
            render_chat(row["messages"], **row["options"])
        assert row["error"] in str(caught.value), row
        assert "\n" not in str(caught.value) and caught.value.code == "template"


def test_the_format() -> None:
    messages = [
        {"role": "system", "content": "Be brief. "},
        {
            "role": "user",
            "content": [{"type": "text", "text": " Hi \n"}, {"type": "image"}, {"type": "text", "text": "?"}],
        },
        {"role": "assistant", "content": "Hello!\n"},
        {"role": "user", "content": "Bye."},
    ]
    text = (
        "<bos><start_of_turn>user\nBe brief. \n\nHi<start_of_image>?<end_of_turn>\n"
        "<start_of_turn>model\nHello!<end_of_turn>\n<start_of_turn>user\nBye.<end_of_turn>\n"
    )
    assert render_chat(messages, add_generation_prompt=False) == text
    assert render_chat(messages) == text + "<start_of_turn>model\n"
    assert render_chat(messages[:3], continue_final_message=True).endswith("<start_of_turn>model\nHello!")


@given(messages=chats(), generation=st.booleans())
def test_pieces_are_the_text(messages: list[dict[str, Any]], generation: bool) -> None:
    pieces = render_pieces(messages, add_generation_prompt=generation)
    assert "".join(pieces) == render_chat(messages, add_generation_prompt=generation)
    own = [str(piece) for piece in pieces if isinstance(piece, Control)]
    assert own.count("<bos>") == 1 and own[0] == "<bos>"
    assert own.count("<start_of_turn>") == len(messages) + generation
    assert own.count("<end_of_turn>") == len(messages)
    items = [item for message in messages if not isinstance(message["content"], str) for item in message["content"]]
    assert own.count("<start_of_image>") == sum(item["type"] == "image" for item in items)


def test_typed_control_tokens_are_not_the_templates() -> None:
    pieces = render_pieces([{"role": "user", "content": "x<end_of_turn><start_of_image>"}], add_generation_prompt=False)
    assert [(str(piece), isinstance(piece, Control)) for piece in pieces] == [
        ("<bos>", True),
        ("<start_of_turn>", True),
        ("user\n", False),
        ("x<end_of_turn><start_of_image>", False),
        ("<end_of_turn>", True),
        ("\n", False),
    ]


@given(messages=chats())
def test_a_continued_message_begins_the_closed_one(messages: list[dict[str, Any]]) -> None:
    """Cutting takes away from the end only, and leaves no white space there."""
    try:
        cut = render_chat(messages, continue_final_message=True)
    except TemplateError:
        last = messages[-1]["content"]
        assert not isinstance(last, str) and all(item["type"] == "image" for item in last)
        return
    assert render_chat(messages, add_generation_prompt=False).startswith(cut) and cut == cut.rstrip()


def test_a_continued_picture_message_ends_at_its_last_text() -> None:
    content = [{"type": "text", "text": " a "}, {"type": "image"}, {"type": "text", "text": " b \n"}, {"type": "image"}]
    text = render_chat([{"role": "user", "content": content}], continue_final_message=True)
    assert text == "<bos><start_of_turn>user\na<start_of_image>b"


def test_messages_are_left_alone() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}], "name": None}]
    before = json.dumps(messages)
    render_chat(messages, continue_final_message=True)
    assert json.dumps(messages) == before


@pytest.mark.parametrize("messages", ["Hi", {"role": "user", "content": "Hi"}, 5, None, ["Hi"], [b"Hi"], []])
def test_what_is_no_chat(messages: Any) -> None:
    with pytest.raises(TemplateError) as caught:
        render_chat(messages)
    assert isinstance(caught.value, PromptError)

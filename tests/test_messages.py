"""Messages in the shapes in which programs write them: read alike, or refused by name."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image

from mlx_gemma3.errors import PromptError, TemplateError
from mlx_gemma3.prompt import messages
from mlx_gemma3.prompt.messages import check_roles, items, read


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), "purple").save(buffer, "PNG")
    return buffer.getvalue()


FILE = png()
ENCODED = base64.b64encode(FILE).decode()
DATA = f"data:image/png;base64,{ENCODED}"
TEXT = {"type": "text", "text": "Which?"}


def item(content: Any) -> Any:
    """The one picture of some content, whose words are `Which?`."""
    message = {"role": "user", "content": content}
    picture, text = read([message])[0]["content"]
    assert text == TEXT and picture["type"] == "image"
    return picture["image"]


@pytest.mark.parametrize(
    ("picture", "source"),
    [
        ({"type": "image_url", "image_url": {"url": DATA, "detail": "high"}}, DATA),  # OpenAI chat
        ({"type": "image_url", "image_url": DATA}, DATA),
        ({"type": "image_url", "url": DATA}, DATA),
        ({"type": "input_image", "image_url": DATA, "detail": "auto"}, DATA),  # OpenAI Responses
        (
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ENCODED}},
            FILE,
        ),  # Anthropic
        ({"type": "image", "source": {"type": "url", "url": "https://a.org/b.png"}}, "https://a.org/b.png"),
        ({"type": "image", "image": "a.png"}, "a.png"),  # transformers
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image", "url": "https://a.org/b.png"}, "https://a.org/b.png"),
        ({"type": "image", "base64": ENCODED}, FILE),
        ({"type": "image", "base64": DATA}, FILE),
        ({"type": "image", "base64": ENCODED.encode()}, FILE),
        ({"type": "image", "base64": FILE}, FILE),
        ({"type": "image", "base64": base64.urlsafe_b64encode(FILE).decode().rstrip("=")}, FILE),
        ({"type": "image", "base64": base64.encodebytes(FILE).decode()}, FILE),
        ({"type": "image", "base64": ENCODED, "mime_type": "image/png"}, FILE),  # LangChain 1
        ({"type": "image", "url": DATA, "mime_type": "image/png", "id": "x"}, DATA),
        ({"type": "image", "source_type": "base64", "data": ENCODED, "mime_type": "image/png"}, FILE),  # LangChain 0.3
        ({"type": "image", "source_type": "url", "url": "https://a.org/b.png"}, "https://a.org/b.png"),
        ({"type": "media", "mime_type": "image/png", "data": ENCODED}, FILE),
        ({"inline_data": {"mime_type": "image/png", "data": ENCODED}}, FILE),  # Gemini
        ({"inlineData": {"mimeType": "image/png", "data": ENCODED}}, FILE),
        ({"image": {"format": "png", "source": {"bytes": FILE}}}, FILE),  # Bedrock
    ],
)
def test_pictures_of_all_the_usual_shapes(picture: dict[str, Any], source: Any) -> None:
    assert item([picture, TEXT]) == source
    assert item((picture, {"type": "input_text", "text": "Which?"})) == source
    assert item(iter([picture, "Which?"])) == source


def test_words_of_all_the_usual_shapes() -> None:
    for content in (
        [TEXT], (TEXT,), TEXT, ["Which?"], [{"text": "Which?"}], [{"type": "output_text", "text": "Which?"}],
        [{"type": "refusal", "refusal": "Which?"}], [{"type": "text", "text": "Which?", "cache_control": {}}],
    ):  # fmt: skip
        assert read([{"role": "user", "content": content}]) == [{"role": "user", "content": [TEXT]}]
    assert read([{"role": "user", "parts": [{"text": "Which?"}]}]) == [{"role": "user", "content": [TEXT]}]
    for content in ("Which?", None, []):
        assert read([{"role": "user", "content": content}]) == [{"role": "user", "content": content}]
    roles = [{"role": role, "content": ""} for role in ("developer", "human", "ai", "assistant", "model")]
    assert read([{"type": "human", "content": "Which?"}])[0]["role"] == "user"
    assert "role" not in read([{"type": "message", "content": "Which?"}])[0]
    assert [message["role"] for message in read(roles)] == ["system", "user", "assistant", "assistant", "model"]


def test_the_pictures_of_ollama_stand_before_the_words() -> None:
    for pictures in ([ENCODED, "a.png"], (ENCODED, "a.png")):
        (message,) = read([{"role": "user", "content": "Which?", "images": pictures}])
        assert message == {
            "role": "user",
            "content": [{"type": "image", "image": ENCODED}, {"type": "image", "image": "a.png"}, TEXT],
        }
    assert read([{"role": "user", "content": "Which?", "images": FILE}])[0]["content"][0]["image"] == FILE
    assert read([{"role": "user", "content": "Which?", "images": None}]) == [{"role": "user", "content": "Which?"}]


def test_every_text_of_a_system_message_is_read() -> None:
    texts = [{"type": "text", "text": "Be brief. "}, {"type": "text", "text": "Be kind."}]
    assert read([{"role": "system", "content": texts}])[0]["content"] == "Be brief. Be kind."
    with pytest.raises(PromptError, match="user message"):
        read([{"role": "system", "content": [*texts, {"type": "image", "image": "a.png"}]}])


def test_reading_twice_changes_nothing_and_the_callers_stay() -> None:
    content = [{"type": "image", "base64": ENCODED}, "Which?", {"type": "image"}]
    said = [{"role": "developer", "content": ["Be brief."]}, {"role": "user", "content": content, "name": "Ann"}]
    before = repr(said)
    once = read(said)
    assert read(once) == once and repr(said) == before and once[1]["name"] == "Ann"


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"type": "input_audio", "input_audio": {}}, "message 1, item 1: got type 'input_audio'"),
        ({"type": "video", "path": "a.mp4"}, "type 'video'"),
        ({"type": "video_url", "video_url": {"url": "a"}}, "type 'video_url'"),
        ({"type": "tool_result", "content": "5"}, "type 'tool_result'"),
        ({"type": "tool_use", "id": "x"}, "type 'tool_use'"),
        ({"type": "file", "file": {"file_id": "x"}}, "type 'file'"),
        ({"type": "thinking", "thinking": "…"}, "type 'thinking'"),
        ({"type": "image", "file_id": "x"}, "a picture by its file_id"),
        ({"type": "image", "source_type": "id", "id": "x"}, "a picture by its id"),
        ({"type": "image", "source": {"type": "file", "file_id": "x"}}, "a picture by its type, file_id"),
        ({"type": "image", "url": ""}, "url: got an empty text"),
        ({"type": "image_url", "image_url": None}, "'image_url' without a picture"),
        ({"type": "image", "base64": "no base64!"}, "picture in base64"),
        ({"type": "image", "base64": 5}, "base64: got int"),
        ({"type": "media", "mime_type": "audio/wav", "data": ENCODED}, "data of type 'audio/wav'"),
        ({"type": "text"}, "text: got none, only type"),
        ({"type": "text", "text": None}, "text: got NoneType"),
        ({"type": "text", "text": 5}, "text: got int"),
        ({"type": ["text"], "text": "a"}, "type: got list"),
        ({"content": "a"}, "no type, and content"),
        ({}, "no type, and nothing else"),
        (5, "got int, want an object"),
        (None, "got NoneType"),
        (("text", "a"), "got tuple"),
        ({"type": "\x1b[31m" * 5000}, r"x1b\[31m"),
    ],
)
def test_items_that_are_neither(bad: Any, named: str) -> None:
    with pytest.raises(PromptError, match=named) as caught:
        read([{"role": "user", "content": [bad, TEXT]}])
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


def test_messages_that_ask_for_more() -> None:
    for key, value in (("tool_calls", [{"id": "x"}]), ("function_call", {"name": "f"}), ("audio", {"id": "x"})):
        with pytest.raises(PromptError, match=f"message 2: {key}"):
            read([{"role": "user", "content": "a"}, {"role": "assistant", "content": None, key: value}])
    assert read([{"role": "assistant", "content": "a", "tool_calls": None}])[0]["content"] == "a"
    with pytest.raises(PromptError, match="none, only role, text"):
        read([{"role": "user", "text": "Which?"}])
    nested: dict[str, Any] = {}
    nested["url"] = nested
    with pytest.raises(PromptError, match="its address or its bytes"):
        read([{"role": "user", "content": [{"type": "image_url", "image_url": nested}]}])


@pytest.mark.parametrize("role", ["tool", "function", "sheep", "User", ""])
def test_roles_that_no_turn_is_for(role: str) -> None:
    with pytest.raises(TemplateError, match=r"message 2: role: got '.*', want system, user, assistant, model"):
        check_roles([{"role": "user", "content": "a"}, {"role": role, "content": "5"}])
    check_roles([{"role": name, "content": ""} for name in messages.ROLES])


def test_the_items_of_one_turn() -> None:
    assert items("Which?") == items(["Which?"]) == items(TEXT) == [TEXT]
    for wrong in (5, None, b"Which?"):
        with pytest.raises(PromptError, match=type(wrong).__name__):
            items(wrong, "turn")


def test_what_is_no_chat_is_left_to_the_template() -> None:
    for wrong in ("Hi", {"role": "user"}, 5, None, b"Hi"):
        assert read(wrong) is wrong
    assert read(["Hi", 5]) == ["Hi", 5]
    assert read([{"role": "user", "content": 5}]) == [{"role": "user", "content": 5}]

"""Messages that do not alternate become turns that do."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_gemma3.errors import PromptError
from mlx_gemma3.prompt.template import render_chat
from mlx_gemma3.server.turns import goes_on, merged


def say(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


IMAGE = {"type": "image", "image": b"\x89PNG"}
TEXT = {"type": "text", "text": "b"}


@pytest.mark.parametrize(
    ("said", "turns"),
    [
        ([say("user", "a"), say("user", "b")], [say("user", "a\n\nb")]),
        ([say("system", "s"), say("user", "a")], [say("system", "s"), say("user", "a")]),
        ([say("system", "s"), say("system", "t"), say("user", "a")], [say("system", "s\n\nt"), say("user", "a")]),
        (
            [say("user", "a"), say("assistant", "b"), say("system", "s"), say("user", "c")],
            [say("user", "a"), say("assistant", "b"), say("user", "s\n\nc")],
        ),
        ([say("user", "a"), say("system", "s")], [say("user", "a\n\ns")]),
        (
            [say("user", "a"), say("model", "b"), say("assistant", "c"), say("user", "d")],
            [say("user", "a"), say("assistant", "b\n\nc"), say("user", "d")],
        ),
        ([say("user", ""), say("user", "b")], [say("user", "b")]),
        (
            [say("user", "a"), say("user", [IMAGE, TEXT])],
            [say("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "\n\n"}, IMAGE, TEXT])],
        ),
        ([say("assistant", "a"), say("user", "b")], [say("assistant", "a"), say("user", "b")]),  # the template judges
        ([1, say("user", "b")], [1, say("user", "b")]),
    ],
)
def test_turns_alternate(said: list[Any], turns: list[Any]) -> None:
    assert merged(said) == turns
    if all(isinstance(turn, dict) for turn in turns) and turns[0]["role"] != "assistant":
        render_chat(turns)


@pytest.mark.parametrize("content", [False, 3, {"a": 1}])
def test_content_that_is_none(content: Any) -> None:
    with pytest.raises(PromptError, match="message 2: content"):
        merged([say("user", "a"), say("system", content)])


def test_what_goes_on() -> None:
    assert goes_on([say("user", "a"), say("assistant", "b")]) and goes_on([say("user", "a"), say("model", "b")])
    assert not goes_on([say("user", "a")]) and not goes_on([])

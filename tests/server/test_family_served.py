"""Checkpoints with turns of their own behind the server: whole messages reach the template, thoughts stay apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_family
from serving import Server, serving

import mlx_gemma3 as g3

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"at": {"enum": ["sky", "sea"]}}, "required": ["at"]},
    },
}
HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
SHORT = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    for kind in ("functiongemma", "thinking", "translategemma"):
        tiny_family.write(folder / kind, kind)
    template = tiny_family.write(folder / "thinks", "thinking") / "chat_template.jinja"
    template.write_text(
        template.read_text(encoding="utf-8").replace("{% if think %}", "{% if true %}"), encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="module")
def served(family: Path) -> Iterator[Server]:
    models = [word for kind in family.iterdir() for word in ("-m", str(kind))]
    aliases = [word for kind in family.iterdir() for word in ("--alias", f"{kind.name}={kind}")]
    with serving(*models, *aliases) as running:
        yield running


def tokens(family: Path, kind: str, messages: list[dict[str, Any]], **options: Any) -> int:
    template = g3.ChatTemplate.from_folder(family / kind)
    return len(g3.Tokenizer.from_folder(family / kind).encode(template.render(messages, **options)))


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def test_tools_and_their_results_reach_functiongemmas_template(served: Server, family: Path) -> None:
    asked = {"model": "functiongemma", "messages": HI, "tools": [TOOL], "tool_choice": "required", "max_tokens": 60}
    status, answer = served.ask("/v1/chat/completions", {**asked, "parallel_tool_calls": False, "temperature": 0})
    message = answer["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert status == 200 and call["function"]["name"] == "look" and message["content"] is None
    given = json.loads(call["function"]["arguments"])
    assert given["at"] in ("sky", "sea")
    found = {"role": "tool", "tool_call_id": call["id"], "content": "blue"}
    _, answer = served.ask("/v1/chat/completions", {**asked, "messages": [*HI, message, found], "tool_choice": "none"})
    rendered = [
        *HI,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": given}}]},
        {**found, "name": "look"},
    ]
    assert answer["usage"]["prompt_tokens"] == tokens(family, "functiongemma", rendered)
    _, text = served.ask("/v1/chat/completions", {**asked, "stream": True})
    deltas = [one["choices"][0]["delta"] for one in events(text)]
    pieces = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert pieces[0]["function"]["name"] == "look" and json.loads(pieces[1]["function"]["arguments"])["at"]


def test_thoughts_in_each_dialect(served: Server) -> None:
    think = {"model": "thinking", **SHORT, "chat_template_kwargs": {"think": True}, "messages": HI}
    message = served.ask("/v1/chat/completions", think)[1]["choices"][0]["message"]
    assert message["reasoning_content"] and message["content"] == ""
    _, text = served.ask("/v1/chat/completions", {**think, "stream": True})
    deltas = [one["choices"][0]["delta"] for one in events(text) if one["choices"]]
    assert "".join(one.get("reasoning_content", "") for one in deltas) == message["reasoning_content"]
    assert not any(one.get("content") for one in deltas)
    thoughts = message["reasoning_content"]

    asked = {"model": "thinks", "messages": HI, "max_tokens": SHORT["max_tokens"], "temperature": 0}
    for thinking, shown in (
        (None, thoughts),
        ({"type": "enabled", "budget_tokens": 1024}, thoughts),
        ({"type": "disabled"}, ""),
    ):
        body = {**asked, "thinking": thinking}
        blocks = served.ask("/v1/messages", body)[1]["content"]
        assert [one["thinking"] for one in blocks if one["type"] == "thinking"] == [shown] * bool(shown)
        assert blocks[-1] == {"type": "text", "text": ""}
        streamed = events(served.ask("/v1/messages", {**body, "stream": True})[1])
        assert (
            "".join(one["delta"].get("thinking", "") for one in streamed if one["type"] == "content_block_delta")
            == shown
        )
        begun = [one["content_block"]["type"] for one in streamed if one["type"] == "content_block_start"]
        assert begun == ["thinking"] * bool(shown) + ["text"]
    status, told = served.ask("/v1/messages", {**asked, "thinking": {"type": "aloud"}})
    assert status == 400 and "thinking.type: got aloud" in told["error"]["message"]

    for think, shown in ((True, thoughts), (False, "")):
        body = {"model": "thinks", "messages": HI, "think": think, "options": {"temperature": 0, "num_predict": 6}}
        assert served.ask("/api/chat", {**body, "stream": False})[1]["message"].get("thinking", "") == shown
        lines = [json.loads(line) for line in served.ask("/api/chat", body)[1].splitlines()]
        assert "".join(one["message"].get("thinking", "") for one in lines) == shown


def test_turns_are_not_merged_for_a_template_of_ones_own(served: Server, family: Path) -> None:
    twice = [*HI, *HI]
    status, answer = served.ask("/v1/chat/completions", {"model": "thinking", "messages": twice, **SHORT})
    assert status == 400 and "two turns of user at 1" in answer["error"]["message"]
    developer = [{"role": "developer", "content": "d"}, *HI]
    for path in ("/v1/chat/completions", "/api/chat"):
        body: dict[str, Any] = {"model": "thinking", "messages": developer, "stream": False}
        more = SHORT if path.startswith("/v1") else {"options": {"temperature": 0, "num_predict": 3}}
        status, answer = served.ask(path, {**body, **more})
        assert status == 200
        found = answer["usage"]["prompt_tokens"] if path.startswith("/v1") else answer["prompt_eval_count"]
        assert found == tokens(family, "thinking", developer)


def test_translategemma_is_told_languages_by_its_items(served: Server, family: Path) -> None:
    item = {"type": "text", "source_lang_code": "de", "target_lang_code": "en", "text": "hallo"}
    messages = [{"role": "user", "content": [item]}]
    asked = {"model": "translategemma", "messages": messages, **SHORT}
    status, answer = served.ask("/v1/chat/completions", asked)
    assert status == 200 and answer["usage"]["prompt_tokens"] == tokens(family, "translategemma", messages)
    item["target_lang_code"] = "xx"
    status, answer = served.ask("/v1/chat/completions", asked)
    assert status == 400 and "codes of this checkpoint" in answer["error"]["message"]


def test_no_file_of_the_server_is_read_for_a_picture_anywhere_in_the_messages(served: Server, tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(b"x")
    picture = {"type": "image", "image": str(path), "source_lang_code": "de", "target_lang_code": "en"}
    for model, messages in (
        ("translategemma", [{"role": "user", "content": [picture]}]),
        ("thinking", [{"role": "tool", "content": [picture]}]),
        ("thinking", [{"role": "user", "content": [{"type": "image", "path": str(path)}]}]),
        ("thinking", [{"role": "user", "content": "a", "images": [str(path)]}]),
    ):
        status, answer = served.ask("/v1/chat/completions", {"model": model, "messages": messages, **SHORT})
        assert status == 400 and "secret" not in answer["error"]["message"].replace(str(path), ""), answer
        assert "PNG" not in answer["error"]["message"] and "base64" in answer["error"]["message"], answer

"""Requests in the shapes that well-known programs send, and what they need in the answers."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from serving import PICTURE, QUESTION, Server, events

DATA = base64.b64encode(PICTURE.read_bytes()).decode()
URL = f"data:image/png;base64,{DATA}"
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


def test_zed(server: Server) -> None:
    """Every chunk has choices and an integer index, or it is the usage that was asked for, with all three counts."""
    body = {
        "model": "demo", "messages": [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        "stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 64, "stop": [],
        "temperature": 1.0, "parallel_tool_calls": None, "tools": [], "prompt_cache_key": "thread-1",
        "reasoning_effort": None,
    }  # fmt: skip
    status, text = server.ask("/v1/chat/completions", body)
    chunks = events(text)
    assert status == 200 and chunks.pop() == "[DONE]"
    assert all(type(choice["index"]) is int for chunk in chunks for choice in chunk["choices"])
    assert {"prompt_tokens", "completion_tokens", "total_tokens"} <= set(chunks[-1]["usage"])
    status, told = server.ask("/v1/chat/completions", {**body, "messages": []})
    assert status == 400 and isinstance(told["error"]["message"], str)


def test_cline_and_continue(server: Server) -> None:
    """Without `include_usage` no chunk is without a choice: `delta` of the first is read unguarded."""
    parts = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": URL}}]
    body = {
        "model": "demo", "stream": True, "temperature": 0, "messages": [SYSTEM, {"role": "user", "content": parts}],
    }  # fmt: skip
    status, text = server.ask("/v1/chat/completions", body)
    chunks = events(text)[:-1]
    assert status == 200 and all(chunk["choices"][0]["delta"] is not None for chunk in chunks)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks).strip()


def test_xcode(server: Server) -> None:
    status, listed = server.ask("/v1/models")
    assert status == 200 and listed["object"] == "list" and listed["data"][0]["object"] == "model"
    body = {"model": listed["data"][0]["id"], "stream": True, "messages": [SYSTEM, {"role": "user", "content": "hi"}]}
    assert events(server.ask("/v1/chat/completions", body)[1])[-1] == "[DONE]"


def test_open_webui(server: Server) -> None:
    assert server.ask("//v1/models")[0] == 200
    body = {
        "model": "demo", "stream": False, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 50,
        "metadata": {"task": "title_generation", "chat_id": "1"},
    }  # fmt: skip
    assert server.ask("/v1/chat/completions", body)[0] == 200
    message = {"role": "user", "content": QUESTION, "images": [DATA]}
    told = server.ask("/api/chat", {"model": "demo", "stream": False, "messages": [message], "options": {}})[1]
    assert told["message"]["content"] == "3"


def test_raycast(server: Server) -> None:
    assert server.ask("/api/tags")[1]["models"][0]["name"] == "demo"
    shown = server.ask("/api/show", {"model": "demo"})[1]
    assert {"completion", "vision"} <= set(shown["capabilities"]) and shown["model_info"]["general.architecture"]


def test_codex(server: Server) -> None:
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]},
    ]
    body = {
        "model": "demo", "instructions": "You write code.", "input": items, "tools": [], "tool_choice": "auto",
        "parallel_tool_calls": False, "reasoning": None, "store": False, "stream": True, "include": [],
        "prompt_cache_key": "1",
    }  # fmt: skip
    status, text = server.ask("/v1/responses", body)
    found = events(text)
    assert status == 200 and [event["sequence_number"] for event in found] == list(range(len(found)))
    assert found[-1]["type"] == "response.completed" and found[-1]["response"]["usage"]["total_tokens"]


def test_claude_code(server: Server) -> None:
    cached: dict[str, Any] = {"cache_control": {"type": "ephemeral"}}
    body = {
        "model": "claude-sonnet", "max_tokens": 32000, "stream": True, "temperature": 1,
        "system": [{"type": "text", "text": "You are an agent.", **cached}], "metadata": {"user_id": "1"}, "tools": [],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"} | cached]}],
    }  # fmt: skip
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "x", "x-api-key": "none"}
    status, text = server.ask("/v1/messages?beta=true", body, headers=headers)
    kinds = [event["type"] for event in events(text)]
    assert status == 200 and kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    counted = {key: value for key, value in body.items() if key in ("model", "messages", "system", "tools")}
    assert server.ask("/v1/messages/count_tokens", counted, headers=headers)[1]["input_tokens"] > 5


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x " * 9000}]}),
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "x " * 9000}]}),
        ("/v1/responses", {"input": "x " * 9000}),
        ("/api/chat", {"messages": [{"role": "user", "content": "x " * 9000}]}),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_an_early_error_is_a_status_also_of_a_stream(
    server: Server, path: str, body: dict[str, Any], stream: bool
) -> None:
    status, told = server.ask(path, {**body, "stream": stream})
    assert status == 400 and "tokens" in str(told["error"]) and "8192" in str(told["error"])

"""Tools: what is handed in, how the prompt says it, calls that parse, functions that are run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

import mlx_gemma3 as g3
from mlx_gemma3.errors import OptionError, PromptError
from mlx_gemma3.grammar.tools import read
from mlx_gemma3.prompt import tools as prompts

WILD: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "top_p": 1, "max_tokens": 150}


def get_weather(city: Literal["Oslo", "Rome"], days: Annotated[Literal[1, 2], "how many"] = 1) -> dict[str, Any]:
    """Weather to come.

    Args:
        city: where
    """
    return {"city": city, "days": days}


def stop_it() -> str:
    """Ends."""
    raise ValueError("no power")


OPENAI = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"what": {"enum": ["sky", "sea"]}}}},
}


@pytest.fixture(scope="module")
def chat(chat_folder: Path) -> Iterator[g3.Engine]:
    with g3.load(chat_folder) as engine:
        yield engine


def test_tools_are_read_in_every_shape() -> None:
    weather, anthropic, flat, plain = read(
        [
            get_weather,
            {"name": "a", "input_schema": {"type": "object", "properties": {"x": {}}}},
            {"type": "function", "name": "b", "description": "d", "parameters": {"properties": {}}},
            OPENAI,
        ]
    )
    assert weather.declaration == {
        "name": "get_weather",
        "description": "Weather to come.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Oslo", "Rome"], "description": "where"},
                "days": {"enum": [1, 2], "description": "how many"},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    }
    assert (
        anthropic.parameters == {"type": "object", "properties": {"x": {}}}
        and flat.description == "d"
        and plain.name == "look"
    )
    for wrong in ([3], [{"type": "web_search"}], [{"name": "a b"}], [get_weather, get_weather], [lambda x: x]):
        with pytest.raises(OptionError):
            read(wrong)


def test_the_prompt_is_the_documented_one(chat: g3.Engine) -> None:
    declarations = [tool.declaration for tool in read([OPENAI])]
    (message,) = prompts.with_tools([{"role": "user", "content": "Hi"}], declarations)
    head, _, rest = message["content"].partition("[\n")
    assert head.startswith(
        "You have access to functions. If you decide to invoke any of the function(s),\nyou MUST put"
    )
    assert json.loads("[" + rest.removesuffix("Hi")) == declarations and rest.endswith("]\nHi")
    plain, told = chat.count_tokens("Hi"), chat.count_tokens("Hi", tools=[OPENAI])
    assert told > plain + 100 and chat.count_tokens("Hi", tools=[OPENAI], tool_choice="none") == plain


def test_tools_that_may_not_be_called_leave_the_answer_free(chat: g3.Engine) -> None:
    reply = chat.generate("Hi", tools=[OPENAI], tool_choice="none", logit_bias={106: 100.0}, max_tokens=5)
    assert reply.finish_reason == "stop" and reply.parsed is None and not reply.tool_calls


def test_calls_and_results_in_messages_are_words() -> None:
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": '{"x": 1}'}} for name in "ab"]
    said = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "b", "content": "second"},
        {"role": "tool", "tool_call_id": "a", "content": "first"},
    ]
    user, model, found = prompts.plain(said)
    assert user is said[0] and found["role"] == "user"
    assert json.loads(model["content"]) == [{"name": name, "parameters": {"x": 1}} for name in "ab"]
    assert found["content"] == "```tool_output\nfirst\n```\n```tool_output\nsecond\n```"
    picture = {"role": "tool", "content": [{"type": "text", "text": "see"}, {"type": "image", "image": b""}]}
    kinds = [item["type"] for item in prompts.plain([picture])[0]["content"]]
    assert kinds == ["text", "image", "text"]
    for wrong in ({"role": "tool"}, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}):
        with pytest.raises(PromptError):
            prompts.plain([wrong])


def test_every_call_parses_and_fits(chat: g3.Engine) -> None:
    for seed in range(6):
        stream = chat.stream("the", tools=[get_weather, OPENAI], tool_choice="required", seed=seed, **WILD)
        events: list[Any] = []
        while not events or events[-1]["kind"] not in ("done", "error"):
            events.append(stream.next())
        reply = stream.reply
        told = [event for event in events if event["kind"] == "tool_call"]
        pieces = {call["id"]: "" for call in reply.tool_calls}
        for event in told:
            pieces[event["call_id"]] = pieces.get(event["call_id"], "") + event["arguments"]
        if reply.finish_reason == "length":
            continue
        assert reply.finish_reason == "tool_calls" and reply.text == "" and reply.tool_calls
        assert not [event for event in events if event["kind"] == "text"]
        for call in reply.tool_calls:
            assert json.loads(pieces[call["id"]]) == call["arguments"] and call["name"] in ("get_weather", "look")
            if call["name"] == "get_weather":
                assert call["arguments"]["city"] in ("Oslo", "Rome")
    one = chat.generate("the", tools=[get_weather, OPENAI], tool_choice="look", parallel_tool_calls=False, **WILD)
    assert [call["name"] for call in one.tool_calls] == ["look"]


def test_words_are_words_and_never_half_a_call(chat: g3.Engine) -> None:
    for seed in range(8):
        reply = chat.generate("the", tools=[OPENAI], seed=seed, **(WILD | {"max_tokens": 12}))
        if not reply.tool_calls and reply.finish_reason == "stop":
            assert reply.text[:1] not in ("{", "[", "")
    with pytest.raises(OptionError, match="tool_choice"):
        chat.generate("the", tools=[OPENAI], tool_choice="other")
    with pytest.raises(OptionError, match="uniqueItems"):
        chat.generate("the", tools=[{"name": "f", "parameters": {"properties": {"x": {"uniqueItems": True}}}}])


def test_run_calls_functions_until_there_are_words(chat: g3.Engine) -> None:
    seen: list[Any] = []
    generate = chat.generate

    def watched(messages: Any, **options: Any) -> Any:
        seen.append(messages)
        return generate(messages, **options)

    chat.generate = watched  # type: ignore[method-assign]
    try:
        for allowed in (True, False):
            asked: list[Any] = []
            reply = chat.run(
                "the",
                tools=[stop_it],
                asks=lambda *given, allowed=allowed, asked=asked: asked.append(given) or allowed,
                limit=2,
                tool_choice="required",
                parallel_tool_calls=False,
                seed=3,
                **(WILD | {"max_tokens": 60}),
            )
            assert asked == [("stop_it", {})] and reply.usage["completion_tokens"]
            question, call, found = seen[-1]
            assert question == {"role": "user", "content": "the"} and call["tool_calls"][0]["name"] == "stop_it"
            assert found["role"] == "tool" and found["tool_call_id"] == call["tool_calls"][0]["id"]
            assert ("ValueError: no power" if allowed else "did not allow") in found["content"]
    finally:
        del chat.generate  # type: ignore[method-assign]
    assert len(seen) == 4
    with pytest.raises(OptionError, match="description"):
        chat.run("the", tools=[OPENAI])


def test_chat_asks_before_it_runs_a_function(chat_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tools.py"
    file.write_text("def touch() -> str:\n    '''Touches.'''\n    open('touched', 'w')\n    return 'done'\n")
    code = (
        "import sys\nfrom mlx_gemma3.runtime import options\nbuild = options.Options.build.__func__\n"
        "def first(cls, values):\n    values = dict(values)\n"
        "    if values.get('tools') and not first.done:\n"
        "        values |= {'tool_choice': 'required', 'parallel_tool_calls': False}\n        first.done = True\n"
        "    return build(cls, values)\nfirst.done = False\noptions.Options.build = classmethod(first)\n"
        "from mlx_gemma3.cli import main\nmain()"
    )
    command = [sys.executable, "-c", code, "chat", "-m", str(chat_folder), "--tools", str(file), "--max-tokens", "60"]
    for answer in ("n", "y"):
        done = subprocess.run(
            command, input=f"the\n{answer}\n", capture_output=True, text=True, timeout=200, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert "touch()" in done.stderr and (tmp_path / "touched").exists() is (answer == "y")
        assert ("did not allow" if answer == "n" else "done") in done.stderr


def test_a_worker_has_forms_and_tools_too(chat_folder: Path) -> None:
    from pydantic import BaseModel

    from mlx_gemma3.worker.client import WorkerEngine

    class Sky(BaseModel):
        colour: Literal["grey", "blue"]

    with WorkerEngine(chat_folder) as worker:
        reply = worker.generate("the", schema=Sky, **WILD)
        assert isinstance(reply.parsed, Sky) and json.loads(reply.text) == {"colour": reply.parsed.colour}
        one = {"tools": [stop_it], "tool_choice": "required", "parallel_tool_calls": False}
        called = worker.generate("the", **one, **WILD)
        assert [call["name"] for call in called.tool_calls] == ["stop_it"] and called.finish_reason == "tool_calls"

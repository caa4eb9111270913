"""Forms and tools through the official clients, against a real server on the demo model.

The demo was trained to answer in a few words: what it writes in a form has sense by chance only, but it has the form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import httpx
import ollama
import openai
import pytest
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr
from serving import Server

HI: list[Any] = [{"role": "user", "content": "What shape is it?"}]
GREEDY: dict[str, Any] = {"temperature": 0}


class Shape(BaseModel):
    shape: Literal["circle", "square"]
    count: Literal[1, 2, 3]


class Look(BaseModel):
    """Looks at a thing."""

    thing: Literal["sky", "sea"]


PARAMETERS = {"type": "object", "properties": {"thing": {"enum": ["sky", "sea"]}}, "required": ["thing"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "look", "description": "Looks at a thing.", "parameters": PARAMETERS}}
]


@pytest.fixture(scope="module")
def oai(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_response_format(oai: openai.OpenAI) -> None:
    parsed = oai.chat.completions.parse(model="demo", messages=HI, response_format=Shape, temperature=0)
    assert isinstance(parsed.choices[0].message.parsed, Shape) and parsed.choices[0].finish_reason == "stop"
    two = {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 1}
    loose: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": two}}
    assert isinstance(json.loads(_text(oai, loose)), list)
    cut = oai.chat.completions.create(
        model="demo", messages=HI, response_format={"type": "json_object"}, max_tokens=2, temperature=0
    )
    assert cut.choices[0].message.content == "{" or cut.choices[0].finish_reason == "stop"


def _text(oai: openai.OpenAI, form: Any) -> str:
    reply = oai.chat.completions.create(model="demo", messages=HI, response_format=form, max_tokens=60, **GREEDY)
    return reply.choices[0].message.content or ""


def test_openai_tools(oai: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": HI, "tools": TOOLS, "tool_choice": "required", **GREEDY}
    message = oai.chat.completions.create(**asked, parallel_tool_calls=False).choices[0].message
    assert message.content is None and message.tool_calls is not None and len(message.tool_calls) == 1
    call: Any = message.tool_calls[0]
    assert call.function.name == "look" and json.loads(call.function.arguments)["thing"] in ("sky", "sea")
    chunks = list(oai.chat.completions.create(**asked, parallel_tool_calls=False, stream=True))
    deltas = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].function.name == "look" and deltas[0].id and not any(one.id for one in deltas[1:])
    assert "".join(one.function.arguments or "" for one in deltas) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    said = [*HI, message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "blue"}]
    after = oai.chat.completions.create(model="demo", messages=said, tools=TOOLS, max_tokens=30, **GREEDY).choices[0]
    assert after.message.content or after.message.tool_calls
    named: Any = {"type": "function", "function": {"name": "look"}}
    again = oai.chat.completions.create(**(asked | {"tool_choice": named}), parallel_tool_calls=False)
    assert again.choices[0].message.tool_calls


def test_openai_responses(oai: openai.OpenAI) -> None:
    assert oai.responses.parse(model="demo", input="Which?", text_format=Shape, temperature=0).output_parsed
    tools: Any = [{"type": "function", "name": "look", "parameters": PARAMETERS, "strict": True}]
    asked: dict[str, Any] = {"model": "demo", "input": "Look", "tools": tools, "tool_choice": "required"}
    asked |= {"parallel_tool_calls": False, "temperature": 0}
    first = oai.responses.create(**asked)
    (call,) = first.output
    assert call.type == "function_call" and call.name == "look" and json.loads(call.arguments)
    with oai.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds and final.output[0].type == "function_call"
    found: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "blue"}]
    after = oai.responses.create(
        model="demo", input=found, previous_response_id=first.id, max_output_tokens=20, temperature=0
    )
    assert after.usage is not None and after.usage.input_tokens > 20
    whole: Any = [{"role": "user", "content": "Look"}, call.model_dump(exclude_none=True), *found]
    alone = oai.responses.create(model="demo", input=whole, max_output_tokens=20, temperature=0)
    assert alone.output_text == after.output_text


def test_anthropic(server: Server) -> None:
    tools: Any = [{"name": "look", "description": "Looks.", "input_schema": PARAMETERS}]
    one: Any = {"type": "any", "disable_parallel_tool_use": True}
    with anthropic.Anthropic(base_url=server.address, api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"model": "demo", "max_tokens": 80, "messages": HI, "tools": tools, "tool_choice": one}
        reply = client.messages.create(**asked, extra_body=GREEDY)
        (use,) = reply.content
        assert reply.stop_reason == "tool_use" and use.type == "tool_use" and use.input["thing"] in ("sky", "sea")
        with client.messages.stream(**asked, extra_body=GREEDY) as stream:
            final = stream.get_final_message()
        assert final.content[0].type == "tool_use" and final.content[0].input == use.input
        result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "blue"}]}
        said: Any = [*HI, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
        after = client.messages.create(model="demo", max_tokens=20, messages=said, tools=tools, extra_body=GREEDY)
        assert after.stop_reason in ("end_turn", "max_tokens", "tool_use")
        form = {"format": {"type": "json_schema", "schema": Shape.model_json_schema()}}
        made = client.messages.create(
            model="demo", max_tokens=80, messages=HI, extra_body=GREEDY | {"output_config": form}
        )
        assert made.content[0].type == "text" and Shape.model_validate_json(made.content[0].text)


def test_ollama(server: Server, request: pytest.FixtureRequest) -> None:
    client = ollama.Client(host=server.address)
    request.addfinalizer(client._client.close)
    assert "tools" in (client.show("demo").capabilities or [])
    made = client.chat("demo", HI, format=Shape.model_json_schema(), options=GREEDY)
    assert Shape.model_validate_json(made.message.content or "")
    tried = client.chat("demo", HI, format="json", options={**GREEDY, "num_predict": 3})
    assert (tried.message.content or "").startswith("{")
    pieces = list(client.chat("demo", HI, tools=TOOLS, stream=True, options={**GREEDY, "num_predict": 80}))
    calls = [call for piece in pieces for call in piece.message.tool_calls or []]
    assert all(call.function.name == "look" and call.function.arguments["thing"] for call in calls)
    assert calls or any(piece.message.content for piece in pieces)
    history = [
        *HI,
        {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {"thing": "sky"}}}]},
    ]
    history.append({"role": "tool", "tool_name": "look", "content": "blue"})
    assert client.chat("demo", history, tools=TOOLS, options={**GREEDY, "num_predict": 5}).eval_count


def test_langchain(server: Server) -> None:
    with httpx.Client() as connections:
        model = ChatOpenAI(
            base_url=f"{server.address}/v1", api_key=SecretStr("none"), model="demo", temperature=0,
            http_client=connections,
        )  # fmt: skip
        assert isinstance(model.with_structured_output(Shape).invoke("Which?"), Shape)
        bound = model.bind_tools([Look], tool_choice="required", parallel_tool_calls=False)
        reply = bound.invoke("Look")
        assert isinstance(reply, AIMessage) and reply.tool_calls[0]["args"]["thing"] in ("sky", "sea")
        assert isinstance(model.with_structured_output(Look, method="function_calling").invoke("Look"), Look)

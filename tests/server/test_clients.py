"""The official clients of each protocol, against a real server on the demo model."""

from __future__ import annotations

import base64
from typing import Any

import anthropic
import httpx
import numpy as np
import ollama
import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr
from serving import PICTURE, QUESTION, Server

DATA = base64.b64encode(PICTURE.read_bytes()).decode()
URL = f"data:image/png;base64,{DATA}"
HI = "hello"
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def oai(server: Server) -> Any:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def about_the_picture() -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": URL, "detail": "auto"}}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": parts}]


def test_openai_chat(oai: openai.OpenAI) -> None:
    assert [model.id for model in oai.models.list().data] == ["demo", "gpt-4o-mini", "claude-sonnet"]
    assert oai.models.retrieve("demo").model_dump()["capabilities"] == {"pictures": True, "chat": True}
    reply = oai.chat.completions.create(model="gpt-4o-mini", messages=about_the_picture(), temperature=0)
    assert reply.choices[0].message.content == "3" and reply.choices[0].finish_reason == "stop"
    assert (
        reply.usage is not None and reply.usage.total_tokens == reply.usage.prompt_tokens + 2 and reply.model == "demo"
    )
    again = oai.chat.completions.create(model="demo", messages=about_the_picture(), temperature=0, n=3, seed=4)
    assert [one.message.content for one in again.choices] == ["3"] * 3 and [one.index for one in again.choices] == [
        0,
        1,
        2,
    ]
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens
    likely = oai.chat.completions.create(
        model="demo", messages=about_the_picture(), temperature=0, logprobs=True, top_logprobs=2
    )
    found = likely.choices[0].logprobs
    assert found is not None and found.content is not None and [one.token for one in found.content] == ["3"]
    assert found.content[0].logprob <= 0 and len(found.content[0].top_logprobs) == 2


def test_openai_chat_streamed(oai: openai.OpenAI) -> None:
    chunks = list(
        oai.chat.completions.create(
            model="demo", messages=about_the_picture(), stream=True, stream_options={"include_usage": True}, n=2
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    first = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.role == "assistant"]
    assert {chunk.choices[0].index for chunk in first} == {0, 1} and chunks[:2] == first
    for index in (0, 1):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert "".join(one.delta.content or "" for one in mine) == "3" and mine[-1].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4
    assert all(chunk.usage is None for chunk in chunks[:-1])
    plain = list(oai.chat.completions.create(model="demo", messages=[{"role": "user", "content": HI}], stream=True))
    assert all(len(chunk.choices) == 1 for chunk in plain)


def test_openai_settings(oai: openai.OpenAI) -> None:
    said: list[Any] = [{"role": "user", "content": HI}]
    short = oai.chat.completions.create(model="demo", messages=said, max_completion_tokens=2, temperature=0)
    assert short.choices[0].finish_reason == "length" and short.usage is not None and short.usage.completion_tokens == 2
    whole = oai.chat.completions.create(model="demo", messages=said, temperature=0).choices[0].message.content or ""
    stopped = oai.chat.completions.create(model="demo", messages=said, temperature=0, stop=[" know"])
    assert " know" in whole and stopped.choices[0].message.content == whole.partition(" know")[0]
    first = oai.chat.completions.create(model="demo", messages=said, temperature=0, logprobs=True).choices[0].logprobs
    assert first is not None and first.content is not None
    tokens = httpx.post(
        f"{oai.base_url}completions", json={"prompt": HI, "max_tokens": 1, "temperature": 0, "logit_bias": {"9": 100}}
    ).json()
    assert tokens["choices"][0]["finish_reason"] == "length"
    continued = oai.chat.completions.create(
        model="demo", messages=[*said, {"role": "assistant", "content": "I only"}], temperature=0
    )
    assert "I only" + (continued.choices[0].message.content or "") == whole


def test_openai_errors(oai: openai.OpenAI) -> None:
    said: list[Any] = [{"role": "user", "content": HI}]
    with pytest.raises(openai.NotFoundError, match="demo, gpt-4o-mini, claude-sonnet") as missing:
        oai.chat.completions.create(model="gpt-5", messages=said)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="tokens") as long:
        oai.chat.completions.create(model="demo", messages=[{"role": "user", "content": HI * 9000}])
    assert long.value.code == "context_length_exceeded"
    for wrong in (
        {"temperature": -1}, {"messages": []}, {"messages": "hi"}, {"top_logprobs": 50}, {"logit_bias": {"a": 1}},
        {"extra_body": {"typical_p": 0.3}}, {"response_format": {"type": "xml"}}, {"n": 0},
        {"tools": [{"type": "function", "function": {"name": "a b", "parameters": {}}}]}, {"presence_penalty": 9},
        {"messages": [{"role": "critic", "content": "x"}]}, {"stop": 3}, {"tool_choice": "required"},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}},
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as refused:
            oai.chat.completions.create(**{"model": "demo", "messages": said, **wrong})
        assert "\n" not in refused.value.message and refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="picture"):
        broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
        oai.chat.completions.create(model="demo", messages=[{"role": "user", "content": [broken]}])
    with pytest.raises(openai.BadRequestError, match="embedding model"):
        oai.embeddings.create(model="demo", input="a")


def test_openai_completions(oai: openai.OpenAI) -> None:
    reply = oai.completions.create(model="demo", prompt=["one two", "three"], max_tokens=3, n=2, temperature=0)
    assert [one.index for one in reply.choices] == [0, 1, 2, 3] and reply.choices[0].text == reply.choices[1].text
    assert reply.usage is not None and reply.usage.completion_tokens == 12
    echoed = oai.completions.create(
        model="demo", prompt="one two three", max_tokens=0, echo=True, logprobs=1, temperature=0
    ).choices[0]
    assert echoed.text == "one two three" and echoed.logprobs is not None and echoed.logprobs.token_logprobs is not None
    assert echoed.logprobs.tokens is not None and "".join(echoed.logprobs.tokens[1:]) == "one two three"
    assert echoed.logprobs.token_logprobs[0] is None and all(one < 0 for one in echoed.logprobs.token_logprobs[1:])
    assert echoed.logprobs.text_offset == [0, *np.cumsum([len(one) for one in echoed.logprobs.tokens])[:-1].tolist()]
    tokens = oai.completions.create(model="demo", prompt=[2, 105, 106], max_tokens=2, echo=True, logprobs=0)
    assert tokens.usage is not None and tokens.usage.prompt_tokens == 3 and tokens.choices[0].logprobs is not None
    assert len(tokens.choices[0].logprobs.token_logprobs or []) == 5
    pieces = list(oai.completions.create(model="demo", prompt="one", max_tokens=4, stream=True, temperature=0))
    whole = oai.completions.create(model="demo", prompt="one", max_tokens=4, temperature=0)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        oai.completions.create(model="demo", prompt=[1 << 30])


def test_openai_responses(oai: openai.OpenAI) -> None:
    item = {"type": "input_image", "image_url": URL, "detail": "auto"}
    asked: Any = [{"role": "user", "content": [item, {"type": "input_text", "text": QUESTION}]}]
    first = oai.responses.create(model="demo", input=asked, temperature=0, instructions="Be brief.")
    assert first.output_text == "3" and first.status == "completed" and first.usage is not None
    second = oai.responses.create(
        model="demo", input=QUESTION, previous_response_id=first.id, temperature=0, instructions="Be brief."
    )
    assert second.usage is not None and second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens
    assert oai.responses.retrieve(second.id).output_text == second.output_text
    oai.responses.delete(second.id)
    with pytest.raises(openai.BadRequestError, match="kept"):
        oai.responses.create(model="demo", input=HI, previous_response_id=second.id)
    full = oai.responses.create(model="demo", input=HI, max_output_tokens=16)
    assert full.status == "completed"
    with oai.responses.stream(model="demo", input=HI, temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"
    ]  # fmt: skip
    assert kinds[-1] == "response.completed" and final.output_text.startswith("I only know")
    with pytest.raises(openai.BadRequestError, match="tools"):
        oai.responses.create(model="demo", input=HI, tools=[{"type": "web_search"}])


def test_anthropic(server: Server) -> None:
    with anthropic.Anthropic(base_url=server.address, api_key="none", max_retries=0) as client:
        source = {"type": "base64", "media_type": "image/png", "data": DATA}
        content: Any = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
        said: Any = [{"role": "user", "content": content}]
        reply = client.messages.create(model="claude-sonnet", max_tokens=20, messages=said, extra_body=GREEDY)
        assert reply.content[0].type == "text" and reply.content[0].text == "3" and reply.stop_reason == "end_turn"
        counted = client.messages.count_tokens(model="demo", messages=said)
        usage = reply.usage
        assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
        system: Any = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
        with client.messages.stream(
            model="demo", max_tokens=30, messages=[{"role": "user", "content": HI}], system=system, extra_body=GREEDY
        ) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text.startswith("I only know") and final.stop_reason == "end_turn" and final.usage.output_tokens > 3
        stopped = client.messages.create(
            model="demo", max_tokens=30, messages=[{"role": "user", "content": HI}], stop_sequences=["zzz", " know"],
            extra_body=GREEDY,
        )  # fmt: skip
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " know")
        short = client.messages.create(model="demo", max_tokens=1, messages=[{"role": "user", "content": HI}])
        assert short.stop_reason == "max_tokens"
        with pytest.raises(anthropic.NotFoundError, match="demo"):
            client.messages.create(model="opus", max_tokens=5, messages=said)
        with pytest.raises(anthropic.BadRequestError, match="tools"):
            search: Any = {"type": "web_search_20250305", "name": "web_search"}
            client.messages.create(model="demo", max_tokens=5, messages=said, tools=[search])


def test_ollama(server: Server, request: pytest.FixtureRequest) -> None:
    client = ollama.Client(host=server.address)
    request.addfinalizer(client._client.close)
    assert [model.model for model in client.list().models] == ["demo"]
    assert "vision" in (client.show("demo").capabilities or [])
    message = {"role": "user", "content": QUESTION, "images": [DATA]}
    assert client.chat("demo:latest", [message], options={"temperature": 0, "num_ctx": 4096}).message.content == "3"
    pieces = list(client.chat("demo", [{"role": "user", "content": HI}], stream=True, options={"temperature": 0}))
    assert "".join(piece.message.content or "" for piece in pieces).startswith("I only know")
    assert pieces[-1].done and pieces[-1].eval_count and pieces[-1].done_reason == "stop"
    made = client.generate("demo", QUESTION, images=[DATA], options={"temperature": 0})
    assert made.response == "3"
    assert client.generate("demo").done_reason == "load"
    assert client.generate("demo", "one two", raw=True, options={"num_predict": 2}).eval_count == 2
    assert [one.model for one in client.ps().models] == ["demo"]
    with pytest.raises(ollama.ResponseError, match="demo") as missing:
        client.chat("llama3", [message])
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="contains"):
        client.chat("demo", [message], format={"contains": {"type": "string"}})
    with pytest.raises(ollama.ResponseError, match="embedding"):
        client.embed("demo", "a")


def test_langchain(server: Server) -> None:
    message = HumanMessage([{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": QUESTION}])
    with httpx.Client() as connections:
        model = ChatOpenAI(
            base_url=f"{server.address}/v1", api_key=SecretStr("none"), model="demo", temperature=0,
            http_client=connections,
        )  # fmt: skip
        assert model.invoke([message]).content == "3"
        assert "".join(str(piece.content) for piece in model.stream([message])) == "3"

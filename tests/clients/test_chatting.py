"""LiteLLM, llm and pydantic-ai talk with the demo model."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from serving import PICTURE, QUESTION, Server

pytestmark = pytest.mark.clients

URL = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()


def test_litellm(server: Server) -> None:
    import litellm

    parts = [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": QUESTION}]
    settings = {"api_base": f"{server.address}/v1", "api_key": "none", "messages": [{"role": "user", "content": parts}]}
    reply = litellm.completion("openai/demo", temperature=0, **settings)
    assert reply.choices[0].message.content == "3" and reply.usage.total_tokens > 30
    pieces = litellm.completion("openai/demo", temperature=0, stream=True, **settings)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "3"
    settings["api_base"] = server.address
    assert litellm.completion("anthropic/demo", max_tokens=5, **settings).choices[0].message.content == "3"
    assert litellm.completion("ollama_chat/demo", **settings).choices[0].message.content == "3"


def test_llm(server: Server, tmp_path: Path) -> None:
    models = f"- model_id: here\n  model_name: demo\n  api_base: {server.address}/v1\n  vision: true\n"
    (tmp_path / "extra-openai-models.yaml").write_text(models)
    settings = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    parts = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": URL}}]  # words first
    told = server.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]})[1]
    wanted = told["choices"][0]["message"]["content"]
    for more in (["--no-stream"], []):
        command = [sys.executable, "-m", "llm", "-m", "here", QUESTION, "-a", str(PICTURE), *more]
        done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=120, check=False)
        assert done.stdout.strip() == wanted, done.stderr


def test_pydantic_ai(server: Server) -> None:
    from pydantic_ai import Agent, BinaryContent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{server.address}/v1", api_key="none")
    agent = Agent(OpenAIChatModel("demo", provider=provider), model_settings={"temperature": 0})
    result = agent.run_sync([BinaryContent(PICTURE.read_bytes(), media_type="image/png"), QUESTION])
    assert result.output == "3" and result.usage.output_tokens == 2


def test_pydantic_ai_in_a_form(server: Server) -> None:
    from pydantic import BaseModel
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Shape(BaseModel):
        shape: Literal["circle", "square"]
        count: Literal[1, 2, 3]

    provider = OpenAIProvider(base_url=f"{server.address}/v1", api_key="none")
    settings: Any = {"temperature": 0, "parallel_tool_calls": False}
    kinds: list[Any] = [NativeOutput(Shape), Shape]  # as a schema of the answer, and as a tool's
    for kind in kinds:
        agent: Any = Agent(OpenAIChatModel("demo", provider=provider), output_type=kind, model_settings=settings)
        assert isinstance(agent.run_sync("Which?").output, Shape)

"""Vectors over HTTP: OpenAI's /v1/embeddings, Ollama's /api/embed and its older /api/embeddings.

Sources: https://platform.openai.com/docs/api-reference/embeddings,
https://github.com/ollama/ollama/blob/main/docs/api.md.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from time import perf_counter
from typing import Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from ..errors import RequestError
from ..runtime.embedding import Embedding
from .asking import Service
from .http import JSON, Body, body, until_gone
from .models import Model

_BEAT = 0.5  # seconds between two looks whether the client is still there
_MOST_TEXTS = 2048  # of one request, as OpenAI has it
_HARMLESS_OPENAI = frozenset({"user"})
_HARMLESS_OLLAMA = frozenset({"keep_alive", "options"})  # options say how an answer is written


class EmbeddingsRequest(Body):
    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    kind: str | None = None  # this project's own: the name of a prompt, as "query" or "document"


class EmbedRequest(Body):
    model: str | None = None
    input: str | list[str] = Field(default_factory=list)
    truncate: bool | None = None
    dimensions: int | None = Field(None, ge=0)  # 0: all, as Ollama has it
    kind: str | None = None


class OlderRequest(Body):
    model: str | None = None
    prompt: str = ""


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings"""
    asked = await body(request, EmbeddingsRequest, _HARMLESS_OPENAI)
    texts: Any = [asked.input] if isinstance(asked.input, str) or _is_tokens(asked.input) else asked.input
    model, found = await _embedded(request, asked.model, texts, asked.kind, asked.dimensions)
    packed = asked.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode() if packed else vector.tolist(),
        }
        for index, vector in enumerate(found.array())
    ]
    count = sum(found.tokens)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSON({"object": "list", "data": data, "model": model.name, "usage": usage})


async def embed(request: Request) -> Response:
    """POST /api/embed"""
    began = perf_counter()
    asked = await body(request, EmbedRequest, _HARMLESS_OLLAMA)
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    dimensions, whole = asked.dimensions or None, asked.truncate is False
    model, found = await _embedded(request, asked.model, texts, asked.kind, dimensions, truncate=not whole, empty=True)
    return JSON(
        {
            "model": model.name,
            "embeddings": found.array().tolist(),
            "total_duration": int(1e9 * (perf_counter() - began)),
            "load_duration": 0,
            "prompt_eval_count": sum(found.tokens),
        }
    )


async def older(request: Request) -> Response:
    """POST /api/embeddings"""
    asked = await body(request, OlderRequest, _HARMLESS_OLLAMA)
    _, found = await _embedded(request, asked.model, [asked.prompt] if asked.prompt else [], None, None, empty=True)
    return JSON({"embedding": found.array()[0].tolist() if found.total else []})


async def _embedded(
    request: Request,
    name: str | None,
    texts: list[Any],
    kind: str | None,
    dimensions: int | None,
    *,
    truncate: bool = True,
    empty: bool = False,
) -> tuple[Model, Embedding]:
    """The vectors, all of them computed. A client that goes away ends the work.

    Args:
        empty: no texts at all are no mistake: the model is only loaded.

    Raises:
        RequestError: no texts, or too many.
        Gemma3Error: no such model, or what `Engine.embed` refuses.
    """
    if not 1 - empty <= len(texts) <= _MOST_TEXTS:
        raise RequestError("input", got=f"{len(texts)} texts", want=f"1 to {_MOST_TEXTS}")
    service: Service = request.app.state.service
    if service.settings.log_prompts:
        sys.stderr.write(json.dumps({"texts": texts}) + "\n")
        sys.stderr.flush()
    model = service.models.find(name)

    async def work() -> Embedding:
        with service.models.using(model):
            engine = await service.models.engine(model)
            asked = await asyncio.to_thread(
                engine.embedding, texts, kind=kind, dimensions=dimensions, truncate=truncate
            )
            try:
                while not await asyncio.to_thread(asked.wait, _BEAT):
                    pass
            finally:
                asked.cancel()
            return asked

    return model, await until_gone(request, work())


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)

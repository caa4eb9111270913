"""Vectors over HTTP: the clients of OpenAI and Ollama, against a real server with an embedding model and the demo."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import ollama
import openai
import pytest
import tiny_embedding
from serving import Server, serving

import mlx_gemma3 as g3

TEXTS = ["the user is in", "", "a much longer text, so that the two are not as long as each other"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_embedding.write(tmp_path_factory.mktemp("served") / "tiny-embedder", "plain")


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Iterator[Server]:
    with serving("-m", str(folder), "-m", "demo", "--quiet") as found:
        yield found


@pytest.fixture(scope="module")
def vectors(folder: Path) -> dict[str, np.ndarray]:
    with g3.load(folder) as engine:
        return {
            "whole": np.array(engine.embed(TEXTS)),
            "query": np.array(engine.embed(TEXTS, kind="query")),
            "16": np.array(engine.embed(TEXTS, dimensions=16)),
            "ids": np.array(engine.embed([[2, 110, 111, 1], [2, 1]])),
        }


def near(found: object, want: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(found), want, rtol=0, atol=1e-6)


def test_openai(embedder: Server, vectors: dict[str, np.ndarray]) -> None:
    with openai.OpenAI(base_url=f"{embedder.address}/v1", api_key="none", max_retries=0) as client:
        found = client.embeddings.create(model="tiny-embedder", input=TEXTS)  # the client asks for base64
        assert [one.index for one in found.data] == [0, 1, 2] and found.model == "tiny-embedder"
        near([one.embedding for one in found.data], vectors["whole"])
        assert found.usage.prompt_tokens == found.usage.total_tokens > len(TEXTS)
        plain = client.embeddings.create(model="tiny-embedder", input=TEXTS, encoding_format="float", dimensions=16)
        near([one.embedding for one in plain.data], vectors["16"])
        kind = {"kind": "query"}
        asked = client.embeddings.create(model="tiny-embedder", input=TEXTS, extra_body=kind)
        near([one.embedding for one in asked.data], vectors["query"])
        ids = client.embeddings.create(model="tiny-embedder", input=[[2, 110, 111, 1], [2, 1]])
        near([one.embedding for one in ids.data], vectors["ids"])
        assert ids.usage.prompt_tokens == 6
        one = client.embeddings.create(model="tiny-embedder", input=[2, 110, 111, 1], user="me")
        near([one.data[0].embedding], vectors["ids"][:1])
        for wrong in ({"input": []}, {"input": "a", "dimensions": 65}, {"input": [[]]}, {"input": [[600]]}):
            with pytest.raises(openai.BadRequestError):
                client.embeddings.create(**{"model": "tiny-embedder", **wrong})  # type: ignore[arg-type]
        with pytest.raises(openai.BadRequestError, match="want query"):
            client.embeddings.create(model="tiny-embedder", input="a", extra_body={"kind": "nope"})
        with pytest.raises(openai.BadRequestError, match="embedding model"):
            client.embeddings.create(model="demo", input="a")
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="nothing", input="a")
        with pytest.raises(openai.BadRequestError, match="writes nothing"):
            client.chat.completions.create(model="tiny-embedder", messages=[{"role": "user", "content": "hi"}])
        assert client.models.retrieve("tiny-embedder").model_dump()["capabilities"]["embeddings"] is True


def test_base64_is_little_endian_float32(embedder: Server, vectors: dict[str, np.ndarray]) -> None:
    asked = {"model": "tiny-embedder", "input": TEXTS[0], "encoding_format": "base64"}
    status, found = embedder.ask("/v1/embeddings", asked)
    assert status == 200 and found["object"] == "list" and found["data"][0]["object"] == "embedding"
    near(np.frombuffer(base64.b64decode(found["data"][0]["embedding"]), "<f4"), vectors["whole"][0])


def test_ollama(embedder: Server, vectors: dict[str, np.ndarray], request: pytest.FixtureRequest) -> None:
    client = ollama.Client(host=embedder.address)
    request.addfinalizer(client._client.close)
    found = client.embed("tiny-embedder", TEXTS)
    near(found.embeddings, vectors["whole"])
    assert found.prompt_eval_count is not None and found.prompt_eval_count > 3 and found.model == "tiny-embedder"
    near(client.embed("tiny-embedder", TEXTS[0], dimensions=16).embeddings, vectors["16"][:1])
    near(client.embeddings("tiny-embedder", TEXTS[0]).embedding, vectors["whole"][0])
    assert client.embed("tiny-embedder", []).embeddings == []
    with pytest.raises(ollama.ResponseError, match="at most 60"):
        client.embed("tiny-embedder", "a " * 80, truncate=False)
    assert len(client.embed("tiny-embedder", "a " * 80).embeddings[0]) == 64
    assert embedder.ask("/api/show", {"model": "tiny-embedder"})[1]["capabilities"] == ["embedding"]


def test_the_document_names_the_paths(embedder: Server) -> None:
    paths = embedder.ask("/openapi.json")[1]["paths"]
    assert {"/v1/embeddings", "/api/embed", "/api/embeddings"} <= paths.keys()

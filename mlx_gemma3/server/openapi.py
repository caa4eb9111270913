"""The server's OpenAPI document, made of the same classes that read its requests."""

from __future__ import annotations

from typing import Any

from . import anthropic, embeddings, ollama, openai_chat, openai_completions, openai_responses
from .http import Body

_BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": openai_chat.ChatRequest,
    "/v1/completions": openai_completions.CompletionRequest,
    "/v1/responses": openai_responses.ResponseRequest,
    "/v1/embeddings": embeddings.EmbeddingsRequest,
    "/v1/messages": anthropic.MessagesRequest,
    "/v1/messages/count_tokens": anthropic.Counted,
    "/api/chat": ollama.ChatRequest,
    "/api/generate": ollama.GenerateRequest,
    "/api/show": ollama.Named,
    "/api/embed": embeddings.EmbedRequest,
    "/api/embeddings": embeddings.OlderRequest,
}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "user", "assistant"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
    },
    "required": ["role", "content"],
}
_READ = (
    "/v1/models", "/v1/models/{name}", "/v1/responses/{name}", "/api/version", "/api/tags", "/api/ps", "/health",
    "/metrics",
)  # fmt: skip
_STATUSES = {
    "200": "The answer.", "400": "Something is wrong with the request.", "401": "The key is missing or wrong.",
    "403": "Not from there.", "404": "No such model, response or path.", "413": "The body is too large.",
    "429": "Too many requests wait.", "500": "Something is wrong with the server.", "503": "Not now.",
}  # fmt: skip


def document(version: str) -> dict[str, Any]:
    """OpenAPI 3.1, as plain types.

    Args:
        version: of the package.
    """
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    responses = {status: {"description": text} for status, text in _STATUSES.items()}
    for path, kind in _BODIES.items():
        name = f"{path.split('/')[1]}_{kind.__name__}"
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        for inner, one in schema.pop("$defs", {}).items():
            schemas.setdefault(inner, {**one, "additionalProperties": False})
        schema["additionalProperties"] = False  # but for what each dialect passes over
        if "messages" in schema["properties"]:
            schema["properties"]["messages"] |= {"items": _MESSAGE}
        schemas[name] = schema
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
        paths[path] = {"post": {"requestBody": {"required": True, "content": content}, "responses": responses}}
    for path in _READ:
        named = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
        paths[path] = {"get": {"responses": responses, **({"parameters": named} if "{" in path else {})}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlx-gemma3", "version": version},
        "paths": paths,
        "components": {"schemas": schemas},
    }

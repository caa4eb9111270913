"""The server's paths, each with the dialect that answers it, and what becomes of errors."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Awaitable, Callable
from functools import cache
from importlib import metadata
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ..errors import Gemma3Error, RequestError, SourceNotFound
from . import anthropic, embeddings, ollama, openai, openai_chat, openai_completions, openai_responses
from .asking import Service, status_of
from .http import JSON, TooLarge
from .openapi import document
from .safety import Log, Safety

Handler = Callable[[Request], Awaitable[Response]]
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def create_app(service: Service) -> Starlette:
    """The ASGI application."""
    settings = service.settings

    def guarded(handler: Handler) -> Handler:
        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except ClientDisconnect:
                return Response(status_code=499)
            except Gemma3Error as error:
                return _refused(request.url.path, error)
            except Exception as error:
                sys.stderr.write(traceback.format_exc())
                unforeseen = Gemma3Error(f"{type(error).__name__} in the server", got=error)
                return _refused(request.url.path, unforeseen)

        return answer

    def route(path: str, handler: Handler, *methods: str) -> list[Route]:
        paths = [path] if path.startswith("/page") or path == "/" else [path, "/" + path]  # some clients ask for //…
        return [Route(one, guarded(handler), methods=list(methods)) for one in paths]

    routes = [
        *route("/", page, "GET"),
        *route("/page/{name}", page, "GET"),
        *route("/health", health, "GET"),
        *route("/metrics", metrics, "GET"),
        *route("/openapi.json", openapi, "GET"),
        *route("/v1/models", openai.models, "GET"),
        *route("/v1/models/{name:path}", openai.model, "GET"),
        *route("/v1/chat/completions", openai_chat.chat_completions, "POST"),
        *route("/v1/completions", openai_completions.completions, "POST"),
        *route("/v1/responses", openai_responses.responses, "POST"),
        *route("/v1/responses/{name}", openai_responses.response, "GET", "DELETE"),
        *route("/v1/embeddings", embeddings.embeddings, "POST"),
        *route("/v1/messages", anthropic.messages, "POST"),
        *route("/v1/messages/count_tokens", anthropic.count_tokens, "POST"),
        *route("/api/version", ollama.version, "GET"),
        *route("/api/tags", ollama.tags, "GET"),
        *route("/api/ps", ollama.ps, "GET"),
        *route("/api/show", ollama.show, "POST"),
        *route("/api/chat", ollama.chat, "POST"),
        *route("/api/generate", ollama.generate, "POST"),
        *route("/api/embed", embeddings.embed, "POST"),
        *route("/api/embeddings", embeddings.older, "POST"),
    ]
    layers = [
        Middleware(Log, settings=settings, metrics=service.metrics),
        Middleware(Safety, settings=settings, failed=_failed),
    ]
    if settings.origins:
        layers.insert(
            1,
            Middleware(CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["*"], allow_headers=["*"]),
        )
    app = Starlette(routes=routes, middleware=layers, exception_handlers={404: _missing, 405: _missing})
    app.state.service, app.state.kept = service, openai_responses.Kept()
    return app


def _failure(path: str) -> Callable[[Gemma3Error], dict[str, Any]]:
    path = path.removeprefix("/")
    if path.startswith(("/v1/messages", "v1/messages")):
        return anthropic.failure
    return ollama.failure if path.startswith(("api/", "/api/")) else openai.failure


def _refused(path: str, error: Gemma3Error) -> Response:
    status = 413 if isinstance(error, TooLarge) else status_of(error)
    headers = {"Retry-After": "5"} if status in (429, 503) else {}
    return JSON(_failure(path)(error), status, headers)


def _failed(path: str, status: int, message: str) -> dict[str, Any]:
    """The body of a refusal that no error of the tree stands for."""
    told = _failure(path)(RequestError(message))
    if isinstance(told["error"], dict):
        kind = "authentication_error" if status == 401 else "permission_error"
        told["error"]["type"] = kind
        if "code" in told["error"]:
            told["error"]["code"] = "invalid_api_key" if status == 401 else "forbidden"
    return told


async def _missing(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    what = f"{request.method} {request.url.path}"
    want = "a path of /openapi.json" if status == 404 else "another method"
    told = _failure(request.url.path)(SourceNotFound(what, got="nothing there", want=want))
    return JSON(told, status, dict(getattr(error, "headers", None) or {}))


async def health(request: Request) -> Response:
    """GET /health: 200 when the first model is loaded, 503 until then."""
    service: Service = request.app.state.service
    ready = service.models.first.about is not None
    return JSON({"status": "ok" if ready else "loading"}, 200 if ready else 503)


async def metrics(request: Request) -> Response:
    """GET /metrics, for Prometheus."""
    service: Service = request.app.state.service
    return PlainTextResponse(service.metrics.text(service.models), media_type="text/plain; version=0.0.4")


async def openapi(_: Request) -> Response:
    """GET /openapi.json"""
    return Response(_document(), media_type="application/json")


@cache
def _document() -> bytes:
    return json.dumps(document(metadata.version("mlx-gemma3"))).encode()


async def page(request: Request) -> Response:
    """GET / and what it is made of."""
    name = request.path_params.get("name", "index.html")
    content, kind = _file(name)
    if content is None:
        raise SourceNotFound(f"/page/{name[:50]}", got="nothing there", want="a file of the page")
    headers = {
        "Content-Security-Policy": PAGE_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(content, media_type=kind, headers=headers)


@cache
def _file(name: str) -> tuple[bytes | None, str]:
    folder = files(__package__).joinpath("page")
    kind = _KINDS.get(name.rpartition(".")[2], "")
    found = {one.name for one in folder.iterdir()} if folder.is_dir() else set()
    return (folder.joinpath(name).read_bytes(), kind) if name in found and kind else (None, "")

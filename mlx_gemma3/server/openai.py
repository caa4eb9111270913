"""What OpenAI's endpoints share: the list of models, the form of errors, and what is refused by name."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..errors import ContextError, Gemma3Error, RequestError, SourceNotFound
from ..runtime.loaded import About
from .asking import Service, status_of
from .http import JSON, TooLarge
from .models import Model

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def failure(error: Gemma3Error) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    status = 413 if isinstance(error, TooLarge) else status_of(error)
    code: str = error.code
    if isinstance(error, ContextError):
        code = "context_length_exceeded"
    if isinstance(error, SourceNotFound):
        code = "model_not_found"
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    param = error.what if isinstance(error, RequestError) and error.what.isidentifier() else None
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


async def models(request: Request) -> Response:
    """GET /v1/models"""
    service: Service = request.app.state.service
    listed = [_described(service, model) for model in service.models.listed]
    aliases = [{**_described(service, service.models.find(alias)), "id": alias} for alias in service.settings.aliases]
    return JSON({"object": "list", "data": listed + aliases})


async def model(request: Request) -> Response:
    """GET /v1/models/{name}"""
    service: Service = request.app.state.service
    return JSON(_described(service, service.models.find(request.path_params["name"])))


def _described(service: Service, model: Model) -> dict[str, Any]:
    about = model.about
    return {
        "id": model.name,
        "object": "model",
        "created": service.models.created,
        "owned_by": "google",
        "root": model.base.name,
        "parent": None if model.adapter is None else model.base.name,
        **({"max_model_len": about["max_context"]} if about else {}),
        **({"capabilities": _capabilities(about)} if about else {}),
        "loaded": model.engine is not None,
    }


def _capabilities(about: About) -> dict[str, bool]:
    embeds = {"embeddings": True} if "dimensions" in about else {}
    return {"pictures": about["vision"], "chat": about["instruct"], **embeds}

"""Ollama's /api: chat, generate, tags, show, ps, version; answers as lines of JSON.

Source: https://github.com/ollama/ollama/blob/main/docs/api.md.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from ..errors import Gemma3Error, RequestError
from ..runtime.events import DoneEvent, ToolCall
from .asking import Ask, Running, Service
from .forms import tool_options
from .http import JSON, Body, answered, body, line, until_gone
from .models import Model

VERSION = "0.12.0"  # of Ollama's API: clients ask whether it knows what they need
_HARMLESS = frozenset({"keep_alive", "truncate", "shift"})
# Options that say how to compute, not what.
_ELSEWHERE = frozenset(
    {
        "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "use_mlock", "low_vram", "numa",
        "num_keep", "vocab_only", "f16_kv", "logits_all", "penalize_newline", "repeat_last_n", "tfs_z", "typical_p",
        "mirostat", "mirostat_tau", "mirostat_eta",
    }
)  # fmt: skip
_OFF = {"tfs_z": 1, "typical_p": 1, "mirostat": 0}  # what these must be, for nothing here does what they ask


class Options(Body):
    num_predict: int | None = Field(None, ge=-2)
    temperature: float | None = Field(None, ge=0)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = Field(None, gt=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)

    def values(self) -> dict[str, Any]:
        self.check(_ELSEWHERE)
        extra = self.__pydantic_extra__ or {}
        for name, off in _OFF.items():
            if extra.get(name) not in (None, off):
                raise RequestError(f"options.{name}", got=extra[name], want=off)
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return {
            "max_tokens": self.num_predict if self.num_predict and self.num_predict > 0 else None,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p or None,
            "min_p": self.min_p,
            "seed": None if self.seed is None else self.seed % 2**64,
            "stop": [one for one in stops if one] or None,
            "repetition_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }


class Asked(Body):
    model: str | None = None
    think: bool | str | None = None  # false: what a model thinks is left out
    stream: bool | None = None
    format: Any = None
    options: Options | None = None

    def settings(self) -> dict[str, Any]:
        form: dict[str, Any] = {}
        if self.format not in (None, "", {}):
            if self.format != "json" and not isinstance(self.format, dict):
                raise RequestError("format", got=self.format, want="json, or a JSON schema")
            form = {"schema": {"type": "object"} if self.format == "json" else self.format}
        return (self.options or Options.model_validate({})).values() | form


class ChatRequest(Asked):
    messages: list[dict[str, Any]] = Field(default_factory=list)
    tools: list[Any] | None = None


class GenerateRequest(Asked):
    prompt: str = ""
    images: list[str] | None = None
    system: str | None = None
    raw: bool | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None


class Named(Body):
    model: str | None = None
    name: str | None = None


def failure(error: Gemma3Error) -> dict[str, Any]:
    """An error as Ollama's clients read it."""
    return {"error": str(error)}


async def chat(request: Request) -> Response:
    """POST /api/chat"""
    asked = await body(request, ChatRequest, _HARMLESS)
    if not asked.messages:
        return await _loaded(request, asked.model, {"message": {"role": "assistant", "content": ""}})
    return await _answer(request, asked, asked.messages, asked.settings() | tool_options(asked.tools), "message")


async def generate(request: Request) -> Response:
    """POST /api/generate"""
    asked = await body(request, GenerateRequest, _HARMLESS)
    for name in ("suffix", "template", "context"):
        if getattr(asked, name):
            raise RequestError(name, got="a value", want="none")
    if not asked.prompt and not asked.images:
        return await _loaded(request, asked.model, {"response": ""})
    settings = asked.settings()
    if asked.raw:
        if asked.system or asked.images:
            raise RequestError("raw", got="true beside a system text or pictures", want="a prompt alone")
        return await _answer(request, asked, asked.prompt, settings, "response", chat=False)
    said: dict[str, Any] = {"role": "user", "content": asked.prompt}
    if asked.images:
        said["images"] = asked.images
    system = [{"role": "system", "content": asked.system}] if asked.system else []
    return await _answer(request, asked, [*system, said], settings, "response")


async def _answer(
    request: Request, asked: Asked, prompt: Any, options: dict[str, Any], key: str, *, chat: bool = True
) -> Response:
    service: Service = request.app.state.service
    ask = Ask(model=asked.model, prompt=prompt, options=options, chat=chat)
    running = await until_gone(request, service.begin(ask))
    thinks = asked.think is not False
    pieces = _lines(running, key, thinks=thinks) if asked.stream is not False else None

    async def whole() -> dict[str, Any]:
        (done,) = await running.replies()
        said = _said(key, done["text"], done.get("tool_calls"), done.get("thinking", "") if thinks else "")
        return {**_head(running.model), **said, **_ending(done)}

    return await answered(request, running.close, whole, pieces, "application/x-ndjson")


async def _lines(running: Running, key: str, *, thinks: bool) -> AsyncIterator[bytes]:
    try:
        async for found in running.events():
            if found is not None and found[1]["kind"] == "text":
                yield line({**_head(running.model), **_said(key, found[1]["text"]), "done": False})
            elif found is not None and found[1]["kind"] == "thinking" and thinks:
                yield line({**_head(running.model), **_said(key, "", thinking=found[1]["text"]), "done": False})
        done = running.done[0]
        if calls := done.get("tool_calls"):
            yield line({**_head(running.model), **_said(key, "", calls), "done": False})
        yield line({**_head(running.model), **_said(key, ""), **_ending(done)})
    except Gemma3Error as error:
        yield line(failure(error))


async def _loaded(request: Request, name: str | None, nothing: dict[str, Any]) -> Response:
    """What Ollama answers when a model is only to be loaded."""
    service: Service = request.app.state.service
    model = service.models.find(name)
    await service.models.engine(model)
    return JSON({**_head(model), **nothing, "done": True, "done_reason": "load"})


def _head(model: Model) -> dict[str, Any]:
    return {"model": model.name, "created_at": _now()}


def _said(key: str, text: str, calls: Sequence[ToolCall] | None = None, thinking: str = "") -> dict[str, Any]:
    thought = {"thinking": thinking} if thinking else {}
    if key != "message":
        return {key: text, **thought}
    called = [{"function": {"name": one["name"], "arguments": one["arguments"]}} for one in calls or ()]
    return {key: {"role": "assistant", "content": text, **thought, **({"tool_calls": called} if called else {})}}


def _ending(done: DoneEvent) -> dict[str, Any]:
    usage = done["usage"]
    nanoseconds = {
        "total_duration": usage["prepare_seconds"] + usage["prompt_seconds"] + usage["answer_seconds"],
        "load_duration": 0.0,
        "prompt_eval_duration": usage["prompt_seconds"],
        "eval_duration": usage["answer_seconds"],
    }
    return {
        "done": True,
        "done_reason": "length" if done["finish_reason"] == "length" else "stop",
        **{name: int(1e9 * seconds) for name, seconds in nanoseconds.items()},
        "prompt_eval_count": usage["prompt_tokens"],
        "eval_count": usage["completion_tokens"],
    }


async def version(_: Request) -> Response:
    """GET /api/version"""
    return JSON({"version": VERSION})


async def tags(request: Request) -> Response:
    """GET /api/tags"""
    service: Service = request.app.state.service
    return JSON({"models": [_listed(model) for model in service.models.listed]})


async def ps(request: Request) -> Response:
    """GET /api/ps"""
    service: Service = request.app.state.service
    loaded = [model for model in service.models.listed if model.engine is not None]
    return JSON(
        {"models": [{**_listed(model), "size_vram": model.weights_bytes, "expires_at": _far} for model in loaded]}
    )


async def show(request: Request) -> Response:
    """POST /api/show"""
    service: Service = request.app.state.service
    asked = await body(request, Named, frozenset({"verbose"}))
    model = service.models.find(asked.model or asked.name)
    about = model.about
    vision = ["vision"] if about is not None and about["vision"] else []
    context = {"gemma3.context_length": about["max_context"]} if about is not None else {}
    return JSON(
        {
            "license": "https://ai.google.dev/gemma/terms",
            "modelfile": f"FROM {model.name}",
            "parameters": "",
            "template": "{{ .Prompt }}",
            "details": _listed(model)["details"],
            "model_info": {"general.architecture": "gemma3", **context},
            "capabilities": ["embedding"]
            if about is not None and "dimensions" in about
            else ["completion", "tools", *vision],
            "modified_at": _now(),
        }
    )


_far = "9999-12-31T23:59:59Z"


def _listed(model: Model) -> dict[str, Any]:
    details = {
        "parent_model": "", "format": "mlx", "family": "gemma3", "families": ["gemma3"], "parameter_size": "",
        "quantization_level": "",
    }  # fmt: skip
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": _now(),
        "size": model.weights_bytes,
        "digest": "",
        "details": details,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")

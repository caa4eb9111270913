"""A server for tests of the page: the page's files, and answers by the demo model or by a script.

`serving()` gives a `Server`; `server.script("What?", "It is ", "this.")` says what a prompt is answered with.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import mlx_gemma3
from mlx_gemma3.server.app import PAGE_POLICY

PAGE = Path(__file__).resolve().parents[2] / "mlx_gemma3" / "server" / "page"
CUT, END = object(), object()  # steps: the connection breaks; the server ends the stream too early

# A step of a scripted answer: text; ("thinking", text); ("reading" | "pictures", done, total); an event that is waited
# for; an exception, which is told in the stream; CUT, END.
Step = Any


class Server:
    """Answers in a thread of its own."""

    def __init__(self, engine: mlx_gemma3.Engine) -> None:
        self.engine = engine
        self.key: str | None = None
        self.pictures = True
        self.models = ["demo"]
        self.asked: list[dict[str, Any]] = []  # the bodies of requests, in order
        self.left = 0  # answers whose client went away
        self._scripts: dict[str, list[Step]] = {}
        self.address = ""

    def script(self, prompt: str, *steps: Step) -> None:
        """From now on answer this prompt with these steps."""
        self._scripts[prompt] = list(steps)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", lambda request: self._file("index.html")),
                Route("/page/{name}", lambda request: self._file(request.path_params["name"])),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._answer, methods=["POST"]),
            ]
        )

    def _file(self, name: str) -> Response:
        return FileResponse(PAGE / name, headers={"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-store"})

    def _refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "a key is wanted"}}, 401)

    async def _models(self, request: Request) -> Response:
        capabilities = {"pictures": self.pictures}
        models = [{"id": name, "max_model_len": 512, "capabilities": capabilities} for name in self.models]
        return self._refused(request) or JSONResponse({"data": models})

    async def _answer(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        asked = await request.json()
        self.asked.append(asked)
        content = asked["messages"][-1]["content"]
        words = content if isinstance(content, str) else content[-1].get("text", "")
        steps = self._scripts.get(words)
        if steps and steps[0] is None:
            return JSONResponse({"error": {"message": steps[1]}}, 503)
        lines = self._by_engine(asked) if steps is None else self._by_script(steps)
        return StreamingResponse(lines, media_type="text/event-stream")

    async def _by_script(self, steps: list[Step]) -> AsyncIterator[str]:
        try:
            for step in steps:
                if isinstance(step, str):
                    yield _chunk(choices=[{"delta": {"content": step}, "finish_reason": None}])
                elif isinstance(step, tuple) and step[0] == "thinking":
                    yield _chunk(choices=[{"delta": {"reasoning_content": step[1]}, "finish_reason": None}])
                elif isinstance(step, tuple):
                    yield ": {} {}/{}\n\n".format(*step)
                elif isinstance(step, threading.Event):
                    while not step.is_set():
                        await asyncio.sleep(0.01)
                elif isinstance(step, Exception):
                    yield _chunk(error={"message": str(step)})
                    return
                elif step is END:
                    return
                else:
                    raise ConnectionAbortedError
            yield _end("stop", 7, 12.5)
        except asyncio.CancelledError:
            self.left += 1
            raise

    async def _by_engine(self, asked: dict[str, Any]) -> AsyncIterator[str]:
        options = {"temperature": asked.get("temperature", 0), "max_tokens": asked.get("max_completion_tokens", 64)}
        async with self.engine.astream(asked["messages"], **options) as stream:
            while (event := await stream.next())["kind"] != "done":
                if event["kind"] == "text":
                    yield _chunk(choices=[{"delta": {"content": event["text"]}, "finish_reason": None}])
                elif event["kind"] == "error":
                    yield _chunk(error={"message": event["message"]})
                    return
        usage = event["usage"]
        rate = usage["completion_tokens"] / max(usage["answer_seconds"], 1e-6)
        yield _end(event["finish_reason"], usage["completion_tokens"], rate)


def _chunk(**fields: Any) -> str:
    return f"data: {json.dumps(fields)}\n\n"


def _end(finish: str, tokens: int, rate: float) -> str:
    timings = {"prompt_ms": 1.0, "predicted_per_second": rate}
    return (
        _chunk(choices=[{"delta": {}, "finish_reason": finish}])
        + _chunk(choices=[], usage={"completion_tokens": tokens}, timings=timings)
        + "data: [DONE]\n\n"
    )


@contextmanager
def serving() -> Iterator[Server]:
    """A running server on a free port of this machine."""
    with mlx_gemma3.load("demo") as engine, socket.socket() as listening:
        server = Server(engine)
        listening.bind(("127.0.0.1", 0))
        server.address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        http = uvicorn.Server(uvicorn.Config(server.app(), log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not http.started:
                time.sleep(0.01)
            yield server
        finally:
            http.should_exit = True
            thread.join()

"""Who may ask: the key, the name that a browser asked for, whose pages may ask; and a line for each request.

Plain ASGI: a layer of Starlette's own kind would hold streams up.
"""

from __future__ import annotations

import hmac
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .http import JSON
from .metrics import Metrics
from .settings import Settings

OPEN = ("/", "/health", "/favicon.ico")  # without a key, as is all under /page/
_LOCAL = ("localhost", "127.0.0.1", "::1")


class Safety:
    """Refuses before anything is read.

    On loopback the Host must be this machine's: else a page of another site, whose name was made to lead here, would
    be let in as this one's (DNS rebinding). A browser tells whose page asks: others than this server's own are refused
    unless they were named.
    """

    def __init__(self, app: ASGIApp, settings: Settings, failed: Callable[[str, int, str], Any]) -> None:
        """failed: (path, status, message) → the dialect's body of an error."""
        self._app, self._settings, self._failed = app, settings, failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if (refusal := self._refusal(scope)) is not None:
            status, message = refusal
            headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
            response = JSON(self._failed(scope["path"], status, message), status, headers)
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers, settings = Headers(scope=scope), self._settings
        host = _host(headers.get("host", ""))
        if settings.loopback and host not in (*_LOCAL, settings.host):
            return 403, "Host: this server answers to localhost alone; start it with --host to change that"
        origin = headers.get("origin")
        if origin is not None and "*" not in settings.origins and origin not in settings.origins:
            port = urlsplit(origin).port if _is_url(origin) else None
            own = _is_url(origin) and _host(urlsplit(origin).netloc) == host and _port(headers.get("host", "")) == port
            if not own:
                return 403, "Origin: pages of that site may not ask; --allow-origin names those that may"
        path = scope["path"]
        if settings.api_keys and not (path in OPEN or path.startswith("/page/")) and scope["method"] != "OPTIONS":
            scheme, _, key = headers.get("authorization", "").partition(" ")
            given = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            # Every key is compared, each in constant time.
            if not sum(hmac.compare_digest(given.encode(), known.encode()) for known in settings.api_keys):
                return 401, "API key: missing or wrong; send it as Authorization: Bearer KEY"
        return None


def _is_url(text: str) -> bool:
    try:
        return bool(urlsplit(text).netloc) and (urlsplit(text).port or 0) >= 0
    except ValueError:
        return False


def _host(netloc: str) -> str:
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""


def _port(netloc: str) -> int | None:
    try:
        return urlsplit(f"//{netloc}").port
    except ValueError:
        return None


class Log:
    """One line a request, on stderr: when, what, status, seconds. Nothing of a prompt."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, ended = time.perf_counter(), 0, False

        async def watched(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", None) or "other"
            self._metrics.requests.labels(path, str(status or 499)).inc()
            if not self._settings.quiet and path not in ("/health", "/metrics"):
                when = datetime.now().isoformat(sep=" ", timespec="seconds")
                told = str(status) if ended else f"{status or 499} cut off"
                seconds = time.perf_counter() - began
                shown = scope["path"][:100].encode("ascii", "backslashreplace").decode()
                printable = "".join(one if one.isprintable() else "?" for one in shown)
                sys.stderr.write(f"{when} {scope['method']} {printable} {told} {seconds:.2f}s\n")
                sys.stderr.flush()

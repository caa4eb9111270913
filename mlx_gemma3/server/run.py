"""From settings to a server that runs, and to its end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from ..checkpoint.memory import this_machine
from ..errors import Gemma3Error, OptionError
from ..runtime.machines import current
from .app import create_app
from .asking import Service
from .metrics import Metrics
from .models import Models
from .settings import Settings


def run(settings: Settings, tell: Callable[[str], None]) -> int:
    """Serve until a signal ends it. Returns the exit status.

    Args:
        tell: takes a line for the user.

    Raises:
        Gemma3Error: the address is taken, the first model cannot be loaded.
    """
    # Several machines hold one model at a time: every other one is dropped for it.
    models = Models(settings, this_machine().budget if current() is None else 0)
    first = models.first
    models.begin(first)  # beside all that follows
    try:
        return _Server(Service(settings, models, Metrics()), tell).serve_all(bound(settings))
    finally:
        models.close()


def bound(settings: Settings) -> socket.socket:
    """A socket that listens at the address. Raises OptionError."""
    host = settings.host.strip("[]")
    try:
        family = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((host, settings.port))
            made.listen(2048)
        except OSError:
            made.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        raise OptionError(
            "address", got=f"{settings.host}:{settings.port} ({error})", want="one that is free",
            do="--port 0 takes any",
        ) from None  # fmt: skip
    return made


class _Server(uvicorn.Server):
    """Ends what is being written within the grace after one signal, at once after a second."""

    def __init__(self, service: Service, tell: Callable[[str], None]) -> None:
        self._service, self._tell = service, tell
        self._failed: Gemma3Error | None = None
        self._lost = False
        settings = service.settings
        config = uvicorn.Config(
            create_app(service),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=max(1, int(settings.grace)) if settings.grace > 0 else 0,
            timeout_keep_alive=75,
            ws="none",
        )
        super().__init__(config)
        service.lost = self._gpu_lost

    def serve_all(self, listening: socket.socket) -> int:
        """Run on this socket to the end."""
        self._listening = listening
        asyncio.run(self._with_model())
        if self._failed is not None:
            raise self._failed
        return 1 if self._lost else 0

    async def _with_model(self) -> None:
        loading = asyncio.create_task(self._load_first())
        await self.serve(sockets=[self._listening])
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)

    async def _load_first(self) -> None:
        """Say when the first model is there; end when it cannot be."""
        models = self._service.models
        try:
            await models.engine(models.first)
        except Gemma3Error as error:
            self._failed = error
            self.should_exit = True
            return
        while not self.started:
            await asyncio.sleep(0.005)
        host, port = self._listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        self._tell(f"serving {', '.join(models.names)} at http://{shown}:{port}")

    def _gpu_lost(self) -> None:
        self._lost = self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self._service.models.stop()
            sys.stderr.flush()
            os._exit(130 if sig == signal.SIGINT else 143)
        self.should_exit = True

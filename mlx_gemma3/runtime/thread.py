"""The engine's thread: everything that MLX made lives and dies in it. Serves what waits in a queue, in order.

A process that was forked has none of the threads of its parent, neither the engine's nor MLX's own: nothing can be
answered there, nor another engine be loaded. So every call looks which process it is in, and takes no lock before.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import queue
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from ..checkpoint.source import resolve
from ..errors import ClosedError, Gemma3Error
from ..model.streams import lent
from .host import EngineOptions, Host, Request
from .stream import check_process

IDLE = 0.1  # seconds after loading in which nobody asked for anything

T = TypeVar("T")
_Call = tuple[Future[Any], Callable[[Host], Any]]


class EngineThread(threading.Thread):
    """One engine's thread. Holds no reference to the Engine, so that dropping that one ends the thread."""

    def __init__(self, source: str | Path, options: EngineOptions) -> None:
        super().__init__(name="mlx-gemma3", daemon=True)
        self._process = _first_process()
        check_process(self._process)
        self._source, self._options = source, options
        self._queue: queue.SimpleQueue[Request | _Call | None] = queue.SimpleQueue()
        self._loaded = threading.Event()  # or failed
        self._error: Exception | None = None  # of loading
        self._current: Request | None = None
        self._closing = False
        self._fetching = True  # not yet in MLX: a download may take its time, and nobody has to wait for it
        self._lock = threading.RLock()  # no request may slip in behind the end; collected objects may come in again
        _close_all_at_exit()
        self.start()

    def wait_until_loaded(self, timeout: float | None = None) -> bool:
        """False when it was not within `timeout` seconds. Raises what went wrong."""
        check_process(self._process)
        if not self._loaded.wait(timeout):
            return False
        if self._error is not None:
            raise self._error
        return True

    def submit(self, request: Request) -> None:
        """Queue an answer. Raises ClosedError. An engine that could not load answers with that error."""
        check_process(self._process)
        with self._lock:
            self._check_open()
            if self._error is None:
                self._queue.put(request)
                return
        request.fail(_known(self._error))

    def call(self, work: Callable[[Host], T]) -> T:
        """Run something in the thread, after what was queued before, and wait for its result."""
        check_process(self._process)
        future: Future[T] = Future()
        with self._lock:
            self._check_open()
            if self._error is not None:
                raise self._error
            self._queue.put((future, work))
        return future.result()

    def stop(self) -> None:
        """Cancel what is in work and let the thread end, soon. Waits for nothing: garbage collection may call it."""
        self._closing = True
        if os.getpid() != self._process:
            return
        if (current := self._current) is not None:
            current.cancel()
        self._queue.put(None)

    def close(self) -> None:
        """Stop, and wait until all that MLX made is freed. A download ends by itself, and nothing is loaded then."""
        if os.getpid() != self._process:
            return
        with self._lock:
            self.stop()
        while self.is_alive() and not self._fetching and threading.current_thread() is not self:
            self.join(0.05)  # not for good: what fetches now may have begun to wait for the network

    def run(self) -> None:
        with lent():
            self._run()

    def _run(self) -> None:
        try:
            resolved = resolve(self._source, text_only=self._options.text_only, quiet=self._options.quiet)
            self._fetching = False
            host = Host(resolved, self._options, lambda: self._closing)
        except Exception as error:  # raised again in the thread that asked for the engine
            known = _known(error)
            with self._lock:
                self._error = error
                self._queue.put(None)
            self._loaded.set()
            self._refuse_rest(known)
            return
        finally:
            self._fetching = False
        self._loaded.set()
        try:
            item = self._queue.get(timeout=IDLE)
        except queue.Empty:
            with contextlib.suppress(Exception):  # what fails here fails again for the request that needs it
                host.warm_up()
            item = self._queue.get()
        while item is not None:
            if isinstance(item, Request):
                self._serve(host, item)
            else:
                _finish(item, host)
            del item
            item = self._queue.get()
        del host
        mx.clear_cache()

    def _serve(self, host: Host, request: Request) -> None:
        self._current = request
        if self._closing:
            request.cancel()
        try:
            host.serve(request)
        except Exception as error:  # nobody foresaw some of them: one request fails, the engine lives on
            request.fail(_known(error))
        finally:
            self._current = None

    def _refuse_rest(self, error: Gemma3Error) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, Request):
                item.fail(error)
            else:
                item[0].set_exception(error)

    def _check_open(self) -> None:
        if self._closing:
            raise ClosedError("engine", got="a request after close()", want="an open engine")


def _finish(call: _Call, host: Host) -> None:
    future, work = call
    try:
        future.set_result(work(host))
    except BaseException as error:  # raised again in the thread that waits
        future.set_exception(error)


def _known(error: Exception) -> Gemma3Error:
    """An error that may be kept: of our tree, and without the frames it came through, which hold arrays."""
    if isinstance(error, Gemma3Error):
        error.__traceback__ = error.__cause__ = error.__context__ = None
        return error
    unforeseen = Gemma3Error(f"{type(error).__name__} in the engine", got=error)
    unforeseen.add_note("".join(traceback.format_exception(error)))
    return unforeseen


@functools.cache
def _first_process() -> int:
    """The process in which the first engine was made: its forks remember it."""
    return os.getpid()


@functools.cache
def _close_all_at_exit() -> None:
    """From the first engine on: a thread inside MLX while the process takes MLX down would crash it."""
    atexit.register(_close_all)


def _close_all() -> None:
    running = [thread for thread in threading.enumerate() if isinstance(thread, EngineThread)]
    for thread in running:
        thread.stop()
    for thread in running:
        thread.close()

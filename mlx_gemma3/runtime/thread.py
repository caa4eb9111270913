"""The engine's thread: everything that MLX made lives and dies in it. Runs the scheduler, turn after turn.

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
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from ..checkpoint.source import resolve
from ..errors import BusyError, ClosedError, DeviceLost, Gemma3Error
from ..model.device import leave_thread, unwire, wire
from ..model.runner import Runner
from ..model.streams import lent
from .conversation import Conversation
from .embedding import Embedding
from .job import Job
from .loaded import EngineOptions, Loaded
from .loading import load, warm_up, wired_bytes
from .request import Request
from .scheduler import Call, Scheduler, known
from .stream import check_process

MOST_DEVICE_ERRORS = 2
IDLE = 0.1  # seconds after loading in which nobody asked for anything
_BEAT = 0.02  # seconds between two looks whether one was cancelled whose prompt is being prepared

T = TypeVar("T")
_Item = Request | Call | Embedding | Callable[[], None] | None


class EngineThread(threading.Thread):
    """One engine's thread. Holds no reference to the Engine, so that dropping that one ends the thread."""

    def __init__(self, source: str | Path, options: EngineOptions) -> None:
        super().__init__(name="mlx-gemma3", daemon=True)
        self._process = _first_process()
        check_process(self._process)
        self._source, self._options = source, options
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._loaded = threading.Event()  # or failed
        self._error: Exception | None = None  # of loading
        self._known: Loaded | None = None
        self._scheduler: Scheduler | None = None
        self._closing = self._abandoned = False
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

    @property
    def loaded(self) -> Loaded:
        """What was loaded, as soon as it is; never waits for an answer. Raises what went wrong."""
        self.wait_until_loaded()
        assert self._known is not None
        return self._known

    def submit(self, *requests: Request) -> None:
        """Put answers in line, together. An engine that could not load answers with that error.

        Raises:
            ClosedError: the engine was closed.
            BusyError: too many wait already.
        """
        check_process(self._process)
        with self._lock:
            self._check_open()
            if self._error is None:
                self._check_room(len(requests))
                for request in requests:
                    self._queue.put(request)
                return
        for request in requests:
            request.fail(known(self._error))

    def embed(self, request: Embedding) -> None:
        """Put texts in line.

        Raises:
            ClosedError, BusyError: as `submit`.
            Gemma3Error: the engine could not load, or its GPU takes no more work.
        """
        check_process(self._process)
        with self._lock:
            self._check_open()
            if self._error is not None:
                raise self._error
            self._check_room(1)
            self._queue.put(request)

    @property
    def waiting(self) -> int:
        """How many are in line now. Any thread may ask."""
        return self._queue.qsize() + (self._scheduler.waiting if self._scheduler is not None else 0)

    def call(self, work: Callable[[Scheduler], T], conversation: Conversation | None = None) -> T:
        """Run something in the thread, between two steps, and wait for its result.

        Args:
            conversation: it runs after all that was asked of this one before.
        """
        check_process(self._process)
        future: Future[T] = Future()
        with self._lock:
            self._check_open()
            if self._error is not None:
                raise self._error
            self._queue.put(Call(work, future, conversation))
        return future.result()

    def stop(self) -> None:
        """Cancel what is in work and let the thread end, soon. Waits for nothing: garbage collection may call it."""
        self._closing = True
        if os.getpid() != self._process:
            return
        self._queue.put(None)

    def close(self) -> None:
        """Stop, and wait until all that MLX made is freed. A download ends by itself, and nothing is loaded then."""
        if os.getpid() != self._process:
            return
        with self._lock:
            self.stop()
        while self.is_alive() and not (self._fetching or self._abandoned) and threading.current_thread() is not self:
            self.join(0.05)  # not for good: what fetches now may have begun to wait for the network

    def run(self) -> None:
        with lent():
            self._run()

    def _run(self) -> None:
        try:
            resolved = resolve(self._source, text_only=self._options.text_only, quiet=self._options.quiet)
            self._fetching = False
            loaded, runner, budget, draft = load(resolved, self._options, lambda: self._closing, self._abandon)
            scheduler = Scheduler(loaded, runner, budget, self._queue.put, draft)
            wire(id(self), wired_bytes(loaded, runner))
        except Exception as error:  # raised again in the thread that asked for the engine
            failed = known(error)
            with self._lock:
                self._error = error
                self._queue.put(None)
            self._loaded.set()
            self._refuse_rest(failed)
            return
        finally:
            self._fetching = False
        self._known, self._scheduler = loaded, scheduler
        self._loaded.set()
        try:
            self._serve(scheduler, self._first(loaded, runner))
        finally:
            unwire(id(self))
        self._scheduler = None
        del scheduler, runner, draft
        leave_thread()
        if self._error is not None:
            self._refuse_rest(known(self._error))

    def _first(self, loaded: Loaded, runner: Runner) -> _Item:
        """What is asked for first; a GPU warms up when that is not at once."""
        try:
            return self._queue.get(timeout=IDLE)
        except queue.Empty:
            with contextlib.suppress(Exception):  # what fails here fails again for the request that needs it
                warm_up(loaded, runner)
            return _nothing

    def _serve(self, scheduler: Scheduler, item: _Item) -> None:
        """Turn after turn, until the end is asked for and everybody was told."""
        ending = False
        while True:
            while True:  # what came meanwhile
                if item is None:
                    ending = True
                elif isinstance(item, Request):
                    scheduler.add(Job(item))
                elif isinstance(item, Call | Embedding):
                    scheduler.add(item)
                else:
                    item()
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
            if self._closing:
                scheduler.cancel_all()
            try:
                scheduler.turn()
            except Exception as error:  # nobody foresaw it: those that wait are told, the engine lives on
                scheduler.fail_all(error)
            if scheduler.lost is not None or scheduler.device_errors >= MOST_DEVICE_ERRORS:
                self._give_up(scheduler)
                return
            item = _nothing
            if scheduler.busy:
                continue
            if ending and not scheduler.waiting:
                scheduler.close()
                return
            try:
                item = self._queue.get(timeout=_BEAT if scheduler.waiting else scheduler.runner.rest)
            except queue.Empty:
                scheduler.beat()

    def _give_up(self, scheduler: Scheduler) -> None:
        """The GPU takes no more work: end all requests, those that come later too."""
        error = scheduler.lost or DeviceLost(
            "GPU",
            got=f"{MOST_DEVICE_ERRORS} errors in a row",
            want="one that works",
            do="load the model again, in a new process",
        )
        scheduler.fail_all(error)
        scheduler.pool.timelines.clear()
        scheduler.close()
        with self._lock:
            self._error = error
            self._queue.put(None)

    def _abandon(self, error: Gemma3Error) -> None:
        """This thread hangs in MLX and will not come back: tell those that wait. Called in another."""
        with self._lock:
            self._error, self._abandoned = error, True
        if self._scheduler is not None:
            self._scheduler.fail_all(error)
        self._loaded.set()
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._queue.get_nowait()
                if isinstance(item, Request | Embedding):
                    item.fail(error)
                elif isinstance(item, Call):
                    item.future.set_exception(error)

    def _refuse_rest(self, error: Gemma3Error) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, Request | Embedding):
                item.fail(error)
            elif isinstance(item, Call):
                item.future.set_exception(error)

    def _check_room(self, count: int) -> None:
        waiting, most = self.waiting, self._options.queue + self._options.parallel
        if waiting + count > most:
            raise BusyError(
                "queue", got=f"{waiting} requests that wait", want=f"at most {most}", do="wait for one to end"
            )

    def _check_open(self) -> None:
        if self._closing:
            raise ClosedError("engine", got="a request after close()", want="an open engine")


def _nothing() -> None:
    """Nothing came."""


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

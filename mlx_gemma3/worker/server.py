"""The worker's side: reads requests, begins them in order in one thread, and writes what comes of them.

Several answers are on their way at once, each followed by a thread of its own. The thread that reads lines answers
cancel, status and shutdown itself, so they never wait behind an answer.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import BusyError, ClosedError, DeviceLost, Gemma3Error, OptionError, RequestError
from . import protocol

if TYPE_CHECKING:
    from ..runtime.engine import Engine, Session
    from ..runtime.stream import Stream

PARALLEL = 8  # answers at once, as of an engine
LEAVE_SECONDS = 5  # how long the end waits for what is in work, and as long again for events that nobody takes
_LOAD_POLL = 0.1  # seconds between two looks whether a load was cancelled


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a worker takes at most."""

    line_bytes: int = 64 << 20  # of one request
    queued: int = 64  # requests that wait
    sessions: int = 16  # that are open

    def __post_init__(self) -> None:
        for name, least in (("line_bytes", 1024), ("queued", 1), ("sessions", 0)):
            if getattr(self, name) < least:
                raise OptionError(f"most {name}", got=getattr(self, name), want=f">= {least}")


@dataclass(eq=False)
class _Job:
    """A request on its way."""

    id: protocol.Id
    op: str
    values: dict[str, Any]
    cancelled: bool = False
    ended: bool = False  # its last event was told
    stream: Stream | None = field(default=None)

    def cancel(self) -> None:
        self.cancelled = True
        if self.stream is not None:
            self.stream.cancel()


class Server:
    """One worker: a source of lines, and what takes lines."""

    def __init__(
        self,
        source: BinaryIO,
        write: Callable[[bytes], object],
        limits: Limits,
        version: str,
        leave: Callable[[], object] = lambda: None,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """
        Args:
            write: takes a whole line; an OSError of it means that nobody reads any more.
            version: of the package.
            leave: ends the process at once, when the GPU takes no more work and every request was told.
            settings: of every engine, beside what its `load` says.
        """
        self._settings = settings
        self._leave = leave
        self._worker = threading.Thread(target=self._work, name="mlx-gemma3 worker", daemon=True)
        self._source, self._write, self._limits, self._version = source, write, limits, version
        self._writing = threading.Lock()
        self._state = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._current: _Job | None = None  # what is begun now
        self._answering: list[_Job] = []  # answers on their way
        self._telling = 0  # ends that are being written
        self._parallel = 1  # most of them, as the engine was loaded
        self._ending = False
        self._engine: Engine | None = None
        self._about: Mapping[str, Any] | None = None
        self._sessions: dict[str, Session] = {}
        self._ops: Mapping[str, Callable[[_Job], Any]] = {
            "load": self._load,
            "unload": self._unload,
            "generate": self._generate,
            "session.open": self._open,
            "session.send": lambda job: self._tell(job, self._session(job).send(**_turn(job, "content"))),
            "session.retry": lambda job: self._tell(job, self._session(job).retry(**_options(job))),
            "session.undo": lambda job: self._session(job).undo(),
            "session.messages": lambda job: _said(self._session(job)),
            "session.save": lambda job: self._session(job).save(
                job.values["path"], replace=job.values.get("replace", True)
            ),
            "session.close": self._close,
        }

    def run(self) -> None:
        """Serve until the source ends or shutdown is asked for; then cancel what is left and free the model."""
        self._emit({"kind": "hello", "protocol": protocol.VERSION, **self._identity()})
        self._worker.start()
        shutdown: protocol.Id | None = None
        for line in protocol.lines(self._source, self._limits.line_bytes):
            if (shutdown := self._take(line)) is not None:
                break
        teller = threading.Thread(target=self._tell_ends, args=(shutdown,), daemon=True)
        teller.start()
        teller.join(2 * LEAVE_SECONDS)  # not for good: it may be that nobody takes what it says

    def _tell_ends(self, shutdown: protocol.Id | None) -> None:
        """The last events of all requests, of those in work too when they do not end in time."""
        with self._state:
            self._ending = True
            left = list(self._waiting)
            self._waiting.clear()
            for job in (self._current, *self._answering):
                if job is not None:
                    job.cancel()
            self._state.notify_all()
        for job in left:
            self._end(
                job, _failure(job.id, ClosedError("worker", got="its end before this request's turn", want=_ALIVE))
            )
        with self._state:
            self._state.wait_for(lambda: not (self._current or self._answering or self._telling), LEAVE_SECONDS)
            stuck = [job for job in (self._current, *self._answering) if job is not None]
        for job in stuck:  # inside something that cannot be asked to stop
            self._end(job, _failure(job.id, ClosedError("worker", got="its end during this request", want=_ALIVE)))
        if not stuck:
            self._worker.join(LEAVE_SECONDS)
        if shutdown is not None:
            self._emit({"id": shutdown, "kind": "ok", "result": {}})

    def _take(self, line: bytes | None) -> protocol.Id | None:
        """Answer a line, or put it in the queue. Returns the id of a shutdown."""
        name: protocol.Id | None = None
        try:
            if line is None:
                limit = self._limits.line_bytes
                raise RequestError("line", got="more bytes than that", want=f"at most {limit} (--max-line)")
            message = protocol.decode(line)
            found = protocol.identity(message)
            with self._state:
                if any(job.id == found for job in self._jobs()):
                    raise RequestError(
                        f"id {found!r}", got="a request while one of that id is on its way", want="another"
                    )
            name = found
            op, values = protocol.check(message)
            if op == "shutdown":
                return name
            if op in protocol.AT_ONCE:
                result = self._cancel(values["target"]) if op == "cancel" else self._status()
                self._emit({"id": name, "kind": "ok", "result": result})
            else:
                self._enqueue(_Job(name, op, values))
        except Gemma3Error as error:
            self._emit(_failure(name, error))
        return None

    def _jobs(self) -> list[_Job]:
        return [*self._answering, *([] if self._current is None else [self._current]), *self._waiting]

    def _enqueue(self, job: _Job) -> None:
        with self._state:
            if len(self._waiting) >= self._limits.queued:
                raise BusyError("queue", got=f"{len(self._waiting)} requests that wait", want="a moment (--max-queued)")
            self._waiting.append(job)
            self._state.notify_all()

    def _cancel(self, target: protocol.Id) -> dict[str, Any]:
        with self._state:
            job = next((job for job in self._jobs() if job.id == target), None)
            if job is not None:
                job.cancel()
        return {"found": job is not None}

    def _status(self) -> dict[str, Any]:
        memory = {}
        if self._about is not None:
            import mlx.core as mx

            memory = {
                "active_bytes": mx.get_active_memory(),
                "cache_bytes": mx.get_cache_memory(),
                "peak_bytes": mx.get_peak_memory(),
            }
        with self._state:
            return {
                **self._identity(),
                "model": self._about if self._engine is None else self._engine.about,  # its notes may have grown
                "running": next((job.id for job in self._jobs() if job not in self._waiting), None),
                "answering": [job.id for job in self._answering],
                "waiting": [job.id for job in self._waiting],
                "sessions": list(self._sessions),
                "memory": memory,
            }

    def _identity(self) -> dict[str, Any]:
        limits = self._limits
        return {
            "version": self._version,
            "pid": os.getpid(),
            "limits": {"line_bytes": limits.line_bytes, "queued": limits.queued, "sessions": limits.sessions},
        }

    def _work(self) -> None:
        """Begin one request after another, in a thread of its own; an answer goes on in another."""
        while (job := self._next()) is not None:
            try:
                if job.cancelled and job.op not in _ANSWERS:
                    raise ClosedError(job.op, got="a cancel before its turn", want="to be let finish")
                result = self._ops[job.op](job)
                if job.op not in _ANSWERS:
                    self._end(job, {"id": job.id, "kind": "ok", "result": result or {}})
            except Gemma3Error as error:
                self._end(job, _failure(job.id, error))
            except Exception as error:  # nobody foresaw it: one request fails, the worker lives on
                self._end(job, _failure(job.id, Gemma3Error(f"{type(error).__name__} in the worker", got=error)))
        self._unload()

    def _next(self) -> _Job | None:
        with self._state:
            self._state.wait_for(lambda: self._ending or self._may_begin())
            self._current = None if self._ending else self._waiting.popleft()
            return self._current

    def _may_begin(self) -> bool:
        """Whether the first that waits can begin: a model is changed when no answer is on its way, and no more answers
        than it takes are.
        """
        if not self._waiting:
            return False
        if self._waiting[0].op in ("load", "unload"):
            return not self._answering
        return self._waiting[0].op not in _ANSWERS or len(self._answering) < self._parallel

    def _end(self, job: _Job, event: Mapping[str, Any]) -> None:
        """Tell the end of a request, once; its id is free from then on."""
        with self._state:
            told, job.ended = job.ended, True
            if self._current is job:
                self._current = None
            if job in self._answering:
                self._answering.remove(job)
            self._telling += not told
            self._state.notify_all()
        if not told:
            self._emit(event)
            with self._state:
                self._telling -= 1
                self._state.notify_all()
            if event.get("code") == DeviceLost.code:
                threading.Thread(target=self._give_up, daemon=True).start()

    def _give_up(self) -> None:
        self._tell_ends(None)
        self._leave()

    def _load(self, job: _Job) -> Mapping[str, Any]:
        from ..runtime.engine import Engine

        self._unload()
        options = dict(job.values)
        engine = Engine(options.pop("model"), **self._settings, **options, quiet=True, wait=False)
        try:
            while not engine.wait_until_loaded(_LOAD_POLL):
                if job.cancelled:
                    raise ClosedError("load", got="a cancel", want="to be let finish")
            about = engine.about
        except BaseException:
            engine.close()
            raise
        with self._state:
            self._engine, self._about = engine, about
            self._parallel = job.values.get("parallel", PARALLEL)
        return about

    def _unload(self, _: _Job | None = None) -> None:
        with self._state:
            engine, self._engine, self._about = self._engine, None, None
            self._sessions.clear()
        if engine is not None:
            engine.close()

    def _loaded(self) -> Engine:
        if self._engine is None:
            raise RequestError("model", got="none", want="one that is loaded", do='send {"op": "load"} first')
        return self._engine

    def _generate(self, job: _Job) -> None:
        return self._tell(
            job, self._loaded().stream(**_turn(job, "messages" if "messages" in job.values else "prompt"))
        )

    def _tell(self, job: _Job, stream: Stream) -> None:
        """Let a thread write a stream's events. The last is the end of the request."""
        job.stream = stream
        if job.cancelled:
            stream.cancel()
        with self._state:
            self._answering.append(job)
            self._current = None
        threading.Thread(target=self._follow, args=(job, stream), name="mlx-gemma3 answer", daemon=True).start()

    def _follow(self, job: _Job, stream: Stream) -> None:
        while (event := stream.next())["kind"] not in protocol.ENDS:
            if job.ended:
                return
            self._emit({"id": job.id, **event})
        self._end(job, {"id": job.id, **event})

    def _open(self, job: _Job) -> dict[str, Any]:
        name = job.values["session"]
        if name in self._sessions:
            raise RequestError(f"session {name!r}", got="an open one", want="a new name")
        if len(self._sessions) >= self._limits.sessions:
            raise BusyError(
                "sessions", got=f"{len(self._sessions)} open", want="fewer (--max-sessions)", do="close one"
            )
        given = {key: job.values.get(key) for key in ("system", "resume", "adapter")}
        session = self._loaded().session(**given)
        said = _said(session)
        with self._state:
            self._sessions[name] = session
        return said

    def _session(self, job: _Job) -> Session:
        self._loaded()
        name = job.values["session"]
        if name not in self._sessions:
            raise RequestError(f"session {name!r}", got="none of that name", want="an open one")
        return self._sessions[name]

    def _close(self, job: _Job) -> None:
        self._session(job)
        with self._state:
            del self._sessions[job.values["session"]]

    def _emit(self, event: Mapping[str, Any]) -> None:
        line = protocol.encode(event)
        with self._writing:
            try:
                self._write(line)
            except (OSError, ValueError):  # nobody reads, or we have left: the end of the source tells us to leave
                self._write = len


_ALIVE = "a running one"
_ANSWERS = ("generate", "session.send", "session.retry")  # their streams tell that they were cancelled


def _failure(name: protocol.Id | None, error: Gemma3Error) -> dict[str, Any]:
    return {"id": name, "kind": "error", "code": error.code, "message": str(error)}


def _turn(job: _Job, said: str) -> dict[str, Any]:
    """Keyword arguments of Engine.stream or Session.send."""
    name = "said" if said == "content" else "prompt"
    return {name: job.values[said], "images": job.values.get("images", []), **_options(job)}


def _options(job: _Job) -> dict[str, Any]:
    """Checked by name before they become keyword arguments, where `self` or `images` would mean something else."""
    from ..runtime.options import Options

    options: dict[str, Any] = job.values.get("options", {})
    Options.build(options)
    return options


def _said(session: Session) -> dict[str, Any]:
    return {"messages": session.messages, "tokens": session.tokens}

"""An engine in a process of its own, for Python programs: what `Engine` does, without MLX in this process."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from ..boundary.arguments import takes
from ..errors import ClosedError, Gemma3Error, ImageError, OptionError, PromptError, RequestError, WorkerError
from ..grammar.hints import is_model, schema_of
from ..grammar.tools import read
from ..prompt import snapshot
from ..runtime.stream import Channel, Messages, Picture, Reply, Stream, check_process
from .pictures import absolute, spoken, told
from .protocol import ENDS, VERSION

Pictures = Picture | Sequence[Picture] | None
COMMAND = (sys.executable, "-m", "mlx_gemma3.cli", "worker")
START_SECONDS = 20.0  # for the first line of a worker, which comes before it loads anything
_LONGEST_HELLO = 1 << 16  # bytes
_LEAVE_SECONDS = 20  # for its end after its input was closed
_SILENT_SECONDS = 5  # for its end after it closed its output


class WorkerEngine:
    """A model in a worker process. If that process dies, every answer on its way ends with a WorkerError.

    Args:
        source, options: as of `load`.
        command: what starts a worker; the one of this Python by default. It gets a session of its own, so that
            Ctrl-C in a terminal reaches the program alone.
        start_timeout: seconds that it may take to say that it is one.

    Raises:
        Gemma3Error: as of `load`; WorkerError when no worker could be started.
    """

    @takes(source="path", start_timeout="number")
    def __init__(
        self,
        source: str | Path,
        *,
        command: Sequence[str] = COMMAND,
        start_timeout: float = START_SECONDS,
        **options: Any,
    ) -> None:
        self._start_timeout = start_timeout
        if options.get("adapters"):
            options["adapters"] = {name: str(absolute(path)) for name, path in options["adapters"].items()}
        self._load = {"model": str(source), **{name: value for name, value in options.items() if value is not None}}
        self._command, self._names = tuple(command), itertools.count(1)
        self._process: _Process | None = None
        self.restart()

    def restart(self) -> None:
        """Begin anew: another process, the same model. Sessions and answers of the old one are gone."""
        self.close()
        self._process = process = _Process(self._command, self._start_timeout)
        self._end = weakref.finalize(self, process.end)
        try:
            process.call("load", **self._load)
        except BaseException:
            self.close()
            raise

    def stream(self, prompt: str | Messages, *, images: Pictures = (), **options: Any) -> Stream:
        """As `Engine.stream`."""
        process, said = self.process, snapshot.said(prompt)
        name = "prompt" if isinstance(said, str) else "messages"
        return Stream(_asked(process, "generate", images, options, lambda: {name: spoken(said)}), self)

    def generate(self, prompt: str | Messages, *, images: Pictures = (), **options: Any) -> Reply:
        """As `Engine.generate`."""
        with self.stream(prompt, images=images, **options) as stream:
            return stream.reply

    @takes(system="text", resume="path")
    def session(
        self, *, system: str | None = None, resume: str | Path | None = None, adapter: str | None = None
    ) -> WorkerSession:
        """As `Engine.session`."""
        given = {"system": system, "resume": None if resume is None else absolute(resume), "adapter": adapter}
        name = f"session {next(self._names)}"
        self.process.call("session.open", session=name, **{key: to for key, to in given.items() if to is not None})
        return WorkerSession(self, self.process, name)

    def status(self) -> dict[str, Any]:
        """What the worker has to do and holds."""
        return self.process.call("status")

    @property
    def process(self) -> _Process:
        """The running process. Raises ClosedError after close."""
        if self._process is None:
            raise ClosedError("engine", got="a request after close()", want="an open engine")
        return self._process

    def close(self) -> None:
        """Let the process end. Any number of times."""
        if self._process is not None:
            self._process = None
            self._end()

    def __enter__(self) -> WorkerEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class WorkerSession:
    """A conversation in a worker process."""

    def __init__(self, engine: WorkerEngine, process: _Process, name: str) -> None:
        self._engine, self._process, self._name = engine, process, name
        weakref.finalize(self, process.dropped.append, name).atexit = False

    def send(self, said: str | Messages, *, images: Pictures = (), **options: Any) -> Stream:
        """As `Session.send`."""
        content, session = snapshot.said(said), {"session": self._name}
        made = _asked(self._process, "session.send", images, options, lambda: session | {"content": spoken(content)})
        return Stream(made, self)

    def retry(self, **options: Any) -> Stream:
        """As `Session.retry`."""
        return Stream(self._process.ask("session.retry", session=self._name, options=options), self)

    def undo(self) -> None:
        """As `Session.undo`."""
        self._process.call("session.undo", session=self._name)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """As `Session.messages`."""
        messages: list[dict[str, Any]] = self._process.call("session.messages", session=self._name)["messages"]
        return messages

    @property
    def tokens(self) -> int:
        """As `Session.tokens`."""
        return int(self._process.call("session.messages", session=self._name)["tokens"])

    @takes(path="path", replace="switch")
    def save(self, path: str | Path, *, replace: bool = True) -> None:
        """As `Session.save`."""
        self._process.call("session.save", session=self._name, path=absolute(path), replace=replace)


class _Remote(Channel):
    """The channel of one request."""

    def __init__(self, process: _Process, number: int) -> None:
        super().__init__()
        self.process, self.number, self.told, self.heard = process, number, False, False

    def cancel(self) -> None:
        self.told = True
        self.unwanted()
        self.process.cancel(self.number)


class _Process:
    """A worker, the requests on their way to it, and the thread that reads what it says."""

    def __init__(self, command: Sequence[str], start_timeout: float) -> None:
        self.dropped: list[str] = []  # sessions that nobody holds any more
        self._channels: dict[int, _Remote] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._ended: WorkerError | None = None
        self._owner = os.getpid()
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
        except (OSError, ValueError, IndexError) as error:
            raise WorkerError("worker", got=error, want=f"{' '.join(command[:1])} to start") from None
        greeting: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(greeting,), name="mlx-gemma3 client", daemon=True)
        self._reader.start()
        try:
            hello = greeting.get(timeout=start_timeout)
            self._longest = _longest_line(hello)
        except BaseException as error:  # Ctrl-C, too
            self._kill()
            self._close()
            if not isinstance(error, queue.Empty):
                raise
            got = f"nothing said in {start_timeout:g} seconds"
            raise WorkerError("worker", got=got, want=f"{command[0]} to be one") from None

    def ask(self, op: str, **values: Any) -> _Remote:
        """Send a request; its events go into the channel."""
        check_process(self._owner)
        while self.dropped:
            self.ask("session.close", session=self.dropped.pop())
        channel = _Remote(self, next(self._numbers))
        line = _line({"id": channel.number, "op": op, **values})
        if len(line) > self._longest:
            raise RequestError(op, got=f"a line of {len(line)} bytes", want=f"at most {self._longest} (--max-line)")
        with self._lock:
            if self._ended is not None:
                channel.fail(self._ended)
                return channel
            self._channels[channel.number] = channel
        self._send(line)
        return channel

    def call(self, op: str, **values: Any) -> dict[str, Any]:
        """Send a request and wait for its end. Raises Gemma3Error: what an error event told."""
        channel = self.ask(op, **values)
        while True:
            event: Any = channel.get(None)
            if event["kind"] == "ok":
                result: dict[str, Any] = event["result"]
                return result
            if channel.error is not None:
                raise channel.error

    def cancel(self, number: int) -> None:
        if os.getpid() == self._owner:
            self._send(_line({"id": f"cancel {number}", "op": "cancel", "target": number}))

    def _send(self, line: bytes) -> None:
        assert self._process.stdin is not None
        try:
            with self._lock:
                self._process.stdin.write(line)
                self._process.stdin.flush()
        except (OSError, ValueError):  # it ended, or was closed: the reading thread tells all requests
            return

    def end(self) -> None:
        """Close its input, which ends it; one that does not end is killed. Nothing in a process that was forked."""
        if os.getpid() != self._owner:
            return
        process = self._process
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # what was not sent is not needed any more
            process.stdin.close()
        try:
            process.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()
        self._close()

    def _kill(self) -> None:
        """End it now, and what it has started."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _close(self) -> None:
        """Of a process that has ended, or is about to."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.wait()
        with contextlib.suppress(OSError):
            process.stdin.close()
        if threading.current_thread() is not self._reader:
            self._reader.join(_SILENT_SECONDS)
            if self._reader.is_alive():  # something that it started holds the pipe
                self._kill()
                self._reader.join()
        process.stdout.close()

    def _read(self, greeting: queue.SimpleQueue[dict[str, Any]]) -> None:
        """What the reading thread does: the first line goes to who waits for it, events to their channels."""
        assert self._process.stdout is not None
        said, how = self._process.stdout, ""
        try:
            first = said.readline(_LONGEST_HELLO)
            if first:
                hello = _object(first)
                greeting.put(hello)
                for line in said:
                    if line.endswith(b"\n"):  # else it was cut off in the middle
                        self._take(_object(line))
        except Exception as error:  # it says what no worker says: nothing else is to be expected of it
            how = f"said {error}" if isinstance(error, _NoEvent) else f"said what is no event ({type(error).__name__})"
            self._kill()
        how = how or self._end_of_it()
        self._process.wait()
        greeting.put({"how": how})
        with self._lock:
            self._ended = WorkerError("worker", got=how, want="a running one", do="restart() begins anew")
            left = list(self._channels.values())
            self._channels.clear()
        for channel in left:
            channel.fail(self._ended)

    def _end_of_it(self) -> str:
        """How it ended, once its output has."""
        try:
            code = self._process.wait(_SILENT_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()
            return "closed its output"
        if code >= 0:
            return f"ended with status {code}"
        names = {number.value: number.name for number in signal.Signals}
        return f"killed by {names.get(-code, f'signal {-code}')}"

    def _take(self, event: dict[str, Any]) -> None:
        number, kind = event.pop("id", None), event["kind"]
        if number is None and kind == "error":  # a line of ours that it could not read: one that it has not answered
            with self._lock:
                unheard = [waiting for waiting in self._channels.values() if not waiting.heard]
                for waiting in unheard:
                    del self._channels[waiting.number]
            for waiting in unheard:
                waiting.fail(_error(event))
            return
        channel = self._channels.get(number) if isinstance(number, int) else None
        if channel is None:
            return
        channel.heard = True
        if kind in ENDS:
            del self._channels[channel.number]
        elif channel.cancelled and not channel.told:  # abandoned; not from here: the pipe may be full
            channel.told = True
            threading.Thread(target=channel.cancel, daemon=True).start()
        if kind == "error":
            channel.fail(_error(event))
        else:
            channel.put(cast(Any, event))  # of the worker's kinds too: a call waits for "ok"


def _longest_line(hello: dict[str, Any]) -> int:
    """Bytes of a request that a worker takes, by its first line. Raises WorkerError when it speaks another protocol."""
    limits = hello.get("limits")
    longest = limits.get("line_bytes") if isinstance(limits, dict) else None
    if hello.get("protocol") == VERSION and isinstance(longest, int):
        return longest
    how = f", {hello['how']}" if "how" in hello else ""
    raise WorkerError("worker", got=f"protocol {hello.get('protocol')}{how}", want=VERSION, do="install it anew")


class _NoEvent(Exception):
    """A line that no worker says."""


def _object(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or "kind" not in values:
        raise _NoEvent(repr(line[:60]))
    return values


def _line(message: dict[str, Any]) -> bytes:
    """A request as a line. Raises OptionError: a value that JSON cannot hold."""
    try:
        return json.dumps(message, allow_nan=False, default=_plain).encode("ascii") + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        name, value = message["op"], error
        with contextlib.suppress(RecursionError):
            name, value = _unsaid(message) or (name, value)
        raise OptionError(
            name, got=repr(value), want="what JSON can hold: finite numbers, texts, lists, dicts"
        ) from None


def _plain(value: Any) -> Any:
    """A number of numpy's as Python's."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return value.item()
    raise TypeError(type(value).__name__)


def _unsaid(values: Any, name: str = "") -> tuple[str, Any] | None:
    """The first value that JSON cannot hold, and the name it stands under."""
    if isinstance(values, dict):
        return next(filter(None, (_unsaid(value, str(key)) for key, value in values.items())), None)
    if isinstance(values, list | tuple):
        return next(filter(None, (_unsaid(value, name) for value in values)), None)
    if values is None or isinstance(values, str | int) or (isinstance(values, float) and math.isfinite(values)):
        return None
    return name, values


def _error(event: dict[str, Any]) -> Gemma3Error:
    """The error of this package that an event tells of."""
    kinds = [Gemma3Error]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return next((kind for kind in kinds if kind.code == event.get("code")), Gemma3Error)(str(event.get("message")))


def _asked(
    process: _Process, op: str, images: Pictures, options: dict[str, Any], said: Callable[[], dict[str, Any]]
) -> Channel:
    """Send a turn. What is wrong with its words and pictures is told by the channel, as by an engine's."""
    try:
        turn = {**said(), "images": [told(image) for image in snapshot.pictures(images)], "options": options}
    except (PromptError, ImageError) as error:
        failed = Channel()
        failed.fail(error)
        return failed
    kind, tools = options.get("schema"), options.get("tools")
    if is_model(kind):  # a class stays here: the worker gets its schema
        turn["options"] = turn["options"] | {"schema": schema_of(kind)}
    if tools and any(map(callable, tools)):
        turn["options"] = turn["options"] | {"tools": [tool.declaration for tool in read(tools)]}
    channel = process.ask(op, **turn)
    channel.schema = kind
    return channel

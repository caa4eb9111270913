"""An engine in a process of its own, for Python programs: what `Engine` does, without MLX in this process."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import ClosedError, Gemma3Error, RequestError, WorkerError
from ..runtime.stream import Channel, Messages, Picture, Reply, Stream
from .protocol import ENDS, VERSION

COMMAND = (sys.executable, "-m", "mlx_gemma3.cli", "worker")


class WorkerEngine:
    """A model in a worker process. If that process dies, every answer on its way ends with a WorkerError.

    Args:
        source, options: as of `load`.
        command: what starts a worker; the one of this Python by default.

    Raises:
        Gemma3Error: as of `load`; WorkerError when no worker could be started.
    """

    def __init__(self, source: str | Path, *, command: Sequence[str] = COMMAND, **options: Any) -> None:
        self._load = {"model": str(source), **options}
        self._command, self._names = tuple(command), itertools.count(1)
        self._process: _Process | None = None
        self.restart()

    def restart(self) -> None:
        """Begin anew: another process, the same model. Sessions and answers of the old one are gone."""
        self.close()
        self._process = process = _Process(self._command)
        self._end = weakref.finalize(self, process.end)
        try:
            process.call("load", **self._load)
        except BaseException:
            self.close()
            raise

    def stream(self, prompt: str | Messages, *, images: Sequence[Picture] = (), **options: Any) -> Stream:
        """As `Engine.stream`."""
        said = {"prompt": prompt} if isinstance(prompt, str) else {"messages": list(prompt)}
        return Stream(self.process.ask("generate", **said, **_turn(images, options)), self)

    def generate(self, prompt: str | Messages, *, images: Sequence[Picture] = (), **options: Any) -> Reply:
        """As `Engine.generate`."""
        with self.stream(prompt, images=images, **options) as stream:
            return stream.reply

    def session(self, *, system: str | None = None, resume: str | Path | None = None) -> WorkerSession:
        """As `Engine.session`."""
        given = {"system": system, "resume": None if resume is None else _absolute(resume)}
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

    def send(self, said: str | Messages, *, images: Sequence[Picture] = (), **options: Any) -> Stream:
        """As `Session.send`."""
        content = said if isinstance(said, str) else list(said)
        turn = _turn(images, options)
        return Stream(self._process.ask("session.send", session=self._name, content=content, **turn), self)

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

    def save(self, path: str | Path) -> None:
        """As `Session.save`."""
        self._process.call("session.save", session=self._name, path=_absolute(path))


class _Remote(Channel):
    """The channel of one request."""

    def __init__(self, process: _Process, number: int) -> None:
        super().__init__()
        self.process, self.number, self.told = process, number, False

    def cancel(self) -> None:
        self.cancelled = self.told = True
        self.process.cancel(self.number)


class _Process:
    """A worker, the requests on their way to it, and the thread that reads what it says."""

    def __init__(self, command: Sequence[str]) -> None:
        self.dropped: list[str] = []  # sessions that nobody holds any more
        self._channels: dict[int, _Remote] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._ended: WorkerError | None = None
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise WorkerError("worker", got=error, want=f"{command[0]} to start") from None
        hello = next(self._events(), {})
        self._longest: int = hello.get("limits", {}).get("line_bytes", 0)
        self._reader = threading.Thread(target=self._read, name="mlx-gemma3 client", daemon=True)
        self._reader.start()
        if hello.get("protocol") != VERSION:
            self.end()
            raise WorkerError("worker", got=f"protocol {hello.get('protocol')}", want=VERSION, do="install it anew")

    def ask(self, op: str, **values: Any) -> _Remote:
        """Send a request; its events go into the channel."""
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
        while (event := channel.get(None)) is not None and event["kind"] != "ok":
            if channel.error is not None:
                raise channel.error
        assert event is not None
        result: dict[str, Any] = event["result"]
        return result

    def cancel(self, number: int) -> None:
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
        """Close its input, which ends it; one that does not end is killed."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):  # what was not sent is not needed any more
            process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if threading.current_thread() is not self._reader:
            self._reader.join()
        process.stdout.close()

    def _events(self) -> Iterator[dict[str, Any]]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith(b"\n"):  # else it was cut off in the middle
                yield json.loads(line)

    def _read(self) -> None:
        for event in self._events():
            number = event.pop("id", None)
            channel = self._channels.get(number)
            if channel is None:
                continue
            if event["kind"] in ENDS:
                del self._channels[number]
            elif channel.cancelled and not channel.told:  # abandoned; not from here: the pipe may be full
                channel.told = True
                threading.Thread(target=channel.cancel, daemon=True).start()
            if event["kind"] == "error":
                channel.fail(_error(event))
            else:
                channel.put(event)
        code = self._process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        with self._lock:
            self._ended = WorkerError("worker", got=how, want="a running one", do="restart() begins anew")
            left = list(self._channels.values())
            self._channels.clear()
        for channel in left:
            channel.fail(self._ended)


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode("ascii") + b"\n"


def _error(event: dict[str, Any]) -> Gemma3Error:
    """The error of this package that an event tells of."""
    kinds = [Gemma3Error]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return next((kind for kind in kinds if kind.code == event["code"]), Gemma3Error)(event["message"])


def _turn(images: Sequence[Picture], options: dict[str, Any]) -> dict[str, Any]:
    return {"images": [_picture(image) for image in images], "options": options}


def _picture(image: Picture) -> dict[str, str]:
    if isinstance(image, str | Path):
        return {"path": _absolute(image)}
    if not isinstance(image, bytes):  # a Pillow image
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        image = buffer.getvalue()
    return {"base64": base64.b64encode(image).decode("ascii")}


def _absolute(path: str | Path) -> str:
    """The worker may have another working directory."""
    return str(Path(path).absolute())

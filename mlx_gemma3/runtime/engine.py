"""The engine: one thread that owns all MLX work, and streams that any thread may pull from.

MLX's lazy arrays belong to the thread that made them, so the model is loaded and run in one thread of the engine's own;
requests wait in a queue and are served in order. The caller pulls (`Stream.next`), nothing is pushed at it.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Unpack

import mlx.core as mx

from ..checkpoint.load import load_model, open_checkpoint
from ..checkpoint.source import resolve
from ..errors import ClosedError, Gemma3Error, OptionError, PromptError
from ..prompt.processor import Processor, Prompt
from .options import Options, OptionValues
from .session import Session

Messages = Sequence[dict[str, Any]]
Picture = Any  # a path, the bytes of a file, or a PIL image


class Piece(NamedTuple):
    """Some text of an answer and the ids behind it."""

    text: str
    tokens: list[int]


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    text: str
    tokens: list[int]  # as generated, the one that ended the answer included
    finish_reason: str  # "stop" | "length" | "cancelled"
    usage: dict[str, Any]


@dataclass(eq=False)
class _Request:
    """What a stream and the engine's thread share."""

    prompt: str | Messages
    images: Sequence[Picture]
    options: Options
    events: queue.SimpleQueue[dict[str, Any]] = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    error: Gemma3Error | None = None

    def fail(self, error: Gemma3Error) -> None:
        self.error = error
        self.events.put({"kind": "error", "code": error.code, "message": str(error)})


class Stream:
    """One answer on its way. Iterate it, or poll `next`; usable from any thread, by one reader at a time."""

    def __init__(self, request: _Request) -> None:
        self._request = request
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._end: dict[str, Any] | None = None
        weakref.finalize(self, request.cancelled.set)  # a stream that nobody holds any more frees the engine

    def next(self, timeout: float | None = None) -> dict[str, Any]:
        """The next event, as a dict of plain types.

        {"kind": "text", "text", "tokens"} · {"kind": "pending"}: nothing within `timeout` seconds, or progress
        ("stage", "done", "total") · {"kind": "done", "text", "tokens", "finish_reason", "usage"} · {"kind": "error",
        "code", "message"}. The last two end the stream and are given again when asked again.
        """
        if self._end is not None:
            return self._end
        try:
            event = self._request.events.get(timeout=timeout)
        except queue.Empty:
            return {"kind": "pending"}
        if event["kind"] == "text":
            self._texts.append(event["text"])
            self._tokens += event["tokens"]
        elif event["kind"] == "done":
            self._tokens += event["tokens"]
            event = event | {"text": "".join(self._texts), "tokens": list(self._tokens)}
        if event["kind"] in ("done", "error"):
            self._end = event
        return event

    def __iter__(self) -> Iterator[Piece]:
        """Yield pieces of text until the answer ends.

        Raises:
            Gemma3Error: what an error event would say.
        """
        while True:
            event = self.next()
            if event["kind"] == "text":
                yield Piece(event["text"], event["tokens"])
            elif event["kind"] == "done":
                return
            elif event["kind"] == "error":
                self.raise_error()

    def raise_error(self) -> None:
        """Raise what the error event told, if there was one."""
        if self._request.error is not None:
            raise self._request.error

    @property
    def reply(self) -> Reply:
        """The whole answer; reads the stream to its end if it is not there yet."""
        for _ in self:
            pass
        assert self._end is not None
        end = self._end
        return Reply(end["text"], end["tokens"], end["finish_reason"], end["usage"])

    def cancel(self) -> None:
        """End the answer after the token or prefill chunk in work. Any thread, any number of times."""
        self._request.cancelled.set()

    def close(self) -> None:
        """Cancel; what was not read is dropped."""
        self.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Engine:
    """A loaded model that answers. Made by `load`; close it, or use it as a context manager.

    Args:
        source: alias, folder, Hub id or .gguf.
        dtype: "auto" (bfloat16 on a GPU, float32 on the CPU), "float32" or "bfloat16".
        text_only: leave the vision tower on disk.
        quiet: no download bars on stderr.

    Raises:
        Gemma3Error: the source cannot be found or loaded.
    """

    def __init__(
        self, source: str | Path, *, dtype: str = "auto", text_only: bool = False, quiet: bool = False
    ) -> None:
        self._worker = _Worker(source, dtype, text_only, quiet)
        self._closer = weakref.finalize(self, self._worker.shut)
        self._worker.wait_until_loaded()

    def stream(
        self, prompt: str | Messages, *, images: Sequence[Picture] = (), **options: Unpack[OptionValues]
    ) -> Stream:
        """Start an answer and return at once.

        Args:
            prompt: a user's words, or messages as `{"role", "content"}` dicts. For a base checkpoint, or with
                raw=True, a string is the text to complete; a picture's place in it is `<start_of_image>`.
            images: paths, bytes of picture files, or PIL images; they stand before a string's words, or fill the
                picture items of the messages in order.
            options: the fields of `Options`.

        Raises:
            OptionError: an unknown option or a value out of range. All that goes wrong later is an error event.
            ClosedError: the engine was closed.
        """
        request = _Request(prompt, list(images), Options.build(options))
        self._worker.submit(request)
        return Stream(request)

    def generate(
        self, prompt: str | Messages, *, images: Sequence[Picture] = (), **options: Unpack[OptionValues]
    ) -> Reply:
        """As `stream`, and wait for the whole answer.

        Raises:
            Gemma3Error: whatever went wrong.
        """
        with self.stream(prompt, images=images, **options) as stream:
            return stream.reply

    def close(self) -> None:
        """Cancel what is in work, end the thread, free the model. Any thread, any number of times."""
        self._closer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _Worker:
    """The thread's side of an engine. Holds no reference to the Engine, so that dropping that one ends the thread."""

    def __init__(self, source: str | Path, dtype: str, text_only: bool, quiet: bool) -> None:
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._loaded = threading.Event()
        self._load_error: Exception | None = None
        self._current: _Request | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(
            target=self._run, args=(source, dtype, text_only, quiet), name="mlx-gemma3", daemon=True
        )
        self._thread.start()

    def wait_until_loaded(self) -> None:
        self._loaded.wait()
        if self._load_error is not None:
            raise self._load_error

    def submit(self, request: _Request) -> None:
        with self._lock:
            if self._closed:
                raise ClosedError("engine", got="a request after close()", want="an open engine")
            self._requests.put(request)

    def shut(self) -> None:
        with self._lock:
            self._closed = True
            if self._current is not None:
                self._current.cancelled.set()
            self._requests.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self, source: str | Path, dtype: str, text_only: bool, quiet: bool) -> None:
        try:
            answering = _Answering(source, dtype, text_only, quiet)
        except Exception as error:  # raised again in the thread that asked for the engine
            self._load_error = error
            return
        finally:
            self._loaded.set()
        while (request := self._requests.get()) is not None:
            with self._lock:
                self._current = request
                if self._closed:
                    request.cancelled.set()
            try:
                answering.serve(request)
            except Gemma3Error as error:
                request.fail(error)
            except Exception as error:  # nobody foresaw it: one request fails, the engine lives on
                request.fail(Gemma3Error(f"{type(error).__name__} during generation", got=error))
            finally:
                self._current = None
                del request
        while not self._requests.empty():
            if (request := self._requests.get()) is not None:
                request.fail(ClosedError("engine", got="close() before this request's turn", want="an open engine"))


class _Answering:
    """Model, tokenizer and processor, living in the engine's thread."""

    def __init__(self, source: str | Path, dtype: str, text_only: bool, quiet: bool) -> None:
        self.checkpoint = open_checkpoint(resolve(source, text_only=text_only, quiet=quiet), text_only=text_only)
        self.model = load_model(self.checkpoint, dtype=dtype, text_only=text_only)
        mx.eval(self.model.parameters())
        self.tokenizer = self.checkpoint.tokenizer()
        self.processor = Processor(self.tokenizer, self.checkpoint.config)

    def serve(self, request: _Request) -> None:
        options, config = request.options, self.checkpoint.config
        began = time.perf_counter()
        if request.images:
            request.events.put({"kind": "pending", "stage": "pictures", "done": 0, "total": len(request.images)})
        prompt = self._prepare(request)
        prepared = time.perf_counter() - began
        session = Session(self.model, self.tokenizer, frozenset(config.eos_token_ids))
        events = session.answer(
            prompt,
            sampling=options.sampling(self.checkpoint.generation),
            max_tokens=options.max_tokens,
            stop=options.stop,
            progress=lambda done, total: request.events.put(
                {"kind": "pending", "stage": "prompt", "done": done, "total": total}
            ),
            cancelled=request.cancelled.is_set,
        )
        for event in events:
            if event["kind"] == "done":
                event["usage"]["prepare_seconds"] = prepared
            request.events.put(event)

    def _prepare(self, request: _Request) -> Prompt:
        prompt, options = request.prompt, request.options
        if isinstance(prompt, str):
            raw = not self.checkpoint.instruct if options.raw is None else options.raw
            if raw:
                if options.system is not None:
                    raise OptionError("system", got="a text", want="none", do="completion has no turns")
                return self.processor.prepare(prompt, request.images, pan_and_scan=options.pan_and_scan)
            pictures = [{"type": "image"} for _ in request.images]
            messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}]
        else:
            if options.raw:
                raise PromptError("prompt", got="messages", want="a string", do="completion has no turns")
            messages = list(prompt)
        if options.system is not None:
            messages = [{"role": "system", "content": options.system}, *messages]
        # What users type must not act as control tokens: `<end_of_turn>` in a message does not end the turn.
        return self.processor.prepare(messages, request.images, pan_and_scan=options.pan_and_scan, special=False)


def load(source: str | Path, *, dtype: str = "auto", text_only: bool = False, quiet: bool = False) -> Engine:
    """Load a checkpoint and start its engine. See `Engine` for the arguments and errors."""
    return Engine(source, dtype=dtype, text_only=text_only, quiet=quiet)

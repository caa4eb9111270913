"""The engine's thread: it loads the model, serves requests in order, and owns everything that MLX made."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from ..checkpoint.load import load_model, open_checkpoint
from ..checkpoint.memory import this_machine
from ..checkpoint.source import resolve
from ..errors import ClosedError, Gemma3Error, OptionError, PromptError
from ..prompt.processor import Processor, Prompt
from ..prompt.vocabulary import END_OF_TURN
from .answer import answer
from .fitting import check_memory
from .options import Options
from .session import Conversation
from .stream import Request
from .timeline import FeatureCache, Timeline, Tokens, digest

T = TypeVar("T")
TIMELINES = 4  # recent prompts without a session whose caches are kept, in at most a quarter of the memory


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What is decided when an engine is made."""

    dtype: str = "auto"
    text_only: bool = False
    kv_bits: int = 16
    local_kv_bits: int = 16
    max_context: int | None = None
    force: bool = False
    quiet: bool = False


class Worker:
    """The thread's side of an engine. Holds no reference to the Engine, so that dropping that one ends the thread."""

    def __init__(self, source: str | Path, options: EngineOptions) -> None:
        self._queue: queue.SimpleQueue[Request | tuple[Future[Any], Callable[[Host], Any]] | None] = queue.SimpleQueue()
        self._loaded = threading.Event()
        self._load_error: Exception | None = None
        self._current: Request | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, args=(source, options), name="mlx-gemma3", daemon=True)
        self._thread.start()

    def wait_until_loaded(self) -> None:
        self._loaded.wait()
        if self._load_error is not None:
            raise self._load_error

    def submit(self, request: Request) -> None:
        """Queue an answer. Raises ClosedError."""
        with self._lock:
            self._check_open()
            self._queue.put(request)

    def call(self, work: Callable[[Host], T]) -> T:
        """Run something in the thread, after what was queued before, and wait for its result."""
        future: Future[T] = Future()
        with self._lock:
            self._check_open()
            self._queue.put((future, work))
        return future.result()

    def shut(self) -> None:
        with self._lock:
            self._closed = True
            if self._current is not None:
                self._current.cancelled.set()
            self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("engine", got="a request after close()", want="an open engine")

    def _run(self, source: str | Path, options: EngineOptions) -> None:
        try:
            host = Host(source, options)
        except Exception as error:  # raised again in the thread that asked for the engine
            self._load_error = error
            return
        finally:
            self._loaded.set()
        while (item := self._queue.get()) is not None:
            if isinstance(item, Request):
                self._serve(host, item)
            else:
                _finish(item[0], lambda work=item[1]: work(host))  # type: ignore[misc]
            del item
        while not self._queue.empty():
            if (item := self._queue.get()) is None:
                continue
            closed = ClosedError("engine", got="close() before this request's turn", want="an open engine")
            if isinstance(item, Request):
                item.fail(closed)
            else:
                item[0].set_exception(closed)

    def _serve(self, host: Host, request: Request) -> None:
        with self._lock:
            self._current = request
            if self._closed:
                request.cancelled.set()
        try:
            host.serve(request)
        except Gemma3Error as error:
            request.fail(error)
        except Exception as error:  # nobody foresaw it: one request fails, the engine lives on
            request.fail(Gemma3Error(f"{type(error).__name__} during generation", got=error))
        finally:
            self._current = None


def _finish(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # raised again in the thread that waits
        future.set_exception(error)


class Host:
    """Model, tokenizer, caches: what lives in the engine's thread."""

    def __init__(self, source: str | Path, options: EngineOptions) -> None:
        text_only = options.text_only
        resolved = resolve(source, text_only=text_only, quiet=options.quiet)
        self.checkpoint = open_checkpoint(resolved, text_only=text_only)
        self.options = options
        if not options.force:
            check_memory(
                self.checkpoint,
                dtype=options.dtype,
                kv_bits=options.kv_bits,
                local_kv_bits=options.local_kv_bits,
                max_context=options.max_context,
            )
        self.model = load_model(self.checkpoint, dtype=options.dtype, text_only=text_only)
        self.budget = this_machine().budget  # bytes
        self.new_timeline()  # refuses bits that do not fit before the weights are read
        mx.eval(self.model.parameters())
        self.tokenizer = self.checkpoint.tokenizer()
        self.processor = Processor(self.tokenizer, self.checkpoint.config)
        self.eos_ids = frozenset(self.checkpoint.config.eos_token_ids)
        self.features = FeatureCache()
        self.timelines: list[Timeline] = []  # the one used last stands last

    def new_timeline(self) -> Timeline:
        caches = self.model.make_caches(kv_bits=self.options.kv_bits, local_kv_bits=self.options.local_kv_bits)
        return Timeline(self.model, caches, snapshot_bytes=self.budget // 16)

    def new_conversation(self, system: str | None) -> Conversation:
        if not self.checkpoint.instruct:
            raise OptionError(
                "session", got=f"{self.checkpoint.name}, a base checkpoint", want="one that was tuned for chat"
            )
        return Conversation(self.new_timeline(), system)

    def serve(self, request: Request) -> None:
        """Answer one request: events go into its queue, the done event last."""
        began, options = time.perf_counter(), request.options
        if request.images:
            request.events.put({"kind": "pending", "stage": "pictures", "done": 0, "total": len(request.images)})
        conversation = request.conversation
        prepared: Prompt | None
        if conversation is None:
            prepared = self._prepare(request)
            tokens = _tokens(prepared)
            timeline, images = self._timeline_for(tokens), prepared.image_count
        else:
            prepared, tokens = self._turn(conversation, request)
            timeline, images = conversation.timeline, sum(exchange.images for exchange in conversation.exchanges)
        pixels = {} if prepared is None or prepared.pixels is None else {digest(view): view for view in prepared.pixels}
        held = {} if conversation is None else conversation.features
        encoded_before = self.features.encoded

        def features(number: int) -> mx.array:
            name = tokens.digests[number]
            if name not in held:
                rows = self.features.get(self.model, name, pixels.get(name))
                if conversation is None:
                    return rows
                held[name] = rows
            return held[name]

        prepare_seconds = time.perf_counter() - began
        events = answer(
            timeline,
            tokens,
            self.tokenizer,
            features=features,
            eos_ids=self.eos_ids,
            sampling=options.sampling(self.checkpoint.generation),
            max_tokens=options.max_tokens,
            max_context=self.options.max_context,
            stop=options.stop,
            progress=lambda done, total: request.events.put(
                {"kind": "pending", "stage": "prompt", "done": done, "total": total}
            ),
            cancelled=request.cancelled.is_set,
        )
        text, ids = [], []
        try:
            for event in events:
                ids += event["tokens"]
                if event["kind"] == "text":
                    text.append(event["text"])
                else:
                    event["usage"] |= {
                        "images": images,
                        "images_encoded": self.features.encoded - encoded_before,
                        "prepare_seconds": prepare_seconds,
                    }
                    if conversation is not None:
                        conversation.answered(ids, "".join(text), self.eos_ids, self.tokenizer.id(END_OF_TURN))
                request.events.put(event)
        except Gemma3Error:
            if conversation is not None and request.prompt is not None:
                conversation.withdraw()  # a turn that could not be read was not said
            raise

    def _timeline_for(self, tokens: Tokens) -> Timeline:
        """The recent timeline with most to reuse, or a new one when that would throw away more than it saves."""
        best = max(self.timelines, key=lambda timeline: timeline.reusable(tokens), default=None)
        if best is not None:
            reused = best.reusable(tokens)
            if not reused or (len(best.tokens) - reused > 2 * reused and len(self.timelines) < TIMELINES):
                best = None
        if best is None:
            best = self.new_timeline()
        else:
            self.timelines.remove(best)
        while len(self.timelines) >= TIMELINES or sum(held.nbytes for held in self.timelines) > self.budget // 4:
            self.timelines.pop(0)
        self.timelines.append(best)
        return best

    def _turn(self, conversation: Conversation, request: Request) -> tuple[Prompt | None, Tokens]:
        """The next turn of a conversation: a new one, or the last once more."""
        options, prepared = request.options, None
        if options.system is not None or options.raw:
            raise OptionError("system or raw", got="set for one turn", want="none: they belong to the session")
        if request.prompt is None:
            if not conversation.exchanges:
                raise PromptError("conversation", got="no turn yet", want="one to answer again")
            conversation.exchanges[-1].said = None
        else:
            said = request.prompt
            if not isinstance(said, str) and any("role" in item for item in said):
                raise PromptError("turn", got="messages", want="words or content items", do="it knows the turns before")
            prepared = conversation.ask(said, request.images, self.processor, pan_and_scan=options.pan_and_scan)
        return prepared, conversation.prompt(self.processor)

    def _prepare(self, request: Request) -> Prompt:
        prompt, options = request.prompt, request.options
        assert prompt is not None, "only a session answers its last turn again"
        if isinstance(prompt, str):
            if self._raw(options):
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

    def _raw(self, options: Options) -> bool:
        return not self.checkpoint.instruct if options.raw is None else options.raw


def _tokens(prepared: Prompt) -> Tokens:
    pixels = prepared.pixels if prepared.pixels is not None else ()
    return Tokens(tuple(prepared.tokens), tuple(prepared.spans), tuple(map(digest, pixels)))

"""The engine: what programs hold. One thread owns all MLX work, and streams that any thread may pull from.

MLX's lazy arrays belong to the thread that made them: the model is loaded and run in one thread of the engine's own
(thread.py), which writes several answers at once (scheduler.py). The caller pulls (`Stream.next`), nothing is pushed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack, overload

from ..boundary.arguments import takes
from ..errors import OptionError
from ..prompt import snapshot
from ..prompt.tokenizer import Tokenizer
from . import session_file
from .classify import Policies, asked, probabilities, requests
from .conversation import Conversation
from .embedding import Embedding, Texts, embedding
from .loaded import About, EngineOptions
from .options import Options, OptionValues
from .prompts import processed, said
from .request import Request
from .scheduler import Scheduler
from .stream import AsyncStream, Messages, Picture, Piece, Reply, Stream
from .thread import EngineThread

if TYPE_CHECKING:
    from .running import Asks

__all__ = ["AsyncStream", "Engine", "Piece", "Reply", "Session", "Stream", "load"]


Pictures = Picture | Sequence[Picture] | None
T = TypeVar("T")


class LoadOptions(TypedDict, total=False):
    """The keyword arguments of `Engine`."""

    dtype: str
    text_only: bool
    kv_bits: int
    local_kv_bits: int
    max_context: int | None
    parallel: int
    queue: int
    adapters: Mapping[str, str | Path] | None
    prompt_cache: str | Path | None
    prompt_cache_bytes: int
    draft: str | Path | None
    speculation: bool
    force: bool
    quiet: bool
    wait: bool


class Engine:
    """A loaded model that answers. Made by `load`; close it, or use it as a context manager.

    Args:
        source: alias, folder, Hub id or .gguf.
        dtype: "auto" (bfloat16 on a GPU, float32 on the CPU), "float32" or "bfloat16".
        text_only: leave the vision tower on disk.
        kv_bits: how global layers keep keys and values: 16, 8 or 4.
        local_kv_bits: the same for local layers.
        max_context: most tokens of a prompt and its answer; None for all that the model has positions for.
        parallel: most answers that are written at once; others wait in order, as they do where memory does not last.
        queue: most that wait.
        adapters: folders of LoRA adapters (PEFT's, mlx-lm's, mlx-vlm's) by the names that answers ask for them by.
        prompt_cache: a folder for prompts that leave memory, made where there is none: each is read once, and found
            again after a restart. It may be shared with other programs and models. None: they are forgotten.
        prompt_cache_bytes: of all files in it; those not used for longest are deleted first.
        draft: a smaller Gemma 3 of the same vocabulary, which guesses what this one will write. A model that does
            not write has none.
        speculation: guess tokens that follow what was read or written before, and check several in one pass, where that
            is faster here (docs/speculation.md). It changes no token of an answer.
        force: load even where memory will not do.
        quiet: no download bars on stderr.
        wait: return when the model is ready. If False return at once: requests wait in line until it is, and what
            goes wrong is raised by `wait_until_loaded` and told by the streams.

    Raises:
        Gemma3Error: the source cannot be found or loaded.
    """

    @takes(
        source="path", dtype="text", text_only="switch", kv_bits="whole", local_kv_bits="whole", max_context="whole",
        parallel="whole", queue="whole", adapters="paths", prompt_cache="path", prompt_cache_bytes="whole",
        draft="path", speculation="switch", force="switch", quiet="switch", wait="switch",
    )  # fmt: skip
    def __init__(
        self,
        source: str | Path,
        *,
        dtype: str = "auto",
        text_only: bool = False,
        kv_bits: int = 16,
        local_kv_bits: int = 16,
        max_context: int | None = None,
        parallel: int = 8,
        queue: int = 256,
        adapters: Mapping[str, str | Path] | None = None,
        prompt_cache: str | Path | None = None,
        prompt_cache_bytes: int = 20 * 10**9,
        draft: str | Path | None = None,
        speculation: bool = True,
        force: bool = False,
        quiet: bool = False,
        wait: bool = True,
    ) -> None:
        for name, value, least in (
            ("max_context", max_context, 1),
            ("parallel", parallel, 1),
            ("queue", queue, 0),
            ("prompt_cache_bytes", prompt_cache_bytes, 1),
        ):
            if value is not None and value < least:
                raise OptionError(name, got=value, want=f">= {least}")
        if draft is not None and not speculation:
            raise OptionError("draft", got="speculation=False as well", want="one or the other")
        options = EngineOptions(
            dtype=dtype,
            text_only=text_only,
            kv_bits=kv_bits,
            local_kv_bits=local_kv_bits,
            max_context=max_context,
            parallel=parallel,
            queue=queue,
            adapters=adapters or {},
            prompt_cache=prompt_cache,
            prompt_cache_bytes=prompt_cache_bytes,
            draft=draft,
            speculation=speculation,
            force=force,
            quiet=quiet,
        )
        self._thread = EngineThread(source, options)
        weakref.finalize(self, self._thread.stop).atexit = False  # at exit the threads are waited for (thread.py)
        if wait:
            try:
                self._thread.wait_until_loaded()
            except BaseException:  # Ctrl-C: do not go on loading for nobody
                self._thread.stop()
                raise

    @takes(timeout="number")
    def wait_until_loaded(self, timeout: float | None = None) -> bool:
        """Wait for the model; False when it was not ready within `timeout` seconds.

        Raises:
            Gemma3Error: it could not be loaded.
        """
        return self._thread.wait_until_loaded(timeout)

    @property
    def about(self) -> About:
        """What was loaded. Waits for the model, never for an answer."""
        return self._thread.loaded.about

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's vocabulary; any thread may use it. Waits for the model."""
        return self._thread.loaded.tokenizer

    @property
    def waiting(self) -> int:
        """How many requests are in line now."""
        return self._thread.waiting

    def count_tokens(self, prompt: str | Messages, *, images: Pictures = (), **options: Unpack[OptionValues]) -> int:
        """How many tokens the prompt of such a request has. Prepared in this thread, beside answers.

        Raises:
            Gemma3Error: what `generate` would refuse of it.
        """
        said_so, pictures, loaded = snapshot.said(prompt), snapshot.pictures(images), self._thread.loaded
        settings = Options.build(options)
        messages = said(loaded, said_so, pictures, settings)
        return len(processed(loaded, messages, pictures, settings, lambda *_: None).tokens)

    def stream(self, prompt: str | Messages, *, images: Pictures = (), **options: Unpack[OptionValues]) -> Stream:
        """Start an answer and return at once. What is handed in is copied: changed afterwards, it changes nothing.

        What a prompt shares with a recent one is not processed again: send the whole message list each time.

        Args:
            prompt: a user's words, or messages as `{"role", "content"}` dicts. For a base checkpoint, or with
                raw=True, a string is the text to complete; a picture's place in it is `<start_of_image>`. A list of
                token ids is completed as it is.
            images: paths, addresses (https, http, data, file), bytes of picture files, or PIL images, or one of them;
                they stand before a string's words, or fill the picture items of the messages in order.
            options: the fields of `Options`; None is the default.

        Raises:
            OptionError: an unknown option, a value out of range, `images` that are none.
            PromptError: neither a text nor a list. All that goes wrong later is an error event.
            ClosedError: the engine was closed.
        """
        request = Request(snapshot.said(prompt), snapshot.copied(snapshot.pictures(images)), Options.build(options))
        self._thread.submit(request)
        return Stream(request, self)

    @takes(n="whole")
    def streams(
        self, prompt: str | Messages, *, n: int, images: Pictures = (), **options: Unpack[OptionValues]
    ) -> list[Stream]:
        """As `stream`, `n` answers to one prompt, which is read once.

        With a seed the first has that one, the next one more, and so on.
        """
        if n < 1:
            raise OptionError("n", got=n, want=">= 1")
        settings = Options.build(options)
        first = Request(snapshot.said(prompt), snapshot.copied(snapshot.pictures(images)), settings)
        requests = [first]
        for number in range(1, n):
            seed = None if settings.seed is None else (settings.seed + number) % 2**64
            requests.append(Request(first.prompt, first.images, replace(settings, seed=seed), like=first))
        self._thread.submit(*requests)
        return [Stream(request, self) for request in requests]

    def astream(self, prompt: str | Messages, *, images: Pictures = (), **options: Unpack[OptionValues]) -> AsyncStream:
        """As `stream`, for asyncio: `async for piece in engine.astream(…)`. Cancelling the task cancels the answer."""
        return AsyncStream(self.stream(prompt, images=images, **options))

    @overload
    def generate(
        self, prompt: str | Messages, *, images: Pictures = (), n: None = None, **options: Unpack[OptionValues]
    ) -> Reply: ...
    @overload
    def generate(
        self, prompt: str | Messages, *, images: Pictures = (), n: int, **options: Unpack[OptionValues]
    ) -> list[Reply]: ...
    @takes(n="whole")
    def generate(
        self, prompt: str | Messages, *, images: Pictures = (), n: int | None = None, **options: Unpack[OptionValues]
    ) -> Reply | list[Reply]:
        """As `stream`, and wait for the whole answer.

        Args:
            n: so many answers, as a list; see `streams`.

        Raises:
            Gemma3Error: whatever went wrong.
        """
        if n is None:
            with self.stream(prompt, images=images, **options) as stream:
                return stream.reply
        streams = self.streams(prompt, n=n, images=images, **options)
        try:
            return [stream.reply for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    @takes(limit="whole")
    def run(
        self,
        prompt: str | Messages,
        *,
        images: Pictures = (),
        limit: int = 8,
        asks: Asks | None = None,
        **options: Unpack[OptionValues],
    ) -> Reply:
        """As `generate`, and run the functions that the model asks for, until it answers in words.

        `tools` are functions with types for their arguments; a docstring says what one does. What one raises is told
        to the model.

        Args:
            limit: most answers; the last one's calls are not run any more, and stand in the reply.
            asks: called with a function's name and arguments before it runs; False forbids it.

        Raises:
            OptionError: a tool that is no function, or has an argument that JSON has nothing for.
            Gemma3Error: whatever went wrong.
        """
        from .running import run  # with what tools need: nobody else waits for it

        return run(self.generate, prompt, limit=limit, asks=asks, options={**options, "images": images})

    @takes(kind="text", dimensions="whole", normalize="switch", truncate="switch")
    def embed(
        self,
        texts: Texts,
        *,
        kind: str | None = None,
        dimensions: int | None = None,
        normalize: bool = True,
        truncate: bool = True,
    ) -> list[list[float]]:
        """The vectors of texts, of an embedding model (EmbeddingGemma), in the order of the texts.

        Args:
            texts: a text, several, or lists of token ids, which are read as they are.
            kind: the name of a prompt that is put before each text ("query", "document", …); None for the model's
                default, with EmbeddingGemma none.
            dimensions: only the first so many numbers of each vector; None for all.
            normalize: bring what was cut to length 1 again. A whole vector of EmbeddingGemma has length 1 anyway.
            truncate: cut a text that is longer than the model takes; if False it is refused.

        Returns:
            N lists of `dimensions` floats (float32 numbers).

        Raises:
            OptionError: no embedding model, no such kind or dimensions.
            ContextError, PromptError: a text, or token ids, that the model cannot read.
            ClosedError, BusyError: as `stream`.
        """
        request = self.embedding(texts, kind=kind, dimensions=dimensions, normalize=normalize, truncate=truncate)
        try:
            found: list[list[float]] = request.array().tolist()
        finally:
            request.cancel()
        return found

    @takes(kind="text", dimensions="whole", normalize="switch", truncate="switch")
    def embedding(
        self,
        texts: Texts,
        *,
        kind: str | None = None,
        dimensions: int | None = None,
        normalize: bool = True,
        truncate: bool = True,
    ) -> Embedding:
        """As `embed`, and return at once: how far it is, how many tokens there are, and the vectors as an array."""
        request = embedding(
            self._thread.loaded, texts, kind=kind, dimensions=dimensions, normalize=normalize, truncate=truncate
        )
        if request.total:
            self._thread.embed(request)
        return request

    def classify(self, image: Picture, policies: Policies = None) -> dict[str, float]:
        """How likely a picture breaks policies, by ShieldGemma 2.

        Args:
            image: a path, an address (https, http, data, file), bytes of a picture file, or a PIL image.
            policies: names of the checkpoint's own ("dangerous", "sexual", "violence"); or texts by name, None for
                the checkpoint's own text of that name; None for all its own.

        Returns:
            For each policy the probability of a violation, 0 to 1, in their order.

        Raises:
            OptionError: no classifier, an unknown policy.
            Gemma3Error: what goes wrong with the picture or an answer.
        """
        loaded = self._thread.loaded
        texts = asked(loaded, policies)
        pictures = snapshot.copied(snapshot.pictures(image))
        if len(pictures) != 1:
            raise OptionError("image", got=f"{len(pictures)} pictures", want="one")
        streams: list[Stream] = []
        try:
            for pair in requests(loaded, pictures[0], list(texts.values())):
                self._thread.submit(*pair)
                streams += [Stream(request, self) for request in pair]
            return dict(zip(texts, probabilities(streams), strict=True))
        finally:
            for stream in streams:
                stream.close()

    @takes(system="text", resume="path", adapter="text")
    def session(
        self, *, system: str | None = None, resume: str | Path | None = None, adapter: str | None = None
    ) -> Session:
        """A conversation that keeps what it has read.

        Args:
            system: said before the first turn.
            resume: a file from `Session.save`, to go on from; it knows its own system text and adapter.
            adapter: with which all its answers are written; None for the model alone, or with `resume` for its own.

        Raises:
            OptionError: a base checkpoint, an adapter that is not loaded, or both `system` and `resume`.
            SessionError: the file is damaged, or belongs to another model or adapter.
        """
        loaded = self._thread.loaded
        loaded.files_of(adapter)
        if resume is None:
            if not loaded.checkpoint.instruct:
                raise OptionError(
                    "session", got=f"{loaded.checkpoint.name}, a base checkpoint", want="one that was tuned for chat"
                )
            return Session(self, self._thread.call(lambda scheduler: scheduler.new_conversation(system, adapter)))
        if system is not None:
            raise OptionError("system", got="a text for a conversation that has begun", want="none")
        return Session(self, self._thread.call(lambda scheduler: session_file.read(resume, scheduler, adapter)))

    def stop(self) -> None:
        """As `close`, and wait for nothing."""
        self._thread.stop()

    def close(self) -> None:
        """Cancel what is in work, end the thread, free the model. Any thread, any number of times.

        With a prompt cache it takes up to 30 seconds more to write what is in memory.

        An engine that nobody holds any more closes by itself, without being waited for; at the end of the program all
        engines do, and are. Streams and sessions hold their engine.
        """
        self._thread.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Session:
    """A conversation. What is asked of it is done in the order in which it was; usable from any thread."""

    def __init__(self, engine: Engine, conversation: Conversation) -> None:
        self._engine, self._thread, self._conversation = engine, engine._thread, conversation

    def send(self, said: str | Messages, *, images: Pictures = (), **options: Unpack[OptionValues]) -> Stream:
        """Say something; the answer comes as from `Engine.stream`. A cancelled answer stays as far as it came.

        Args:
            said: words, before which the pictures stand; or the content items of one turn, `{"type", …}` dicts.
            images, options, raises: as of `Engine.stream`.
        """
        request = Request(
            snapshot.said(said), snapshot.copied(snapshot.pictures(images)), Options.build(options), self._conversation
        )
        self._thread.submit(request)
        return Stream(request, self._engine)

    def retry(self, **options: Unpack[OptionValues]) -> Stream:
        """Answer the last turn once more; the answer before is forgotten."""
        request = Request(None, [], Options.build(options), self._conversation)
        self._thread.submit(request)
        return Stream(request, self._engine)

    def undo(self) -> None:
        """Forget the last turn and its answer. To edit a turn: undo, then send. Raises PromptError without a turn."""
        self._call(lambda _: self._conversation.withdraw())

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What was said, as plain messages; a picture is an item of type image."""
        return self._call(lambda _: self._conversation.messages())

    @property
    def tokens(self) -> int:
        """Tokens of the conversation so far."""
        return self._call(lambda _: len(self._conversation.prompt()))

    @takes(path="path", replace="switch")
    def save(self, path: str | Path, *, replace: bool = True) -> None:
        """Write the conversation and its caches; `Engine.session(resume=path)` goes on from there.

        Args:
            replace: a file that this conversation was neither read from nor written to before is replaced. If False
                it is refused. One that it was read from or written to, and that changed since, always is.

        Raises:
            OutputError: the file cannot be written; what was there before stays.
        """
        self._call(lambda scheduler: session_file.write(path, self._conversation, scheduler, replace=replace))

    def _call(self, work: Callable[[Scheduler], T]) -> T:
        return self._thread.call(work, self._conversation)


def load(source: str | Path, **options: Unpack[LoadOptions]) -> Engine:
    """Load a checkpoint and start its engine. See `Engine` for the arguments and errors."""
    return Engine(source, **options)

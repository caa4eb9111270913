"""What lives in the engine's thread: the model, its tokenizer, the caches. Serves one request at a time.

Knows nothing of threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from ..checkpoint.load import load_model, open_checkpoint
from ..checkpoint.memory import this_machine
from ..checkpoint.source import Source
from ..errors import ClosedError, Gemma3Error, OptionError, PromptError
from ..generation.loop import decode, prefill
from ..prompt import messages as written
from ..prompt.processor import Processor, Prompt
from ..prompt.vocabulary import END_OF_TURN
from .answer import answer
from .aside import Unwanted, aside
from .finite import check_finite
from .fitting import check_memory
from .options import Options
from .session import Conversation
from .stream import Channel, Messages, Picture
from .timeline import FeatureCache, Timeline, Tokens, digest

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


class Request(Channel):
    """One answer that is asked for, and the channel that its events go into."""

    def __init__(
        self,
        prompt: str | Messages | None,
        images: Sequence[Picture],
        options: Options,
        conversation: Conversation | None = None,
    ) -> None:
        """prompt: None answers the last turn again. conversation: None when the prompt is all there is."""
        super().__init__()
        self.prompt, self.images, self.options, self.conversation = prompt, list(images), options, conversation


class Host:
    """Model, tokenizer, caches."""

    def __init__(self, source: Source, options: EngineOptions, closing: Callable[[], bool]) -> None:
        """Load. `closing` is asked between layers.

        Raises:
            Gemma3Error: it cannot be loaded; ClosedError when it is closing.
        """
        text_only = options.text_only
        _check_open(closing)
        self.checkpoint = open_checkpoint(source, text_only=text_only)
        self.options = options
        if not options.force:
            check_memory(
                self.checkpoint,
                dtype=options.dtype,
                kv_bits=options.kv_bits,
                local_kv_bits=options.local_kv_bits,
                max_context=options.max_context,
            )
        self.model = load_model(self.checkpoint, dtype=options.dtype, text_only=text_only, late_embedding=True)
        self.budget = this_machine().budget  # bytes
        self.new_timeline()  # refuses bits that do not fit before the weights are read
        self.model.fuse(lambda: _check_open(closing))
        self.tokenizer = self.checkpoint.tokenizer()
        self.processor = Processor(self.tokenizer, self.checkpoint.config, no_pictures=self.checkpoint.no_pictures)
        self.eos_ids = frozenset(self.checkpoint.config.eos_token_ids)  # of a completed text; see _ends
        self.features = FeatureCache()
        self.timelines: list[Timeline] = []  # the one used last stands last

    def warm_up(self) -> None:
        """Let a GPU build the kernels of a prompt and of an answer now, while nobody waits for one."""
        if self.model.ahead:
            caches = self.new_timeline().caches
            logits = prefill(self.model, [0, 0], caches)
            assert logits is not None
            sampling = Options().sampling(self.checkpoint.generation)
            for _ in decode(self.model, logits, caches, sampling=sampling, max_tokens=2):
                pass

    def about(self) -> dict[str, Any]:
        """What was loaded, in plain types."""
        config, most = self.checkpoint.config, self.options.max_context
        positions = config.text.max_position_embeddings
        return {
            "name": self.checkpoint.name,
            "instruct": self.checkpoint.instruct,
            "vision": config.vision is not None,
            "max_context": positions if most is None else min(most, positions),
            "weights_bytes": sum(array.nbytes for _, array in tree_flatten(self.model.parameters())),
            "notes": list(self.checkpoint.notes),
        }

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
        """Answer one request: its events go into its channel, the done event last.

        Whatever is raised, the next request finds everything in order: a turn that failed was not said, and caches
        that an error of unknown kind left half written are dropped.
        """
        if request.cancelled:  # before its turn came: nothing was said
            request.put(_done([], [], "cancelled", {}))
            return
        conversation = request.conversation
        before = list(conversation.exchanges) if conversation is not None else []
        last = (before[-1].said, before[-1].reply) if before else (None, "")
        used: list[Timeline] = []
        try:
            self._serve(request, used)
        except BaseException as error:
            if conversation is not None:
                conversation.exchanges[:] = before
                if before:
                    before[-1].said, before[-1].reply = last
                conversation.drop_pixels()
            if isinstance(error, Unwanted):  # cancelled before it was read: nothing was said
                request.put(_done([], [], "cancelled", {}))
                return
            if not isinstance(error, Gemma3Error):
                self._forget(used, conversation)
            raise

    def _forget(self, used: list[Timeline], conversation: Conversation | None) -> None:
        self.timelines = [timeline for timeline in self.timelines if timeline not in used]
        if conversation is not None:
            conversation.timeline = self.new_timeline()

    def _serve(self, request: Request, used: list[Timeline]) -> None:
        began, options = time.perf_counter(), request.options
        conversation = request.conversation
        pixels: dict[str, NDArray[np.float32]] = {}
        eos_ids = self._ends(request)
        if conversation is None:
            prepared = self._prepare(request)
            tokens = _tokens(prepared)
            timeline, images = self._timeline_for(tokens), prepared.image_count
            if prepared.pixels is not None:
                pixels = dict(zip(tokens.digests, prepared.pixels, strict=True))
        else:
            tokens = self._turn(conversation, request)
            timeline, images = conversation.timeline, sum(exchange.images for exchange in conversation.exchanges)
        used.append(timeline)
        encoded_before = self.features.encoded

        def encode(name: str, view: NDArray[np.float32] | None) -> mx.array:
            if request.cancelled and name not in self.features:
                raise Unwanted
            return self.features.get(self.model, name, view)

        def features(number: int) -> mx.array:
            name = tokens.digests[number]
            if conversation is None:
                return encode(name, pixels.get(name))
            return conversation.rows(name, lambda view: encode(name, view))

        prepare_seconds = time.perf_counter() - began
        events = answer(
            timeline,
            tokens,
            self.tokenizer,
            features=features,
            eos_ids=eos_ids,
            check=lambda logits: check_finite(logits, self.checkpoint),
            sampling=options.sampling(self.checkpoint.generation),
            max_tokens=options.max_tokens,
            max_context=self.options.max_context,
            stop=options.stop,
            progress=lambda done, total: request.put(
                {"kind": "pending", "stage": "prompt", "done": done, "total": total}
            ),
            cancelled=lambda: request.cancelled,
        )
        texts: list[str] = []
        ids: list[int] = []
        end: dict[str, Any] = {"finish_reason": "cancelled", "usage": {"prompt_tokens": len(tokens)}}
        try:
            for event in events:
                ids += event["tokens"]
                if event["kind"] == "text":
                    texts.append(event["text"])
                    request.put(event)
                else:
                    end = event
        except Unwanted:
            pass
        usage = end["usage"] | {
            "images": images,
            "images_encoded": self.features.encoded - encoded_before,
            "prepare_seconds": prepare_seconds,
        }
        done = _done(texts, ids, end["finish_reason"], usage)
        if conversation is not None:
            conversation.answered(ids, done["text"], eos_ids, self.tokenizer.id(END_OF_TURN))
        request.put(done)

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

    def _turn(self, conversation: Conversation, request: Request) -> Tokens:
        """The conversation with its next turn: a new one, or the last once more."""
        options = request.options
        if options.system is not None or options.raw:
            raise OptionError("system or raw", got="set for one turn", want="none: they belong to the session")
        if options.continue_final_message:
            raise OptionError(
                "continue_final_message", got="true for a turn", want="false", do="hand the messages to generate"
            )
        if request.prompt is None:
            if not conversation.exchanges:
                raise PromptError("conversation", got="no turn yet", want="one to answer again")
            conversation.exchanges[-1].said = None
        else:
            said = request.prompt
            if not isinstance(said, str) and any(isinstance(item, dict) and "role" in item for item in said):
                raise PromptError("turn", got="messages", want="words or content items", do="it knows the turns before")
            conversation.ask(said, request.images, self.tokenizer, lambda messages: self._processed(request, messages))
        return conversation.prompt(self.processor)

    def _prepare(self, request: Request) -> Prompt:
        prompt, options = request.prompt, request.options
        assert prompt is not None, "only a session answers its last turn again"
        if isinstance(prompt, str):
            if options.continue_final_message:
                raise OptionError("continue_final_message", got="a text", want="messages, the last to be gone on with")
            if self._raw(options):
                if options.system is not None:
                    raise OptionError("system", got="a text", want="none", do="completion has no turns")
                return self._processed(request, prompt)
            pictures = [{"type": "image"} for _ in request.images]
            messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}]
        else:
            if options.raw:
                raise PromptError("prompt", got="messages", want="a string", do="completion has no turns")
            messages = written.read(prompt)
            written.check_roles(messages)
        if options.system is not None:
            if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
                raise OptionError("system", got="a text beside a system message", want="one of them")
            messages = [{"role": "system", "content": options.system}, *messages]
        return self._processed(request, messages)

    def _processed(self, request: Request, prompt: str | Messages) -> Prompt:
        """The prompt with its pictures, which another thread fetches and decodes; raises Unwanted when cancelled."""
        told: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal told
            if request.cancelled:
                raise Unwanted
            event = {"kind": "pending", "stage": stage, "done": done, "total": total}
            if event != told:
                told = event
                request.put(event)

        def work() -> Prompt:
            # What users type must not act as control tokens: `<end_of_turn>` in a message does not end the turn.
            return self.processor.prepare(
                prompt,
                request.images,
                pan_and_scan=request.options.pan_and_scan,
                special=isinstance(prompt, str),
                continue_final_message=request.options.continue_final_message,
                progress=progress,
            )

        if isinstance(prompt, str) and not request.images:
            return work()
        return aside(work, lambda: not request.cancelled)

    def _ends(self, request: Request) -> frozenset[int]:
        """The tokens that end an answer: in a chat, whose turns are written here, <end_of_turn> is always one."""
        completes = request.conversation is None and isinstance(request.prompt, str) and self._raw(request.options)
        return self.eos_ids if completes else self.eos_ids | {self.tokenizer.id(END_OF_TURN)}

    def _raw(self, options: Options) -> bool:
        return not self.checkpoint.instruct if options.raw is None else options.raw


def _check_open(closing: Callable[[], bool]) -> None:
    if closing():
        raise ClosedError("engine", got="close() while it was loading", want="an open engine")


def _tokens(prepared: Prompt) -> Tokens:
    pixels = prepared.pixels if prepared.pixels is not None else ()
    return Tokens(tuple(prepared.tokens), tuple(prepared.spans), tuple(map(digest, pixels)))


def _done(texts: list[str], ids: list[int], reason: str, usage: dict[str, Any]) -> dict[str, Any]:
    """The last event. What was not come to counts as 0."""
    return {"kind": "done", "text": "".join(texts), "tokens": ids, "finish_reason": reason, "usage": _NOTHING | usage}


_NOTHING: dict[str, Any] = {
    "prompt_tokens": 0,
    "cached_tokens": 0,
    "processed_tokens": 0,
    "completion_tokens": 0,
    "prompt_seconds": 0.0,
    "first_token_seconds": 0.0,
    "answer_seconds": 0.0,
    "peak_memory_bytes": 0,
    "images": 0,
    "images_encoded": 0,
    "prepare_seconds": 0.0,
}

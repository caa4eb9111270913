"""What never changes once a model is loaded; any thread may read it at any time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NotRequired, TypedDict

from mlx.utils import tree_flatten

from ..checkpoint.adapter import AdapterFile
from ..checkpoint.fingerprint import fingerprint
from ..checkpoint.load import Checkpoint
from ..config import Config
from ..errors import OptionError, TokenizerError
from ..model.runner import Runner
from ..prompt.processor import Processor
from ..prompt.tokenizer import Tokenizer
from ..prompt.tool_calls import CALL_TOKENS, RESPONSE, START
from ..prompt.vocabulary import END_OF_TURN
from .timeline import Identity

_OPENING = 16  # tokens at a prompt's end among which a template may open a thinking part
THOUGHT = ("<unused94>", "<unused95>")  # around MedGemma's thinking part (its model card)


class About(TypedDict):
    """What was loaded, in plain types."""

    name: str
    instruct: bool  # tuned for chat
    vision: bool  # takes pictures
    dimensions: NotRequired[int]  # of an embedding model's vectors
    own_template: NotRequired[bool]  # true where turns are written by the checkpoint's own chat template
    translates: NotRequired[bool]  # true of TranslateGemma: a turn is one text or picture, with its languages
    max_context: int  # tokens of a prompt and its answer
    weights_bytes: int
    unpacked_bytes: int  # of packed weights that a CPU keeps as float32 too, because it is faster so
    adapters: list[str]  # names that an answer may ask for
    notes: list[str]  # sentences on how the checkpoint was understood, and on prompts kept on disk; often none


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What is decided when an engine is made."""

    dtype: str = "auto"
    text_only: bool = False
    kv_bits: int = 16
    local_kv_bits: int = 16
    max_context: int | None = None
    parallel: int = 8
    queue: int = 256
    adapters: Mapping[str, str | Path] = field(default_factory=dict)  # folders by name
    prompt_cache: str | Path | None = None
    prompt_cache_bytes: int = 20 * 10**9
    draft: str | Path | None = None
    speculation: bool = True
    force: bool = False
    quiet: bool = False


class Loaded:
    """A checkpoint that was loaded: its settings, its words, what there is to say of it. Holds no array.

    Only `notes` may grow.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: EngineOptions,
        runner: Runner,
        adapters: Mapping[str, AdapterFile] | None = None,
    ) -> None:
        self.checkpoint, self.options = checkpoint, options
        self.tokenizer: Tokenizer = checkpoint.tokenizer()
        self.template = template = checkpoint.template  # None: turns are written as Gemma 3 writes them
        self.processor = Processor(
            self.tokenizer, checkpoint.config, no_pictures=checkpoint.no_pictures, template=template
        )
        self.end_of_turn = self.tokenizer.id(END_OF_TURN)
        self.eos_ids = frozenset(checkpoint.config.eos_token_ids)  # of a completed text; a chat's end_of_turn too
        self.translates = template is not None and template.reads("source_lang_code")
        self.thought = self._both(*THOUGHT)  # the tokens around a thinking part, of those that have one
        called = {self._id(name) for name in CALL_TOKENS}
        functions = template is not None and template.reads(START) and None not in called
        self.form = "functiongemma" if functions else "gemma3"  # how it writes calls
        self.call_ids = frozenset(one for one in called if one is not None and functions)
        self.turn_ends = frozenset((self.end_of_turn,))  # that end an answer in a chat, beside eos_ids
        if template is not None:
            more = (RESPONSE if functions else None, template.files.tokens.get("eos_token"))
            self.turn_ends |= {found for name in more if name and (found := self._id(name)) is not None}
        positions = checkpoint.config.text.max_position_embeddings
        self.max_context = min(options.max_context or positions, positions)
        self.dtype = str(runner.dtype).removeprefix("mlx.core.")
        adapters = adapters or {}
        self._adapters = {name: adapter.fingerprint for name, adapter in adapters.items()}
        self.notes = [*checkpoint.notes, *(note for adapter in adapters.values() for note in adapter.notes)]
        self._unpacked_bytes = runner.unpacked_bytes
        self._weights_bytes = sum(array.nbytes for _, array in tree_flatten(runner.model.parameters()))
        self._weights_bytes += sum(adapter.nbytes for adapter in adapters.values()) * runner.dtype.size // 4

    def holds_too(self, draft: Runner) -> None:
        """Before anybody else knows of this: a draft model is loaded beside it."""
        self._weights_bytes += sum(array.nbytes for _, array in tree_flatten(draft.model.parameters()))
        self._unpacked_bytes += draft.unpacked_bytes

    def thinking_after(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends inside a thinking part that its template opened."""
        if self.thought is None:
            return False
        last = next((token for token in reversed(prompt[-_OPENING:]) if token in self.thought), None)
        return last == self.thought[0]

    def _id(self, name: str) -> int | None:
        try:
            return self.tokenizer.id(name)
        except TokenizerError:
            return None

    def _both(self, first: str, second: str) -> tuple[int, int] | None:
        one, other = self._id(first), self._id(second)
        return None if one is None or other is None else (one, other)

    @property
    def config(self) -> Config:
        return self.checkpoint.config

    @property
    def about(self) -> About:
        about = About(
            name=self.checkpoint.name,
            instruct=self.checkpoint.instruct,
            vision=self.config.vision is not None,
            max_context=self.max_context,
            weights_bytes=self._weights_bytes,
            unpacked_bytes=self._unpacked_bytes,
            adapters=list(self._adapters),
            notes=list(self.notes),
        )
        if self.template is not None:
            about["own_template"] = True
        if self.translates:
            about["translates"] = True
        if self.config.embedder is not None:
            about["dimensions"] = self.config.embedder.dimensions
        return about

    @cached_property
    def identity(self) -> Identity:
        """Of everything that is computed with it. Reads some of the weights' files."""
        options = self.options
        return Identity(fingerprint(self.checkpoint), None, self.dtype, options.kv_bits, options.local_kv_bits)

    def identity_with(self, adapter: str | None) -> Identity:
        """The same with an adapter; None for the model alone."""
        return self.identity if adapter is None else replace(self.identity, adapter=self.files_of(adapter))

    def adapter_of(self, fingerprint: object) -> str | None:
        """The name of the adapter with these files, where it is loaded."""
        return next((name for name, own in self._adapters.items() if own == fingerprint), None)

    def files_of(self, name: str | None) -> str | None:
        """An adapter's part of an identity; None for the model alone. Raises OptionError: it is not loaded."""
        if name is None:
            return None
        if name not in self._adapters:
            want = ", ".join(self._adapters) or "none: the model was loaded without adapters"
            do = "" if self._adapters else f"load it with adapters={{{name!r}: its folder}}"
            raise OptionError("adapter", got=repr(name), want=want, do=do)
        return self._adapters[name]

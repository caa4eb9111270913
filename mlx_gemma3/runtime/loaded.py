"""What never changes once a model is loaded; any thread may read it at any time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NotRequired, TypedDict

from mlx.utils import tree_flatten

from ..checkpoint.fingerprint import fingerprint
from ..checkpoint.load import Checkpoint
from ..config import Config
from ..model.runner import Runner
from ..prompt.processor import Processor
from ..prompt.tokenizer import Tokenizer
from ..prompt.vocabulary import END_OF_TURN
from .timeline import Identity


class About(TypedDict):
    """What was loaded, in plain types."""

    name: str
    instruct: bool  # tuned for chat
    vision: bool  # takes pictures
    dimensions: NotRequired[int]  # of an embedding model's vectors
    max_context: int  # tokens of a prompt and its answer
    weights_bytes: int
    unpacked_bytes: int  # of packed weights that a CPU keeps as float32 too, because it is faster so
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
    prompt_cache: str | Path | None = None
    prompt_cache_bytes: int = 20 * 10**9
    force: bool = False
    quiet: bool = False


class Loaded:
    """A checkpoint that was loaded: its settings, its words, what there is to say of it. Holds no array.

    Only `notes` may grow.
    """

    def __init__(self, checkpoint: Checkpoint, options: EngineOptions, runner: Runner) -> None:
        self.checkpoint, self.options = checkpoint, options
        self.tokenizer: Tokenizer = checkpoint.tokenizer()
        self.processor = Processor(self.tokenizer, checkpoint.config, no_pictures=checkpoint.no_pictures)
        self.end_of_turn = self.tokenizer.id(END_OF_TURN)
        self.eos_ids = frozenset(checkpoint.config.eos_token_ids)  # of a completed text; a chat's end_of_turn too
        positions = checkpoint.config.text.max_position_embeddings
        self.max_context = min(options.max_context or positions, positions)
        self.dtype = str(runner.dtype).removeprefix("mlx.core.")
        self.notes = list(checkpoint.notes)
        self._unpacked_bytes = runner.unpacked_bytes
        self._weights_bytes = sum(array.nbytes for _, array in tree_flatten(runner.model.parameters()))

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
            notes=list(self.notes),
        )
        if self.config.embedder is not None:
            about["dimensions"] = self.config.embedder.dimensions
        return about

    @cached_property
    def identity(self) -> Identity:
        """Of everything that is computed with it. Reads some of the weights' files."""
        options = self.options
        return Identity(fingerprint(self.checkpoint), None, self.dtype, options.kv_bits, options.local_kv_bits)

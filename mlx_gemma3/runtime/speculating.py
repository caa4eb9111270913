"""What guesses the tokens of an engine's answers: made for each answer as it begins, with what earlier ones taught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from ..checkpoint.load import load_model, open_checkpoint
from ..checkpoint.memory import GIB, loaded_bytes, this_machine
from ..checkpoint.source import resolve
from ..checkpoint.weights import open_store
from ..errors import ContextError, MemoryNeedError, OptionError
from ..generation.choice import Chooser
from ..generation.speculation import DraftModel, LookUp, Proposer, Record
from ..model.runner import Runner, on_device
from ..prompt.tokenizer import Tokenizer
from .loaded import Loaded
from .pool import Pool
from .timeline import Timeline, Tokens

SNAPSHOT_BYTES = 256 << 20  # of a draft model's timeline
POOL_BYTES = 1 << 30


class Speculation:
    """Of one engine.

    Args:
        draft: the model that guesses; None for look-up alone.
    """

    def __init__(self, loaded: Loaded, draft: Runner | None) -> None:
        self._on, self._draft = loaded.options.speculation, draft
        self._skip = () if loaded.config.vision is None else (loaded.config.image_token_id,)
        self._record = Record()
        self._pool = Pool(max(4, loaded.options.parallel), POOL_BYTES)
        self._timelines: dict[DraftModel, Timeline] = {}

    def proposers(self, prompt: Tokens, chooser: Chooser) -> Sequence[Proposer]:
        """For an answer to this prompt; `ended` when it is over."""
        if not self._on:
            return []
        found: list[Proposer] = [LookUp(prompt.ids, skip=self._skip, record=self._record)]
        if self._draft is not None and (drafting := self._drafting(self._draft, prompt, chooser)) is not None:
            found.append(drafting)
        return found

    def ended(self, proposers: Sequence[Proposer], written: Sequence[int]) -> None:
        """The answer is over: what the draft model has read is kept for the next prompt that begins alike."""
        for proposer in proposers:
            if isinstance(proposer, DraftModel) and (timeline := self._timelines.pop(proposer, None)) is not None:
                timeline.wrote(tuple(written))
                self._pool.put(timeline)

    def _drafting(self, runner: Runner, prompt: Tokens, chooser: Chooser) -> DraftModel | None:
        """None where the prompt is longer than the draft model's context. Pictures are left out of what it reads."""
        inside = {at for start, stop in prompt.spans for at in range(start, stop)}
        tokens = Tokens(tuple(token for at, token in enumerate(prompt.ids) if at not in inside))
        timeline, _ = self._pool.best(tokens, None)
        if timeline is None:
            timeline = Timeline(runner, runner.make_caches(), snapshot_bytes=SNAPSHOT_BYTES)
        else:
            self._pool.take(timeline)
        try:
            timeline.open(tokens)
        except ContextError:
            return None
        own = timeline

        def read() -> bool:
            own.read_chunk(_no_picture)
            return own.logits is None

        found = DraftModel(runner, own.caches, chooser, read if own.logits is None else None)
        self._timelines[found] = own
        return found


def load_draft(source: str | Path, loaded: Loaded, closing: Callable[[], None], *, target_bytes: int) -> Runner:
    """The model that guesses for another one.

    Args:
        closing: called between layers.
        target_bytes: of the other's weights.

    Raises:
        Gemma3Error: it cannot be loaded.
        OptionError: another vocabulary, or no model that writes.
        MemoryNeedError: the weights of both do not fit.
    """
    options = loaded.options
    checkpoint = open_checkpoint(resolve(source, text_only=True, quiet=options.quiet), text_only=True)
    if checkpoint.config.embedder is not None:
        raise OptionError("draft", got=f"{checkpoint.name}, an embedding model", want="one that writes")
    if not same_vocabulary(loaded.tokenizer, checkpoint.tokenizer()):
        raise OptionError(
            "draft", got=f"{checkpoint.name}, which has another vocabulary", want=f"that of {loaded.checkpoint.name}"
        )
    machine = this_machine()
    dtype_bytes = {"float32": 4, "bfloat16": 2}.get(options.dtype, machine.dtype_bytes)
    need = target_bytes + loaded_bytes(open_store(checkpoint).entries, dtype_bytes=dtype_bytes)
    if need > machine.budget and not options.force:
        raise MemoryNeedError(
            f"{loaded.checkpoint.name} with {checkpoint.name} as its draft",
            got=f"{need / GIB:.1f} GiB of weights",
            want=f"at most {machine.budget / GIB:.1f} GiB, what this machine has for them",
            do="take a smaller draft, or none; --force tries all the same",
        )
    return on_device(load_model(checkpoint, dtype=options.dtype, text_only=True, late_embedding=True), closing)


def same_vocabulary(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether an id means the same in both, as far as the smaller goes: a model that sees has one id more."""
    count = min(one.vocab_size, other.vocab_size)
    return abs(one.vocab_size - other.vocab_size) < 64 and all(one.piece(id) == other.piece(id) for id in range(count))


def _no_picture(number: int) -> mx.array:
    raise AssertionError(number)

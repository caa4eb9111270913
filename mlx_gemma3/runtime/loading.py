"""From a source to what an engine's thread works with."""

from __future__ import annotations

from collections.abc import Callable

from ..checkpoint.load import load_model, open_checkpoint
from ..checkpoint.memory import this_machine
from ..checkpoint.source import Source
from ..errors import ClosedError
from ..generation.batch import decode
from ..generation.prefill import prefill
from ..model.runner import Runner, on_device
from .fitting import check_memory
from .loaded import EngineOptions, Loaded
from .options import Options


def load(source: Source, options: EngineOptions, closing: Callable[[], bool]) -> tuple[Loaded, Runner, int]:
    """The model on this device, and the bytes that everything may take together.

    Args:
        closing: asked between layers.

    Raises:
        Gemma3Error: it cannot be loaded; ClosedError when it is closing.
    """
    _check_open(closing)
    checkpoint = open_checkpoint(source, text_only=options.text_only)
    if not options.force:
        check_memory(
            checkpoint,
            dtype=options.dtype,
            kv_bits=options.kv_bits,
            local_kv_bits=options.local_kv_bits,
            max_context=options.max_context,
        )
    model = load_model(checkpoint, dtype=options.dtype, text_only=options.text_only, late_embedding=True)
    # Refuses bits that do not fit before the weights are read.
    model.make_caches(kv_bits=options.kv_bits, local_kv_bits=options.local_kv_bits)
    runner = on_device(model, lambda: _check_open(closing))
    return Loaded(checkpoint, options, runner), runner, this_machine().budget


def warm_up(loaded: Loaded, runner: Runner) -> None:
    """Let a GPU build the kernels of a prompt and of an answer now, while nobody waits for one."""
    if runner.ahead:
        caches = runner.make_caches(kv_bits=loaded.options.kv_bits, local_kv_bits=loaded.options.local_kv_bits)
        logits = prefill(runner, [0, 0], caches)
        sampling = Options().sampling(loaded.checkpoint.generation)
        for _ in decode(runner, logits, caches, sampling=sampling, max_tokens=2):
            pass


def _check_open(closing: Callable[[], bool]) -> None:
    if closing():
        raise ClosedError("engine", got="close() while it was loading", want="an open engine")

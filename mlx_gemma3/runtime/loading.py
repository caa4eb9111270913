"""From a source to what an engine's thread works with."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..checkpoint.adapter import read_adapter
from ..checkpoint.load import load_model, open_checkpoint
from ..checkpoint.memory import cache_bytes, this_machine
from ..checkpoint.source import Source
from ..errors import ClosedError, OptionError
from ..generation.batch import decode
from ..generation.prefill import prefill
from ..model.device import WORK_BYTES, bound_freed, release
from ..model.runner import Runner, on_device
from .fitting import USUAL_CONTEXT, check_memory
from .loaded import EngineOptions, Loaded
from .options import Options
from .speculating import load_draft

WARM_TOKENS = 64  # of a prompt: Metal multiplies one to eight rows by other kernels than many


def load(
    source: Source, options: EngineOptions, closing: Callable[[], bool]
) -> tuple[Loaded, Runner, int, Runner | None]:
    """The model on this device, the bytes that everything may take together, and the draft model.

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
    if options.adapters and checkpoint.config.embedder is not None:
        do = "melt one in: mlx-gemma3 convert --adapter"
        raise OptionError("adapters", got="an embedding model", want="one that writes", do=do)
    adapters = {
        name: read_adapter(path, checkpoint.config, model=checkpoint.name, text_only=checkpoint.text_only)
        for name, path in options.adapters.items()
    }
    model = load_model(checkpoint, dtype=options.dtype, text_only=options.text_only, late_embedding=True)
    # Refuses bits that do not fit before the weights are read.
    model.make_caches(kv_bits=options.kv_bits, local_kv_bits=options.local_kv_bits)
    runner = on_device(model, lambda: _check_open(closing))
    for name, adapter in adapters.items():
        _check_open(closing)
        runner.add_adapter(name, adapter.matrices)
    release()
    budget = this_machine().budget
    bound_freed(budget)
    loaded, draft = Loaded(checkpoint, options, runner, adapters), None
    if options.draft is not None and checkpoint.config.embedder is None:
        weights = loaded.about["weights_bytes"]
        draft = load_draft(options.draft, loaded, lambda: _check_open(closing), target_bytes=weights)
        loaded.holds_too(draft)
    return loaded, runner, budget, draft


def wired_bytes(loaded: Loaded, runner: Runner) -> int:
    """What is to stay resident while the engine lives: weights, caches of a usual conversation, room to work."""
    options = loaded.options
    context = min(loaded.max_context, USUAL_CONTEXT)
    caches = cache_bytes(
        loaded.config,
        context,
        kv_bits=options.kv_bits,
        local_kv_bits=options.local_kv_bits,
        dtype_bytes=runner.dtype.size,
    )
    return loaded.about["weights_bytes"] + sum(caches) + WORK_BYTES


def warm_up(loaded: Loaded, runner: Runner) -> None:
    """Let a GPU build the kernels of a prompt, of a picture and of an answer now, while nobody waits for one."""
    if runner.ahead and loaded.config.embedder is not None:
        mx.eval(runner.vectors([[0] * WARM_TOKENS]))
        release()
    elif runner.ahead:
        if (vision := loaded.config.vision) is not None:
            mx.eval(runner.encode_images(mx.zeros((1, vision.image_size, vision.image_size, 3))))
        caches = runner.make_caches(kv_bits=loaded.options.kv_bits, local_kv_bits=loaded.options.local_kv_bits)
        logits = prefill(runner, [0] * WARM_TOKENS, caches)
        sampling = Options().sampling(loaded.checkpoint.generation)
        for _ in decode(runner, logits, caches, sampling=sampling, max_tokens=2):
            pass
        release()


def _check_open(closing: Callable[[], bool]) -> None:
    if closing():
        raise ClosedError("engine", got="close() while it was loading", want="an open engine")

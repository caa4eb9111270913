"""From a source to what an engine's thread works with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import sleep

import mlx.core as mx

from ..checkpoint.adapter import AdapterFile, read_adapter
from ..checkpoint.load import Checkpoint, load_model, open_checkpoint
from ..checkpoint.memory import cache_bytes, share_of, this_machine
from ..checkpoint.source import Source, resolve
from ..errors import ClosedError, DeviceLost, Gemma3Error, OptionError
from ..generation.batch import decode
from ..generation.prefill import prefill
from ..model.adapter import own_terms
from ..model.device import WORK_BYTES, bound_freed, release
from ..model.runner import Runner, on_device
from ..model.shard import WHOLE, Shard, check_machines
from .fitting import USUAL_CONTEXT, check_memory
from .follow import Follower, LeadingRunner
from .loaded import EngineOptions, Loaded
from .machines import REST, Machines, current, plain_options
from .options import Options
from .speculating import load_draft

WARM_TOKENS = 64  # of a prompt: Metal multiplies one to eight rows by other kernels than many


@dataclass(frozen=True)
class Opened:
    """A checkpoint that was looked at, and found to fit; its weights are not read yet."""

    checkpoint: Checkpoint
    options: EngineOptions
    adapters: Mapping[str, AdapterFile]


def load(
    source: Source,
    options: EngineOptions,
    closing: Callable[[], bool] = lambda: False,
    lost: Callable[[Gemma3Error], None] = lambda error: None,
) -> tuple[Loaded, Runner, int, Runner | None]:
    """The model on this device, or on this and the others; the bytes that all here may take; the draft model.

    Args:
        closing: asked between layers.
        lost: told in another thread of machines that are gone, while this thread may hang.

    Raises:
        Gemma3Error: it cannot be loaded; ClosedError when it is closing.
    """
    opened, runner = load_runner(source, options, closing, lost)
    loaded, draft = Loaded(opened.checkpoint, options, runner, opened.adapters), None
    if options.draft is not None and opened.checkpoint.config.embedder is None:
        weights = loaded.about["weights_bytes"]

        def between() -> None:
            _check_open(closing)
            runner.beat()  # other machines, which have no draft model, wait meanwhile

        draft = load_draft(options.draft, loaded, between, target_bytes=weights)
        loaded.holds_too(draft)
    return loaded, runner, this_machine().budget, draft


def load_runner(
    source: Source,
    options: EngineOptions,
    closing: Callable[[], bool] = lambda: False,
    lost: Callable[[Gemma3Error], None] = lambda error: None,
) -> tuple[Opened, Runner]:
    """As `load`, without what never changes; who asks closes the runner."""
    _check_open(closing)
    machines = current()
    if machines is None:
        opened = _open(source, options)
        runner = _read(opened, lambda: _check_open(closing))
    else:
        opened, runner = _lead(machines, source, options, closing, lost)
    release()
    bound_freed(this_machine().budget)
    return opened, runner


def _lead(
    machines: Machines,
    source: Source,
    options: EngineOptions,
    closing: Callable[[], bool],
    lost: Callable[[Gemma3Error], None],
) -> tuple[Opened, Runner]:
    """On the first of several machines."""

    def between() -> None:
        _check_open(closing)
        machines.barrier()

    machines.begin(source.name, plain_options(options), lost)
    try:
        opened = machines.agree(lambda: _open(source, options, machines.size))
    except BaseException:  # the others know it too
        machines.end()
        raise
    try:
        with machines.loading():
            runner = _read(opened, between, machines.shard, LeadingRunner)
            machines.barrier()
    except BaseException as error:
        machines.lose(error)
        machines.end()
        raise
    assert isinstance(runner, LeadingRunner)
    runner.lead(machines.log, REST, machines.lose, machines.end)
    return opened, runner


def follow(machines: Machines, tell: Callable[[str], None]) -> None:
    """On the other machines: load what the first one loads, and take part in what it computes, until it ends.

    Args:
        tell: takes a sentence for the user.

    Raises:
        DeviceLost: a machine is gone.
    """
    try:
        while (command := machines.log.read())[0] != "quit":
            if command[0] == "load":
                _follow_one(machines, command[1], EngineOptions(**command[2]), tell)
                release()
            else:  # a beat
                sleep(command[1])
        machines.part()
    except RuntimeError as error:
        raise machines.lose(error) from None


def _follow_one(machines: Machines, name: str, options: EngineOptions, tell: Callable[[str], None]) -> None:
    def opened() -> Opened:
        return _open(resolve(name, text_only=options.text_only, quiet=True), options, machines.size)

    try:
        found = machines.agree(opened)
    except DeviceLost:  # another machine says what is wrong
        return
    except Gemma3Error as error:
        tell(f"machine {machines.rank + 1} of {machines.size}: {error}")
        return
    with machines.loading():
        runner = _read(found, machines.barrier, machines.shard)
        machines.barrier()
    release()
    bound_freed(this_machine().budget)
    Follower(runner, machines.log).follow()


def _open(source: Source, options: EngineOptions, machines: int = 1) -> Opened:
    """
    Args:
        machines: that share the model; each asks whether its part fits.
    """
    checkpoint = open_checkpoint(source, text_only=options.text_only)
    check_machines(checkpoint.config, machines)
    if machines > 1 and checkpoint.config.embedder is not None:
        do = "one machine is enough for it"
        raise OptionError("several machines", got="an embedding model", want="one that writes", do=do)
    if not options.force:
        check_memory(
            checkpoint,
            dtype=options.dtype,
            kv_bits=options.kv_bits,
            local_kv_bits=options.local_kv_bits,
            max_context=options.max_context,
            machines=machines,
        )
    if options.adapters and checkpoint.config.embedder is not None:
        do = "melt one in: mlx-gemma3 convert --adapter"
        raise OptionError("adapters", got="an embedding model", want="one that writes", do=do)
    adapters = {
        name: read_adapter(path, checkpoint.config, model=checkpoint.name, text_only=checkpoint.text_only)
        for name, path in options.adapters.items()
    }
    return Opened(checkpoint, options, adapters)


def _read(
    opened: Opened, between: Callable[[], None], shard: Shard = WHOLE, kind: Callable[..., Runner] = Runner
) -> Runner:
    """The weights, on this device."""
    checkpoint, options = opened.checkpoint, opened.options
    model = load_model(checkpoint, dtype=options.dtype, text_only=options.text_only, late_embedding=True, shard=shard)
    # Refuses bits that do not fit before the weights are read.
    model.make_caches(kv_bits=options.kv_bits, local_kv_bits=options.local_kv_bits)
    runner = on_device(model, between, kind)
    for name, adapter in opened.adapters.items():
        between()
        runner.add_adapter(name, own_terms(adapter.matrices, checkpoint.config.text, shard))
    return runner


def wired_bytes(loaded: Loaded, runner: Runner) -> int:
    """What is to stay resident while the engine lives: weights, caches of a usual conversation, room to work."""
    options = loaded.options
    context = min(loaded.max_context, USUAL_CONTEXT)
    caches = cache_bytes(
        share_of(loaded.config, runner.shard.size),
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

"""Measures a model on this machine: load, prompts, decoding at several depths, pictures, sampling. Knows no words.

Prompts are random ids, so nothing is measured that depends on a tokenizer, and decoding never ends early. Every
figure is repeated after one run that is not counted.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.load import Checkpoint, open_checkpoint
from ..checkpoint.memory import share_of, share_of_entries
from ..checkpoint.published import size_of
from ..checkpoint.source import resolve
from ..checkpoint.weights import open_store
from ..errors import OptionError
from ..generation.batch import Batch, Row
from ..generation.choice import Chooser, choose
from ..generation.prefill import prefill
from ..generation.sampling import Sampling
from ..model.cache import KV_BITS, KV_GROUP, SLACK
from ..model.runner import Runner
from ..runtime.loaded import EngineOptions
from ..runtime.loading import load_runner
from .machine import machine
from .roofline import Bandwidth, bandwidth, step_kv_bytes, step_weight_bytes

PROMPTS = (512,)
CONTEXTS = (512, 4096)
SAMPLINGS = {
    "greedy": Sampling(temperature=0),
    "top-k 64, top-p 0.95": Sampling(seed=0),
    "min-p 0.05": Sampling(top_k=0, top_p=1, min_p=0.05, seed=0),
}
_DRAWS = 20  # tokens that are sampled for one figure
Progress = Callable[[str, int, int], None]  # what is measured, figures done, figures in all


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Raises:
        OptionError: a count below 1 (pictures: below 0), or bits that caches do not come in.
    """

    prompts: tuple[int, ...] | None = None  # tokens; None for those of PROMPTS that the model has positions for
    contexts: tuple[int, ...] | None = None  # tokens in the caches when decoding begins; None likewise for CONTEXTS
    tokens: int = 64  # decoded at each depth, a run
    batch: int = 1  # rows that are decoded together
    images: int | None = None  # pictures through tower and projector; None for one where the checkpoint sees
    kv_bits: int = 16
    repeat: int = 3

    def __post_init__(self) -> None:
        for name, values in (("prompt tokens", self.prompts), ("context", self.contexts)):
            if values is not None and (not values or min(values) < 1):
                raise OptionError(name, got=list(values), want="one number >= 1 at least, and none below")
        for name, value, least in (
            ("tokens", self.tokens, 1),
            ("batch", self.batch, 1),
            ("images", 0 if self.images is None else self.images, 0),
            ("repeat", self.repeat, 1),
        ):
            if value < least:
                raise OptionError(name, got=value, want=f">= {least}")
        if self.kv_bits not in KV_BITS:
            raise OptionError("kv bits", got=self.kv_bits, want="16, 8 or 4")

    def fitted(self, checkpoint: Checkpoint) -> Plan:
        """With every value set, and refused where this checkpoint does not have it.

        Raises:
            OptionError: more tokens than positions, pictures for a checkpoint that sees none, a head_dim that cannot
                be packed.
        """
        config, text = checkpoint.config, checkpoint.config.text
        limit = text.max_position_embeddings
        room = limit - self.tokens - 1  # the step that is issued ahead counts
        if room < 1:
            raise OptionError("tokens", got=self.tokens, want=f"at most {limit - 2}, the model has {limit} positions")
        prompts = self.prompts or tuple(size for size in PROMPTS if size <= limit) or (limit // 2,)
        contexts = self.contexts or tuple(size for size in CONTEXTS if size <= room) or (min(room, limit // 2),)
        for name, values, most in (("prompt tokens", prompts, limit), ("context", contexts, room)):
            if max(values) > most:
                raise OptionError(name, got=max(values), want=f"at most {most} here, the model has {limit} positions")
        if self.kv_bits != 16 and text.head_dim % KV_GROUP:
            raise OptionError(
                "kv bits", got=self.kv_bits, want=f"16, since head_dim {text.head_dim} is no multiple of {KV_GROUP}"
            )
        sees = config.vision is not None
        if self.images and not sees:
            raise OptionError("images", got=self.images, want="0", do="this checkpoint is text-only")
        images = int(sees) if self.images is None else self.images
        return replace(self, prompts=prompts, contexts=contexts, images=images)


@dataclass(frozen=True)
class Spread:
    """One figure, several times."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class PromptFigures:
    """One prompt, read into empty caches."""

    tokens: int
    tokens_per_second: Spread
    first_token_seconds: Spread  # from the prompt's ids to the first id of the answer, greedy
    peak_memory: int  # bytes, weights included


@dataclass(frozen=True)
class DecodeFigures:
    """Greedy decoding on from one depth."""

    context: int
    tokens_per_second: Spread  # of all rows of the batch together
    weight_bytes: int  # that one step reads
    kv_bytes: int  # and of keys and values, for all rows, in the middle of the run
    bandwidth_share: float  # those bytes, times the steps a second, of what the machine can read
    peak_memory: int


@dataclass(frozen=True)
class PictureFigures:
    """Pictures through the tower and the projector."""

    count: int
    seconds: Spread  # for all of them
    peak_memory: int


@dataclass(frozen=True)
class Benchmark:
    """All that was measured, and where."""

    model: str
    size: str | None  # "4B", where it is a published size
    dtype: str  # of the activations
    versions: dict[str, str]
    platform: str
    machine: dict[str, Any]  # measure.machine.machine, with this model's attention
    bandwidth: Bandwidth
    plan: Plan
    load_seconds: float
    weights: int  # bytes in memory once loaded
    prompts: tuple[PromptFigures, ...]
    decoding: tuple[DecodeFigures, ...]
    pictures: PictureFigures | None
    sampling: dict[str, Spread]  # milliseconds a token
    notes: tuple[str, ...] = ()  # of the checkpoint

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    source: str | Path,
    plan: Plan,
    *,
    dtype: str = "auto",
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Benchmark:
    """Load a checkpoint and measure what the plan says.

    Raises:
        OptionError: what the plan wants and the checkpoint does not have.
        SourceError, ConfigError, CheckpointError, MemoryNeedError: as loading does.
    """
    progress("loading", 0, 0)
    text_only = plan.images == 0
    found = resolve(source, text_only=text_only, quiet=True)
    checkpoint = open_checkpoint(found, text_only=text_only)
    plan = plan.fitted(checkpoint)
    assert plan.prompts is not None and plan.contexts is not None and plan.images is not None
    context = max(*plan.prompts, max(plan.contexts) + plan.tokens)
    options = EngineOptions(dtype=dtype, text_only=text_only, kv_bits=plan.kv_bits, max_context=context, force=force)
    began = time.perf_counter()
    _, runner = load_runner(found, options)
    load_seconds = time.perf_counter() - began
    weights = mx.get_active_memory()
    speed = bandwidth()
    total, done = len(plan.prompts) + len(plan.contexts) + bool(plan.images) + 1, 0

    def step(what: str) -> None:
        nonlocal done
        progress(what, done, total)
        runner.beat()
        done += 1

    prompts, decoding, pictures = [], [], None
    for size in plan.prompts:
        step(f"prompt of {size:,} tokens")
        prompts.append(measure_prompt(runner, size, kv_bits=plan.kv_bits, repeat=plan.repeat))
    for depth in plan.contexts:
        step(f"decoding after {depth:,} tokens")
        decoding.append(_measure_depth(runner, checkpoint, depth, plan, speed))
    if plan.images:
        step("pictures")
        pictures = measure_pictures(runner, plan.images, repeat=plan.repeat)
    step("sampling")
    vocabulary = checkpoint.config.text.vocab_size
    result = Benchmark(
        model=checkpoint.name,
        size=size_of(checkpoint.config),
        dtype=str(runner.dtype).removeprefix("mlx.core."),
        versions={name: version(name) for name in ("mlx-gemma3", "mlx")},
        platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        machine=machine(checkpoint.config, dtype_bytes=runner.dtype.size, kv_bits=plan.kv_bits),
        bandwidth=speed,
        plan=plan,
        load_seconds=load_seconds,
        weights=weights,
        prompts=tuple(prompts),
        decoding=tuple(decoding),
        pictures=pictures,
        sampling={how: measure_sampling(vocabulary, kind, repeat=plan.repeat) for how, kind in SAMPLINGS.items()},
        notes=checkpoint.notes,
    )
    runner.close()
    return result


def measure_prompt(runner: Runner, size: int, *, kv_bits: int = 16, repeat: int = 3) -> PromptFigures:
    """Read `size` random tokens and choose one more."""
    speeds, firsts, peak = [], [], 0
    for run in range(repeat + 1):
        caches = runner.make_caches(kv_bits=kv_bits)
        ids = random_ids(runner, size)[0].tolist()
        mx.reset_peak_memory()
        began = time.perf_counter()
        logits = prefill(runner, ids, caches)
        read = time.perf_counter()
        choose(logits, [Chooser(SAMPLINGS["greedy"])]).read()
        chosen = time.perf_counter()
        if run:
            speeds.append(size / (read - began))
            firsts.append(chosen - began)
            peak = max(peak, mx.get_peak_memory())
        del caches, logits
    return PromptFigures(size, Spread.of(speeds), Spread.of(firsts), peak)


def _measure_depth(runner: Runner, checkpoint: Checkpoint, depth: int, plan: Plan, speed: Bandwidth) -> DecodeFigures:
    rates, peak = measure_decoding(
        runner, depth, tokens=plan.tokens, batch=plan.batch, kv_bits=plan.kv_bits, repeat=plan.repeat
    )
    machines, size = runner.shard.size, runner.dtype.size
    config = share_of(checkpoint.config, machines)
    entries = share_of_entries(open_store(checkpoint).entries, checkpoint.config, machines)
    if runner.unpacked_bytes:  # what a step reads then
        entries = [replace(entry, packing=None) for entry in entries]
    weights = step_weight_bytes(entries, config, batch=plan.batch, dtype_bytes=size)
    middle = depth + plan.tokens // 2
    kv = plan.batch * step_kv_bytes(config, middle, kv_bits=plan.kv_bits, dtype_bytes=size)
    share = (weights + kv) * (rates.median / plan.batch) / speed.bytes_per_second
    return DecodeFigures(depth, rates, weights, kv, share, peak)


def measure_decoding(
    runner: Runner, depth: int, *, tokens: int, batch: int = 1, kv_bits: int = 16, repeat: int = 3
) -> tuple[Spread, int]:
    """Decode `tokens` greedily after `depth` random ones, again and again from there.

    Returns:
        tokens a second of all rows together, and the peak of memory in bytes.
    """
    rows = []
    for ids in random_ids(runner, depth, batch):
        caches = runner.make_caches(kv_bits=kv_bits)
        logits = prefill(runner, ids.tolist(), caches)
        if tokens > min(runner.config.text.sliding_window, SLACK):  # local layers cannot go back so far by themselves
            caches.take_snapshot(budget=1 << 62)
        rows.append((caches, logits))
    rates, peak = [], 0
    for run in range(repeat + 1):
        mx.reset_peak_memory()
        steps = tokens if run else min(tokens, 4)
        writers = Batch(runner)
        for caches, logits in rows:
            writers.join(Row(caches, Chooser(SAMPLINGS["greedy"]), steps + 1), logits)
        writers.next()  # the tokens after the prompts: their step is already done
        began = time.perf_counter()
        for _ in range(steps):
            writers.next()
        took = time.perf_counter() - began
        if run:
            rates.append(steps * batch / took)
            peak = max(peak, mx.get_peak_memory())
        for caches, _ in rows:
            caches.rewind(depth)
    return Spread.of(rates), peak


def measure_pictures(runner: Runner, count: int, *, repeat: int = 3) -> PictureFigures:
    """Encode `count` pictures of noise."""
    assert runner.config.vision is not None
    size = runner.config.vision.image_size
    pixels = np.random.default_rng(0).uniform(-1, 1, (count, size, size, 3)).astype(np.float32)
    seconds, peak = [], 0
    for run in range(repeat + 1):
        mx.reset_peak_memory()
        began = time.perf_counter()
        mx.eval(runner.encode_images(pixels))
        if run:
            seconds.append(time.perf_counter() - began)
            peak = max(peak, mx.get_peak_memory())
    return PictureFigures(count, Spread.of(seconds), peak)


def measure_sampling(vocabulary: int, sampling: Sampling, *, repeat: int = 3) -> Spread:
    """Milliseconds to choose one token from random logits of this many ids, read on the host each time."""
    logits = mx.random.normal((1, vocabulary), key=mx.random.key(0)) * 4
    chooser = Chooser(sampling)
    mx.eval(logits)
    rates = []
    for run in range(repeat + 1):
        began = time.perf_counter()
        for _ in range(_DRAWS):
            choose(logits, [chooser]).read()
        if run:
            rates.append((time.perf_counter() - began) / _DRAWS * 1000)
    return Spread.of(rates)


def random_ids(runner: Runner, length: int, batch: int = 1) -> np.ndarray:
    """(B, L) int32, no image tokens among them: those need pictures."""
    ids = np.random.default_rng(length).integers(0, runner.config.text.vocab_size, (batch, length))
    return np.where(ids == runner.config.image_token_id, 0, ids).astype(np.int32)

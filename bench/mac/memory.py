"""What stays in memory, what is given back, what is wired, and whether `fit` predicts the peak."""

from __future__ import annotations

import mlx.core as mx

import mlx_gemma3 as g3
from mlx_gemma3.checkpoint.load import open_checkpoint
from mlx_gemma3.checkpoint.memory import OVERHEAD, estimate, loaded_bytes, this_machine
from mlx_gemma3.checkpoint.source import resolve
from mlx_gemma3.checkpoint.weights import open_store
from mlx_gemma3.generation.prefill import prefill
from mlx_gemma3.measure.benchmark import random_ids
from mlx_gemma3.model.device import FREED_SHARE, may_wire, most_wired

from .here import REAL, metal, need_real
from .judge import Report, Skipped
from .right import runner

MIB = 1 << 20
LEFT = 64  # MiB of freed buffers that may be there after an answer: those of its last tokens
ANSWER = 8


def contexts(report: Report) -> tuple[int, ...]:
    return (2048,) if report.settings.quick or not metal() else (2048, 8192, 32_000)


def freed_buffers(report: Report) -> None:
    """An engine bounds them at an eighth of its memory, and gives them back after a long prompt."""
    need_real()
    with g3.load(REAL) as engine:
        budget = this_machine().budget
        limit = mx.set_cache_limit(0)
        mx.set_cache_limit(limit)
        report.note(f"the limit: {limit / MIB:,.0f} MiB")
        report.expect(limit == budget // FREED_SHARE, "the cache limit", got=limit, want=budget // FREED_SHARE)
        for length in contexts(report):
            text = " ".join(f"w{number}" for number in range(length // 3))
            tokens = engine.count_tokens(text, raw=True)
            engine.generate(text, raw=True, max_tokens=ANSWER, temperature=0.0)
            held = mx.get_cache_memory() / MIB
            report.at_most(f"freed buffers after {tokens:,} tokens", held, LEFT, "MiB")


def peak_memory(report: Report) -> None:
    """The largest that MLX held while a prompt was read, beside what `fit` says of it; `fit` is on the upper side."""
    need_real()
    checkpoint = open_checkpoint(resolve(REAL, quiet=True))
    here = this_machine()
    made = runner(REAL, "auto")
    weights = loaded_bytes(open_store(checkpoint).entries, dtype_bytes=made.dtype.size)
    for context in contexts(report):
        need = estimate(
            made.config, weights, context=context, dtype_bytes=made.dtype.size, fused=here.metal, unfused=here.unfused
        )
        predicted = (need.total - OVERHEAD) / MIB
        mx.clear_cache()
        mx.reset_peak_memory()
        caches = made.make_caches()
        mx.eval(prefill(made, random_ids(made, context)[0].tolist(), caches))
        got = mx.get_peak_memory() / MIB
        del caches
        report.at_most(f"peak of {context:,} tokens", got, predicted, "MiB")
        report.note(f"    {got / predicted:.0%} of what fit predicts; weights {need.weights / MIB:,.0f} MiB")


def wired(report: Report) -> None:
    """An engine wires memory while it lives, no more than allowed, and the limit that was there comes back."""
    if not may_wire():
        raise Skipped("wiring needs Metal and macOS 15")
    need_real()
    before = wired_limit()
    with g3.load(REAL) as engine:
        engine.generate("The", raw=True, max_tokens=1)
        during = wired_limit()
    after = wired_limit()
    least = min(most_wired(), engine.about["weights_bytes"])
    report.note(f"{before / MIB:,.0f} MiB before, {during / MIB:,.0f} while an engine lives, {after / MIB:,.0f} after")
    report.expect(least <= during <= most_wired(), "wired", got=during, want=f"{least} to {most_wired()}")
    report.expect(after == before, "wired after close", got=after, want=before)


def wired_limit() -> int:
    """Metal's, which MLX only tells when it is set."""
    limit = mx.set_wired_limit(0)
    mx.set_wired_limit(limit)
    return int(limit)

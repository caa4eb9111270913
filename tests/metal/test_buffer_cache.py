"""Freed buffers that MLX keeps on Metal: how many bytes of them lie dead while a long prompt is read and answered.

The allocations of gemma-3-4b (4 bits) are traced and replayed by MLX's own rule (buffer_cache.py). What the package
does about it: `mx.clear_cache()` after each chunk of a prompt and each 256 tokens, and a limit of an eighth of the
budget.
"""

from __future__ import annotations

import mlx.core as mx
import pytest
from buffer_cache import PAGE, Allocator, Event, events, replay
from metal_models import empty_model, gpu_runner, weight_bytes
from metal_trace import Spec, Trace, without_storage

from mlx_gemma3.checkpoint.memory import other_mac
from mlx_gemma3.checkpoint.published import SIZES
from mlx_gemma3.model.cache import Caches

PROMPT, ANSWER, CLEARED = 16_384, 2_000, 256  # tokens
BUDGET = other_mac(16).budget
SHARE = BUDGET // 8
UNLIMITED = BUDGET * 3 // 2  # what MLX sets at most
Run = tuple[list[Event], int, bool]  # what a graph asks for, how many times, and whether the cache is cleared then


@pytest.fixture(scope="module", params=[512, 1024])
def traced(request: pytest.FixtureRequest) -> tuple[int, int, list[Run]]:
    """Bytes of the weights, bytes of the caches in the end, and the whole answer; by tokens of a chunk."""
    chunk, runs = request.param, list[Run]()
    with Trace() as trace:
        model = empty_model(SIZES["4B"])
        runner = gpu_runner(model)
        caches = runner.make_caches()
        for _ in range(PROMPT // chunk):
            logits = runner.head(runner.read([[5] * chunk], None, caches, last_only=True))
            runs.append((events(trace.graph(caches.arrays, logits), caches=len(caches.arrays)), 1, True))
            forget(caches)
        for written in range(0, ANSWER, CLEARED):
            count = min(CLEARED, ANSWER - written)
            for times in (1, count - 1):  # the first may find a full buffer, and moves it
                logits = runner.step(mx.array([3]), [caches])
                made = events(trace.graph(caches.arrays, logits), caches=len(caches.arrays))
                runs.append((made, times, times > 1 and count == CLEARED))
                forget(caches)
            for layer in caches:
                layer.offset += count - 2
    return weight_bytes(model), caches.nbytes, runs


def forget(caches: Caches) -> None:
    """The same caches as if they were computed."""
    for layer in caches:
        layer.parts = [without_storage(Spec(tuple(part.shape), part.dtype)) for part in layer.parts]
        mx.eval(layer.parts)


def run(traced: tuple[int, int, list[Run]], *, limit: int, ahead: int, clear: bool) -> Allocator:
    weights, caches, runs = traced
    allocator = Allocator(limit, BUDGET * 95 // 100, active=weights)
    for made, times, clears in runs:
        before = None
        for _ in range(times):
            if allocator.state == before:  # what follows would be the same again
                break
            before = allocator.state
            replay(made, allocator, ahead=ahead)
        if clear and clears:
            allocator.clear()
    assert weights + caches <= allocator.active < weights + caches + 100 * PAGE  # nothing was lost on the way
    return allocator


@pytest.mark.parametrize("ahead", [0, 10])  # command buffers that the host is ahead of the GPU: MLX waits at 10
def test_dead_buffers_are_an_eighth_of_the_budget_at_most(traced: tuple[int, int, list[Run]], ahead: int) -> None:
    assert run(traced, limit=SHARE, ahead=ahead, clear=True).most_dead <= SHARE


@pytest.mark.parametrize("limit", [SHARE, UNLIMITED])
def test_without_clearing_they_are_more(traced: tuple[int, int, list[Run]], limit: int) -> None:
    """MLX looks at the limit before a buffer is given back, so one of any size may go beyond it."""
    dead = run(traced, limit=limit, ahead=0, clear=False).most_dead
    assert dead > SHARE
    assert dead > 4 * SHARE or limit == SHARE


def test_a_freed_buffer_serves_again_when_it_is_about_as_large() -> None:
    allocator = Allocator(1 << 30, 1 << 40)
    allocator.free(allocator.allocate(100 * PAGE))
    assert allocator.allocate(101 * PAGE) == 101 * PAGE and allocator.dead == 100 * PAGE  # too small
    assert allocator.allocate(98 * PAGE) == 98 * PAGE and allocator.dead == 100 * PAGE  # two pages less: too large
    assert allocator.allocate(98 * PAGE + 1) == 100 * PAGE and allocator.dead == 0
    allocator.free(allocator.allocate(PAGE))
    assert allocator.allocate(PAGE // 2) == PAGE // 2 and allocator.dead == PAGE  # twice as large
    assert allocator.allocate(PAGE // 2 + 1) == PAGE


def test_the_oldest_dead_buffers_go_first_at_the_ceiling_and_at_the_limit() -> None:
    allocator = Allocator(50 * PAGE, 100 * PAGE)
    sizes = [allocator.allocate(count * PAGE) for count in (20, 25, 40)]
    for size in sizes:
        allocator.free(size)
    assert allocator.dead == 85 * PAGE  # the last one went beyond the limit
    assert allocator.allocate(10 * PAGE) and allocator.dead == 40 * PAGE  # 20 and 25 went, 35 too many
    allocator.free(10 * PAGE)
    assert allocator.dead == 50 * PAGE
    allocator.allocate(70 * PAGE)  # 20 beyond the ceiling: the one of 40 is the oldest
    assert allocator.dead == 10 * PAGE
    allocator.clear()
    assert allocator.dead == 0 and allocator.most_dead == 85 * PAGE

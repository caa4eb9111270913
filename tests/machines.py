"""Several machines in one process: a thread for each, which meet where machines would send each other something."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import mlx.core as mx
import numpy as np

from mlx_gemma3.model.shard import Shard
from mlx_gemma3.model.streams import lent
from mlx_gemma3.runtime import machines as machines_module
from mlx_gemma3.runtime.engine import Engine
from mlx_gemma3.runtime.loading import follow
from mlx_gemma3.runtime.machines import Machines

T = TypeVar("T")


class Meeting:
    """Where the threads leave their arrays and take those of the others, each call in its turn."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=60)
        self.left: list[np.ndarray | None] = [None] * size
        self.calls = [0] * size

    def exchange(self, rank: int, x: mx.array) -> list[mx.array]:
        """Every thread's x, in the order of the ranks."""
        self.calls[rank] += 1
        wide = x.dtype == mx.bfloat16
        self.left[rank] = np.array(x.view(mx.uint16) if wide else x)
        self.barrier.wait()
        found = list(self.left)
        self.barrier.wait()
        shapes = {part.shape for part in found}
        assert len(shapes) == 1, shapes
        return [mx.array(part).view(mx.bfloat16) if wide else mx.array(part) for part in found]


class Threads:
    """shard.Group of one thread."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self._rank = meeting, rank

    def all_sum(self, x: mx.array) -> mx.array:
        parts = self._meeting.exchange(self._rank, x)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def all_gather(self, x: mx.array) -> mx.array:
        return mx.concatenate(self._meeting.exchange(self._rank, x))


def together(size: int, work: Callable[[Shard], T]) -> list[T]:
    """Run `work` on so many machines; what each returned. The first error of any is raised."""
    meeting, found, errors = Meeting(size), [None] * size, []

    def run(rank: int) -> None:
        try:
            found[rank] = work(Shard(rank, size, Threads(meeting, rank)))
        except Exception as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return found


@contextmanager
def engine_on(size: int, source: object, **options: object) -> Iterator[Engine]:
    """An engine whose model is spread over so many machines, each a thread of this process."""
    meeting = Meeting(size)
    all_machines = [Machines(Threads(meeting, rank), rank, size) for rank in range(size)]
    errors: list[BaseException] = []

    def run(machines: Machines) -> None:
        try:
            with lent():
                follow(machines, errors.append)
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    others = [threading.Thread(target=run, args=(machines,), daemon=True) for machines in all_machines[1:]]
    for thread in others:
        thread.start()
    machines_module._joined = all_machines[0]
    try:
        with Engine(source, **options) as engine:
            yield engine
        all_machines[0].log.write(["quit"])
        for thread in others:
            thread.join(20)
            assert not thread.is_alive()
    finally:
        machines_module._joined = None
        meeting.barrier.abort()
    assert not errors, errors

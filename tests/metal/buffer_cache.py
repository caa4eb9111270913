"""MLX's allocator on Metal, replayed: which freed buffers are kept, which are used again, how many bytes lie dead.

Source: MLX 846d176, backend/common/buffer_cache.h and backend/metal/allocator.cpp. `replay` allocates and frees what a
traced graph (metal_trace.py) would, in its order, without computing anything.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from metal_rules import attention_path
from metal_trace import Graph, Node

PAGE = 16_384  # bytes, of Apple's chips
OPERATIONS, MEBI = 40, 40  # of a command buffer, see metal_rules.command_buffers; at its end is free what it freed
# Operations that may write into an input nobody needs afterwards, when it is as large as their output.
IN_PLACE = {"Add", "Multiply", "Compiled", "rms_norm", "layer_norm", "rope", "AsType", "Select", "SliceUpdate"}


@dataclass
class Allocator:
    """Sizes alone stand for buffers."""

    limit: int  # mx.set_cache_limit
    ceiling: int  # bytes in use and dead from which dead ones are given back
    active: int = 0
    dead: int = 0
    most_dead: int = 0
    _sizes: list[int] = field(default_factory=list)  # of the dead, smallest first
    _order: deque[int] = field(default_factory=deque)  # the same, the one freed last first

    def allocate(self, size: int) -> int:
        """Returns the size of the buffer, which `free` takes."""
        if not size:
            return 0
        if size > PAGE:
            size = -(-size // PAGE) * PAGE
        at = bisect_left(self._sizes, size)
        if at < len(self._sizes) and self._sizes[at] < min(2 * size, size + 2 * PAGE):
            size = self._sizes.pop(at)
            self._order.remove(size)
            self.dead -= size
        elif (need := self.active + self.dead + size) >= self.ceiling:
            self._release(need - self.ceiling)
        self.active += size
        if self.dead > self.limit:
            self._release(self.dead - self.limit)
        return size

    def free(self, size: int) -> None:
        self.active -= size
        if size and self.dead < self.limit:
            insort(self._sizes, size)
            self._order.appendleft(size)
            self.dead += size
            self.most_dead = max(self.most_dead, self.dead)

    def clear(self) -> None:
        self._sizes.clear()
        self._order.clear()
        self.dead = 0

    @property
    def state(self) -> tuple[object, ...]:
        """All that what follows depends on."""
        return self.active, self.dead, tuple(self._order)

    def _release(self, least: int) -> None:
        if least >= 0.9 * self.dead:
            self.clear()
            return
        while self._order and least > 0:
            size = self._order.pop()
            del self._sizes[bisect_left(self._sizes, size)]
            self.dead -= size
            least -= size


@dataclass(frozen=True)
class Event:
    """What one operation asks of the allocator."""

    made: tuple[tuple[int, int], ...]  # numbers of new buffers, and their bytes
    done: tuple[int, ...]  # numbers of buffers that nobody needs after it
    left: tuple[int, ...] = ()  # bytes of caches that have moved into larger buffers
    touched: tuple[tuple[str, int], ...] = ()  # arrays that it reads or writes, and their entries


def events(graph: Graph, *, caches: int) -> list[Event]:
    """
    Args:
        caches: so many of the graph's outputs, from the first on, live on; the others are read and dropped.
    """
    nodes = [node for node in graph.nodes if _makes(graph, node)]
    last = {_root(graph, name): at for at, node in enumerate(nodes) for name in node.inputs}
    last |= {_root(graph, name): len(nodes) for name in graph.outputs}
    buffers: dict[str, int] = {}  # of an array that was made here: its buffer
    found, numbers = list[Event](), count()
    for at, node in enumerate(nodes):
        inputs = list(dict.fromkeys(_root(graph, name) for name in node.inputs))
        made, done, left = [], [], []
        for size in _scratch(node):
            made.append((number := next(numbers), size))
            done.append(number)
        for name in node.outputs:
            size = graph.arrays[name].nbytes
            if node.name == "SliceUpdate" and inputs[0] in graph.constants:
                continue  # a write into the cache itself
            free = [one for one in inputs if last[one] == at and one in buffers and graph.arrays[one].nbytes == size]
            if node.name in IN_PLACE and free:
                buffers[name] = buffers.pop(free[0])
                continue
            made.append((next(numbers), size))
            buffers[name] = made[-1][0]
            if (
                node.name == "Concatenate"
                and inputs[0] in graph.constants
                and last.get(name, at) > at
                and _kept(graph, name, caches)
            ):
                left.append(graph.arrays[inputs[0]].nbytes)
        done += [buffers.pop(one) for one in inputs if last[one] == at and one in buffers]
        touched = tuple((name, graph.arrays[name].size) for name in dict.fromkeys((*inputs, *node.outputs)))
        found.append(Event(tuple(made), tuple(done), tuple(left), touched))
    dropped = [buffers[root] for name in graph.outputs[caches:] if (root := _root(graph, name)) in buffers]
    return [*found, Event((), tuple(dropped))]


def replay(work: Iterable[Event], allocator: Allocator, *, ahead: int) -> None:
    """
    Args:
        ahead: command buffers that the host has issued and the GPU has not done yet: what they use is not free.
    """
    sizes: dict[int, int] = {}
    waiting: deque[list[int]] = deque([[]])  # what each command buffer leaves, the one that is being filled last
    operations, entries, touched = 0, 0, set[str]()
    for event in work:
        for buffer, size in event.made:
            sizes[buffer] = allocator.allocate(size)
        waiting[-1] += [sizes.pop(buffer) for buffer in event.done] + [rounded(size) for size in event.left]
        operations += 1
        for name, size in event.touched:
            if name not in touched:
                touched.add(name)
                entries += size
        if operations > OPERATIONS or entries >> 20 > MEBI:
            operations, entries, touched = 0, 0, set()
            waiting.append([])
            while len(waiting) > ahead + 1:
                _free(allocator, waiting.popleft())
    while waiting:
        _free(allocator, waiting.popleft())


def rounded(size: int) -> int:
    return -(-size // PAGE) * PAGE if size > PAGE else size


def _free(allocator: Allocator, sizes: list[int]) -> None:
    for size in sizes:
        allocator.free(size)


def _makes(graph: Graph, node: Node) -> bool:
    """It gets a buffer of its own. Turned rows that get another shape are copied."""
    if node.name == "Full":
        return graph.arrays[node.outputs[0]].size > 1
    if node.name not in ("Reshape", "Flatten"):
        return not node.is_view
    maker = graph.makers.get(node.inputs[0])
    return maker is not None and maker.name == "Transpose"


def _root(graph: Graph, name: str) -> str:
    while (node := graph.makers.get(name)) is not None and not _makes(graph, node) and node.inputs:
        name = node.inputs[0]
    return name


def _kept(graph: Graph, name: str, caches: int) -> bool:
    """One of the caches lies in this array when all is done."""
    for output in graph.outputs[:caches]:
        root = _root(graph, output)
        while root != name and (node := graph.makers.get(root)) is not None and node.name == "SliceUpdate":
            root = _root(graph, node.inputs[0])
        if root == name:
            return True
    return False


def _scratch(node: Node) -> list[int]:
    """Buffers that an operation needs for itself: scaled queries and the scores, where attention is not one kernel."""
    if node.name != "scaled_dot_product_attention" or node.call is None:
        return []
    q, k, v = (node.call.values[name] for name in "qkv")
    if attention_path(q, k, v, node.call.values.get("mask"), m5=False) != "unfused":
        return []
    return [q.nbytes, q.shape[1] * q.shape[2] * k.shape[2] * q.dtype.size]

"""One schedule for several machines: what the first one does with its runner, the others do after it.

    first      Engine ─ Scheduler ─ LeadingRunner ─ writes each command into the log, then takes part in it
    others                                   Log ─ follow ─ read a command, take part in it

The first machine alone owns requests, timelines, snapshots, sampling, constraints, files; the others hold the same
caches by number, each with its own heads. A command says what was decided, never what to decide. What both sides of a
command compute together stands in one function, or in the same method of Runner. To follow a new method of Runner:
a method of LeadingRunner that writes its command, and a line in Follower.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from time import monotonic, sleep
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import Config
from ..errors import Gemma3Error
from ..model import cache_state
from ..model.cache import Caches
from ..model.cache_state import CacheState
from ..model.runner import Runner
from ..model.shard import Group, Shard

Command = list[Any]  # its name, and what belongs to it, as JSON has it
NAP_AFTER, NAP = 20, 0.4  # beats with nothing between, after which those that follow sleep so long, in seconds
_ROOM = 512  # bytes of a command that is sent in one piece, its length among them
_UNBOUNDED = 1 << 62
_DTYPES = {str(dtype): dtype for dtype in (mx.float32, mx.float16, mx.bfloat16, mx.uint32)}


def nap(beats: int) -> float:
    """Seconds in which those that follow need not listen after so many beats: listening keeps a core busy."""
    return NAP if beats > NAP_AFTER else 0.0


class Log:
    """The commands, in order: one machine writes, all others read. A sum in which those that read add nothing."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def write(self, command: Command, *, wait: bool = False) -> None:
        """
        Args:
            wait: until all have read it.
        """
        text = json.dumps(command, separators=(",", ":")).encode()
        frame = np.zeros(_ROOM, np.uint8)
        head = len(text).to_bytes(4, "little") + text
        frame[: min(len(head), _ROOM)] = np.frombuffer(head, np.uint8, min(len(head), _ROOM))
        sent = [self._group.all_sum(mx.array(frame))]
        mx.async_eval(sent)
        if len(head) > _ROOM:
            sent.append(self._group.all_sum(mx.array(np.frombuffer(head, np.uint8, offset=_ROOM))))
            mx.async_eval(sent[1])
        if wait:
            mx.eval(sent)

    def read(self) -> Command:
        """The next command. Waits for it."""
        head = self._receive(_ROOM)
        length = int.from_bytes(head[:4], "little")
        if 4 + length > _ROOM:
            head += self._receive(4 + length - _ROOM)
        command: Command = json.loads(head[4 : 4 + length])
        return command

    def _receive(self, size: int) -> bytes:
        found = self._group.all_sum(mx.zeros(size, mx.uint8))
        mx.eval(found)
        return np.array(found).tobytes()


# --- what all machines do together


def _read(
    runner: Runner,
    ids: np.ndarray,
    image: np.ndarray,
    blocks: np.ndarray | None,
    caches: Caches | None,
    features: mx.array | None,
    pictures: int,
    *,
    last_only: bool,
) -> mx.array:
    """See Runner.read. The rows of pictures come from the first machine."""
    if pictures:
        config = runner.config
        shape = (pictures, config.mm_tokens_per_image, config.text.hidden_size)
        features = None if features is None else features.astype(runner.dtype)
        features = runner.shard.from_first(features, shape, runner.dtype)
    rows = runner.model.rows(ids, image, features)
    placed = None if blocks is None else mx.array(blocks)
    return runner.decode_chunk(rows, placed, caches, last_only=last_only)


def _whole(shard: Shard, config: Config, caches: Caches, first: int | None) -> CacheState:
    """cache_state.state_of with the heads of all machines."""
    state = cache_state.state_of(caches, first)
    arrays = {}
    for name in sorted(state.arrays):
        array = state.arrays[name]
        arrays[name] = array if name.endswith(".logits") else shard.all_heads(array, config.text)
        mx.eval(arrays[name])
    return replace(state, arrays=arrays)


def _restore(
    shard: Shard,
    config: Config,
    caches: Caches,
    state: CacheState,
    entries: Sequence[tuple[str, Sequence[int], str]],
) -> None:
    """cache_state.restore; each machine takes its own heads of every array, which the first one has.

    Args:
        entries: names, shapes and dtypes of the arrays.
    """
    own = {name: array for name, array in state.arrays.items() if name.endswith(".logits")}
    for name, shape, dtype in entries:
        whole = shard.from_first(state.arrays.get(name), tuple(shape), _DTYPES[dtype])
        own[name] = mx.contiguous(shard.own_heads(whole, config.text))
        mx.eval(own[name])
    cache_state.restore(caches, replace(state, arrays=own))


# --- the first machine


class LeadingRunner(Runner):
    """The runner of the first machine. `lead` gives it the log; before that nothing may be computed."""

    log: Log

    def lead(self, log: Log, rest: float, lost: Callable[[object], Gemma3Error], ended: Callable[[], None]) -> None:
        """
        Args:
            rest: seconds with nothing to do after which the others want to hear from it.
            lost: makes the error that tells of a machine that is gone, from what was raised.
            ended: called by `close`.
        """
        self.log, self.rest, self._lost, self._ended = log, rest, lost, ended
        self._tower = replace(self._tower, attend=self._with_beat(self._tower.attend))  # a picture takes its time
        self._spoke, self._beats = monotonic(), 0
        self.dropped: list[int] = []  # numbers of caches that nobody holds any more
        self.numbers = count(1)
        self._within = False  # a command that was written

    def write(self, *command: Any, wait: bool = False) -> None:
        """Write a command; what was dropped before is dropped first."""
        if self.dropped:
            gone, self.dropped = self.dropped, []
            self.log.write(["drop", gone])
        self.log.write(list(command), wait=wait)
        self._spoke, self._beats = monotonic(), 0

    @contextmanager
    def _command(self, *command: Any) -> Iterator[None]:
        """Write a command, and compute what belongs to it."""
        self.write(*command)
        self._within = True
        try:
            yield
        finally:
            self._within = False

    @staticmethod
    def _begun(result: mx.array) -> mx.array:
        """What a command computes goes on its way before the next command is written, as with those that follow."""
        mx.async_eval(result)
        return result

    def beat(self) -> None:
        assert self.rest is not None
        if monotonic() - self._spoke > 0.8 * self.rest and not self._within:
            beats = self._beats + 1
            self.write("beat", nap(beats), wait=True)
            self._beats = beats

    def gone(self, error: BaseException) -> Gemma3Error | None:
        return None if isinstance(error, Gemma3Error) else self._lost(error)

    def _with_beat(self, attend: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def attended(*given: Any) -> mx.array:
            self.beat()
            return attend(*given)

        return attended

    def close(self) -> None:
        try:
            self.write("close", wait=True)
        finally:
            self._ended()

    def make_caches(self, *, kv_bits: int = 16, local_kv_bits: int = 16, adapter: str | None = None) -> Caches:
        made = LedCaches(self.config, kv_bits=kv_bits, local_kv_bits=local_kv_bits)
        made.adapter = adapter
        made.begin(self)
        self.write("new", made.number, kv_bits, local_kv_bits, adapter)
        return made

    def read(
        self,
        tokens: mx.array | np.ndarray | Sequence[Sequence[int]],
        features: mx.array | None = None,
        caches: Caches | None = None,
        last_only: bool = False,
        spans: Sequence[tuple[int, int]] | None = None,
    ) -> mx.array:
        assert isinstance(caches, LedCaches)
        pictures = 0 if features is None else features.shape[0]
        ids, image, blocks = self.model.place(tokens, pictures, caches, spans)  # refuses before anybody is told
        said = None if spans is None else [list(span) for span in spans]
        with self._command("read", caches.number, ids.tolist(), pictures, said, last_only):
            return self._begun(_read(self, ids, image, blocks, caches, features, pictures, last_only=last_only))

    def step(self, tokens: mx.array, rows: Sequence[Caches]) -> mx.array:
        with self._command("step", _numbers(rows)):
            sent = self.shard.from_first(tokens.astype(mx.int32), tokens.shape, mx.int32)
            return self._begun(super().step(sent, rows))

    def verify(self, tokens: mx.array, rows: Sequence[Caches], counts: Sequence[int], last: Sequence[int]) -> mx.array:
        with self._command("verify", _numbers(rows), list(counts), list(last)):
            sent = self.shard.from_first(tokens.astype(mx.int32), tokens.shape, mx.int32)
            return self._begun(super().verify(sent, rows, counts, last))

    def head(self, hidden: mx.array) -> mx.array:
        if self._within:
            return super().head(hidden)
        with self._command("head", list(hidden.shape)):
            return self._begun(super().head(self.shard.from_first(hidden, hidden.shape, hidden.dtype)))


class LedCaches(Caches):
    """Caches of the first machine, which the others hold under the same number."""

    lead: LeadingRunner
    number: int

    def begin(self, lead: LeadingRunner) -> None:
        self.lead, self.number = lead, next(lead.numbers)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            self.lead.dropped.append(self.number)

    def expect(self, tokens: int) -> None:
        super().expect(tokens)
        self.lead.write("expect", self.number, tokens)

    def fork(self) -> Caches:
        other = super().fork()
        assert isinstance(other, LedCaches)
        other.begin(self.lead)
        self.lead.write("fork", self.number, other.number)
        return other

    def take_snapshot(self, logits: mx.array | None = None, *, budget: int) -> None:
        before = list(self.snapshots)
        super().take_snapshot(logits, budget=budget)
        old = {id(snapshot) for snapshot in before}
        taken = any(id(snapshot) not in old for snapshot in self.snapshots)
        if taken or len(self.snapshots) < len(before):
            self.lead.write("snapshot", self.number, taken, [snapshot.position for snapshot in self.snapshots])

    def take_back(self, count: int) -> None:
        super().take_back(count)
        self.lead.write("take_back", self.number, count)

    def rewind(self, position: int) -> mx.array | None:
        logits = super().rewind(position)
        self.lead.write("rewind", self.number, position)
        return logits


def state_of(caches: Caches, first: int | None = None) -> CacheState:
    """cache_state.state_of, with the heads of all machines."""
    if not isinstance(caches, LedCaches):
        return cache_state.state_of(caches, first)
    lead = caches.lead
    lead.write("state", caches.number, first)
    return _whole(lead.shard, lead.config, caches, first)


def restore(caches: Caches, state: CacheState) -> None:
    """cache_state.restore, on all machines."""
    if not isinstance(caches, LedCaches):
        cache_state.restore(caches, state)
        return
    lead = caches.lead
    entries = [
        (name, list(array.shape), str(array.dtype))
        for name, array in state.arrays.items()
        if name.startswith(("layer.", "border")) and not name.endswith(".logits")
    ]
    borders = [[position, list(counts)] for position, counts in state.borders]
    lead.write("restore", caches.number, state.offset, list(state.filled), borders, entries)
    _restore(lead.shard, lead.config, caches, state, entries)


def _numbers(rows: Sequence[Caches]) -> list[int]:
    numbers = []
    for caches in rows:
        assert isinstance(caches, LedCaches)
        numbers.append(caches.number)
    return numbers


# --- the others


class Follower:
    """One of the other machines: takes part in each command of the log, until it is closed."""

    def __init__(self, runner: Runner, log: Log) -> None:
        self.runner, self.log = runner, log
        self.caches: dict[int, Caches] = {}
        self._commands: dict[str, Callable[..., mx.array | None]] = {
            "beat": sleep,
            "new": self._new,
            "expect": lambda number, tokens: self.caches[number].expect(tokens),
            "fork": self._fork,
            "drop": self._drop,
            "snapshot": self._snapshot,
            "rewind": lambda number, position: self._nothing(self.caches[number].rewind(position)),
            "read": self._read,
            "step": self._step,
            "verify": self._verify,
            "take_back": lambda number, count: self.caches[number].take_back(count),
            "head": self._head,
            "state": self._state,
            "restore": self._restored,
        }

    def follow(self) -> None:
        """Until `close`."""
        while (command := self.log.read())[0] != "close":
            computed = self._commands[command[0]](*command[1:])
            if computed is not None:
                mx.async_eval(computed)

    @staticmethod
    def _nothing(_: object) -> None:
        """What was returned is the first machine's alone."""

    def _new(self, number: int, kv_bits: int, local_kv_bits: int, adapter: str | None) -> None:
        made = self.runner.make_caches(kv_bits=kv_bits, local_kv_bits=local_kv_bits, adapter=adapter)
        self.caches[number] = made

    def _fork(self, number: int, other: int) -> None:
        self.caches[other] = self.caches[number].fork()

    def _drop(self, numbers: list[int]) -> None:
        for number in numbers:
            del self.caches[number]

    def _snapshot(self, number: int, taken: bool, kept: list[int]) -> None:
        caches = self.caches[number]
        if taken:
            caches.snapshots = [old for old in caches.snapshots if old.position != caches.offset]
            caches.take_snapshot(budget=_UNBOUNDED)
        caches.snapshots = [old for old in caches.snapshots if old.position in kept]

    def _read(
        self, number: int, ids: list[list[int]], pictures: int, spans: list[tuple[int, int]] | None, last_only: bool
    ) -> mx.array:
        runner, caches = self.runner, self.caches[number]
        placed = runner.model.place(ids, pictures, caches, spans)
        hidden = _read(runner, *placed, caches, None, pictures, last_only=last_only)
        mx.eval(hidden, caches.arrays)
        return hidden

    def _step(self, numbers: list[int]) -> mx.array:
        tokens = self.runner.shard.from_first(None, (len(numbers),), mx.int32)
        return self.runner.step(tokens, [self.caches[number] for number in numbers])

    def _verify(self, numbers: list[int], counts: list[int], last: list[int]) -> mx.array:
        tokens = self.runner.shard.from_first(None, (sum(counts),), mx.int32)
        return self.runner.verify(tokens, [self.caches[number] for number in numbers], counts, last)

    def _head(self, shape: list[int]) -> mx.array:
        return self.runner.head(self.runner.shard.from_first(None, tuple(shape), self.runner.dtype))

    def _state(self, number: int, first: int | None) -> None:
        _whole(self.runner.shard, self.runner.config, self.caches[number], first)

    def _restored(self, number: int, offset: int, filled: list[int], borders: list[Any], entries: list[Any]) -> None:
        said = tuple((position, tuple(counts)) for position, counts in borders)
        state = CacheState(offset, tuple(filled), said, {})
        _restore(self.runner.shard, self.runner.config, self.caches[number], state, entries)

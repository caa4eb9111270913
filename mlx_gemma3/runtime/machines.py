"""Several machines under `mlx.launch`: how they find each other, load a model together, and notice that one is gone.

All run the same command. Of those that can work together (`commands/program.py`) the first machine runs it, and the
others follow (follow.py). Everything that they send each other goes through `mx.distributed`.

Each machine must hear from the others all the time: in the sums of a forward pass, and when there is nothing to do in
beats. A thread beside counts the seconds in which it heard nothing. After LIMIT of them, or when the other end of a
connection is closed, the others are taken for gone: nothing in MLX can be called back, so the process ends, with a
sentence; on the first machine those that wait for answers are told before.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..errors import DeviceLost, Gemma3Error, OptionError
from ..model.shard import Shard
from .follow import Log, nap
from .loaded import EngineOptions

LIMIT = 20.0  # seconds without hearing from the others
LOADING = 120.0  # the same while weights are read: a layer from a slow disk
GRACE = 3.0  # seconds for those that wait for an answer to take the error
REST = 0.5  # seconds between two beats; follow.NAP is shorter
_TICK, _SURE = 0.25, 3  # seconds between two looks at the connections; looks that see one closed
_LOOK = 0.1  # seconds between two looks whether all machines are ready

T = TypeVar("T")


class Machines:
    """The machines as one of them sees them; shard.Group of all its models.

    Any thread may use it, but for calls that all machines make: one thread at a time makes those.
    """

    def __init__(self, group: Any, rank: int, size: int, sockets: Collection[int] = ()) -> None:
        """
        Args:
            group: shard.Group.
            sockets: MLX's connections to the others, as far as it has any: they are looked at, never read.
        """
        self._group, self.rank, self.size, self.sockets = group, rank, size, sockets
        self.shard, self.log = Shard(rank, size, self), Log(self)
        self.lost: DeviceLost | None = None
        self.limit = LIMIT
        self._silent = 0.0  # seconds
        self._busy = threading.Lock()  # whoever has it may make calls
        self._ended = threading.Event()
        self._engine = False
        self._tell: Callable[[Gemma3Error], None] | None = None

    # --- shard.Group

    def all_sum(self, x: mx.array) -> mx.array:
        found: mx.array = self._group.all_sum(x)
        if x.ndim == 3 and x.shape[1] > 1:  # a prompt's rows: a layer at a time, so that it is heard of
            mx.eval(found)
        self._silent = 0.0
        return found

    def all_gather(self, x: mx.array) -> mx.array:
        found: mx.array = self._group.all_gather(x)
        self._silent = 0.0
        return found

    # --- a model

    def begin(self, source: str, options: Mapping[str, Any], tell: Callable[[Gemma3Error], None]) -> None:
        """On the first machine: have the others load a model too. From then on this thread alone makes calls.

        Args:
            tell: takes the error of machines that are gone, in another thread.

        Raises:
            OptionError: there is a model already.
            DeviceLost: a machine is gone.
        """
        if self._engine:
            do = "one after another, or on one machine each"
            raise OptionError("models on several machines", got="a second one", want="one at a time", do=do)
        self._engine = True
        self._busy.acquire()
        self._tell = tell
        try:
            self.check()
            self.log.write(["load", source, dict(options)], wait=True)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """On the first machine: the model is closed."""
        self._tell, self._engine = None, False
        self._busy.release()

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """While weights are read it is heard of less often."""
        self.limit = LOADING
        try:
            yield
        finally:
            self.limit = LIMIT

    def barrier(self) -> None:
        """Wait for all machines."""
        mx.eval(self.all_sum(mx.zeros(1)))

    def agree(self, work: Callable[[], T]) -> T:
        """Do something on all machines, however long it takes each (a download); then go on together.

        Raises:
            Gemma3Error: it went wrong here, or there.
        """
        found: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                found.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name="mlx-gemma3 agree", daemon=True)
        thread.start()
        while True:
            mine = np.zeros(self.size, np.int32)
            if not thread.is_alive():
                mine[self.rank] = 2 if errors else 1
            said = self.all_sum(mx.array(mine))
            mx.eval(said)
            states = np.array(said).tolist()
            if all(states):
                break
            time.sleep(_LOOK)
        if errors:
            raise errors[0]
        if 2 in states:
            which = f"machine {states.index(2) + 1} of {self.size}"
            raise DeviceLost(which, got="an error", want="the model there too", do="it says which")
        return found[0]

    # --- when one is gone

    def check(self) -> None:
        """Raises DeviceLost when one is gone."""
        if self.lost is not None:
            raise self.lost

    def lose(self, got: object) -> DeviceLost:
        """Remember that a machine is gone; returns the error that says so."""
        if self.lost is None:
            where = f"machine {self.rank + 1} of {self.size}"
            want, do = "to hear from all the others", "see what they say, and start all again"
            self.lost = DeviceLost(where, got=str(got).removeprefix("[ring] "), want=want, do=do)
        return self.lost

    def watch(self) -> None:
        """Begin to count the seconds. On the first machine also to beat while there is no model; on the others to wait
        for the end of mlx.launch, which holds the other side of their standard input.
        """
        threading.Thread(target=self._watch, name="mlx-gemma3 watch", daemon=True).start()
        other = self._beat if self.rank == 0 else self._drain
        threading.Thread(target=other, name="mlx-gemma3 beat", daemon=True).start()

    def _watch(self) -> None:
        closed = 0
        while not self._ended.wait(_TICK) and self._silent < self.limit and closed < _SURE:
            self._silent += _TICK  # not by a clock: a process that was stopped for a while heard nothing meanwhile
            closed = closed + 1 if any(map(_closed, self.sockets)) else 0
        if self._ended.is_set():
            return
        silence = f"nothing from the others for {self.limit:.0f} seconds"
        error = self.lose("a neighbour whose process has ended" if closed else silence)
        if self._tell is not None:
            self._tell(error)
            time.sleep(GRACE)
        self.leave(error)

    def _beat(self) -> None:
        beats = 0
        while not self._ended.wait(REST):
            if not self._busy.acquire(blocking=False):
                beats = 0
                continue
            try:
                beats += 1
                self.log.write(["beat", nap(beats)], wait=True)
            except RuntimeError as error:
                self.leave(self.lose(error))
            finally:
                self._busy.release()

    def _drain(self) -> None:
        """What is typed there is for the first machine."""
        with contextlib.suppress(OSError):
            if stat.S_ISFIFO(os.fstat(0).st_mode):
                while os.read(0, 1 << 16):
                    pass
                if not self._ended.is_set():
                    self.leave(self.lose("the end of mlx.launch"))

    @staticmethod
    def leave(error: Gemma3Error) -> None:
        """End the process with a sentence."""
        sys.stdout.flush()
        sys.stderr.write(f"mlx-gemma3: {error}\n")
        sys.stderr.flush()
        os._exit(1)

    def part(self) -> None:
        """The others may end from now on."""
        self._ended.set()

    def finish(self) -> None:
        """On the first machine, when the program ends: the others end too."""
        self._ended.set()
        if self.lost is not None:  # a thread may hang in MLX, and would keep the process
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        if self._busy.acquire(timeout=LIMIT):
            try:
                self.log.write(["quit"], wait=True)
            except RuntimeError:
                os._exit(1)


_joined: Machines | None = None


def current() -> Machines | None:
    """The machines that this process has joined; None for a machine alone."""
    return _joined


def join() -> Machines | None:
    """Find the other machines; None where there are none. Waits until all are there.

    Raises:
        OptionError: they cannot be found.
    """
    global _joined
    hosts = os.environ.get("MLX_HOSTFILE")
    if hosts and Path(hosts).is_file() and not Path(hosts).read_text(encoding="utf-8").strip():
        return None  # as `mlx.launch -n 1` writes it
    before = _sockets()
    try:
        group = mx.distributed.init(strict=True)
    except (RuntimeError, ValueError) as error:
        raise OptionError(
            "machines", got=error, want="those of the hostfile, and each to reach its neighbours", do="see docs/macs.md"
        ) from None
    if group.size() == 1:
        return None
    _joined = Machines(_Distributed(group), group.rank(), group.size(), _sockets() - before)
    _joined.watch()
    if _joined.rank == 0:
        atexit.register(_joined.finish)
    return _joined


def _sockets() -> set[int]:
    """The descriptors of this process that are connections."""
    found = set()
    for path in Path("/dev/fd").iterdir():
        with contextlib.suppress(OSError):
            with socket.socket(fileno=os.dup(int(path.name))) as looked_at:
                looked_at.getpeername()
            found.add(int(path.name))
    return found


def _closed(descriptor: int) -> bool:
    """Whether the other end of a connection is closed, and everything from there was read."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as looked_at:
            return not looked_at.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


class _Distributed:
    """shard.Group of `mx.distributed`."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def all_sum(self, x: mx.array) -> mx.array:
        return mx.distributed.all_sum(x, group=self._group)

    def all_gather(self, x: mx.array) -> mx.array:
        return mx.distributed.all_gather(x, group=self._group)


def plain_options(options: EngineOptions) -> dict[str, Any]:
    """EngineOptions as JSON has them."""
    values = asdict(options)
    values["adapters"] = {name: str(path) for name, path in values["adapters"].items()}
    values["prompt_cache"] = values["draft"] = None  # the first machine's alone
    return values

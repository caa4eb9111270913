"""Prompts that outlive memory: timelines that are dropped go to disk, and come back for a prompt that begins alike.

Belongs to the engine's thread. Files are written in one thread of its own, from the caches' own memory, and read in one
thread each, so that answers meanwhile go on; nothing of it ever fails a request (prompt_files.py has the folder).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..boundary.writing import refusal
from ..errors import OutputError, SessionError
from ..model.cache_state import CacheState
from .follow import state_of
from .job import Job
from .loaded import Loaded
from .prompt_files import SHORTEST, Kept, PromptFiles
from .state_file import Contents, HostArray, host_arrays, restore
from .timeline import Identity, Timeline, Tokens

HELD_BYTES = 256 << 20  # of timelines that wait to be written; one alone may be larger
PAUSE_SECONDS = 600.0  # without another try after a file could not be written
CLOSE_SECONDS = 30.0  # that the end waits for files


class Stopped(Exception):
    """The engine waits no longer for a file."""


@dataclass(frozen=True)
class Leaving:
    """A timeline on its way to disk."""

    tokens: Tokens
    identity: Identity
    state: CacheState  # without arrays
    arrays: dict[str, HostArray]
    nbytes: int  # of memory that is held for it
    used: float  # when it was, as time.time() says it


class PromptCache:
    """What the scheduler calls when a timeline leaves memory, and when a request's prompt is about to be read."""

    def __init__(
        self,
        folder: str | Path,
        budget: int,
        loaded: Loaded,
        new_timeline: Callable[[str | None], Timeline],
        send: Callable[[Callable[[], None]], None],
    ) -> None:
        """
        Args:
            budget: bytes of all files.
            new_timeline: an empty one, for what is computed with this adapter.
            send: runs something in the engine's thread, soon.
        """
        self._loaded, self._new_timeline, self._send = loaded, new_timeline, send
        self.files = PromptFiles(folder, budget, loaded, new_timeline(None).caches)
        self._told: set[str] = set()
        self._paused = 0.0  # until then nothing is written
        self._reading: set[str] = set()  # names of files
        self._queue: queue.SimpleQueue[Leaving | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._changed = threading.Condition()  # of what is held
        self.held = 0  # bytes of memory of timelines that are not yet written
        self._stopped = False
        try:
            self.files.open()
        except OutputError as error:
            self._pause(error)
        threading.Thread(target=self.files.look, name="mlx-gemma3 prompts", daemon=True).start()

    # --- out of memory

    def keep(self, timeline: Timeline, *, used: float | None = None, patience: float = 0.0) -> None:
        """Write a timeline that nobody will use any more, soon; or not, where that would hold too much memory.

        Args:
            used: when it was, as time.time() says it; None for now.
            patience: seconds to wait for those that are not yet written.
        """
        caches, identity = timeline.caches, timeline.identity
        assert identity is not None, "the scheduler's have one"
        if caches.offset < SHORTEST or time.monotonic() < self._paused or caches.nbytes > self.files.budget:
            return
        tokens = timeline.tokens.head(caches.offset)
        if self.files.covers(tokens):
            return
        with self._changed:
            if not self._changed.wait_for(lambda: self._has_room(timeline.nbytes), patience):
                return
        try:
            state = state_of(caches, first=SHORTEST)
            leaving = Leaving(
                tokens,
                identity,
                replace(state, arrays={}),
                host_arrays(state.arrays),
                timeline.nbytes,
                used or time.time(),
            )
        except RuntimeError as error:  # of MLX's
            self._pause(error)
            return
        with self._changed:
            self.held += leaving.nbytes
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_all, name="mlx-gemma3 prompt files", daemon=True)
            self._writer.start()
        self._queue.put(leaving)

    def close(self, timelines: Sequence[Timeline]) -> None:
        """Write what is left in memory, the one used last first, and end; all within CLOSE_SECONDS."""
        until, now = time.monotonic() + CLOSE_SECONDS, time.time()
        for age, timeline in enumerate(reversed(timelines)):
            self.keep(timeline, used=now - age / 1000, patience=max(0.0, until - time.monotonic()))
        if self._writer is not None:
            self._queue.put(None)
            self._writer.join(max(0.0, until - time.monotonic()))
            self._stopped = True
            self._writer.join(1.0)

    def _has_room(self, nbytes: int) -> bool:
        return not self.held or self.held + nbytes <= HELD_BYTES

    def _write_all(self) -> None:
        """The thread that writes."""
        while (leaving := self._queue.get()) is not None:
            held = leaving.nbytes
            try:
                if not self._stopped and time.monotonic() >= self._paused and not self.files.covers(leaving.tokens):
                    self.files.write(
                        leaving.tokens,
                        leaving.identity,
                        leaving.state,
                        leaving.arrays,
                        used=leaving.used,
                        between=self._check,
                    )
            except Stopped:
                pass
            except OSError as error:
                self._pause(refusal(self.files.folder, error))
            except Exception as error:  # nobody foresaw it; the answers go on
                self._pause(error)
            del leaving
            with self._changed:
                self.held -= held
                self._changed.notify_all()

    def _check(self) -> None:
        if self._stopped:
            raise Stopped

    # --- into memory

    def recall(self, job: Job, tokens: Tokens, reused: int) -> bool:
        """Have a file read that saves more of a job's prompt than memory does, once.

        Args:
            reused: tokens that memory saves.

        Returns:
            whether it had better wait. Later `job.recalled` is what was read, if all went well.
        """
        if job.recalling is not None:
            return job.recalling
        found = self.files.best(tokens, reused + SHORTEST)
        if found is None:
            return False
        if found.name not in self._reading:  # else somebody shares it soon
            self._reading.add(found.name)
            job.recall_begins()
            threading.Thread(target=self._read, args=(job, found), name="mlx-gemma3 prompt file", daemon=True).start()
        return True

    def _read(self, job: Job, kept: Kept) -> None:
        contents = None
        try:
            contents = self.files.read(kept)
        except SessionError as error:
            self._tell("damaged", f"a prompt kept on disk was damaged and is deleted: {error}")
        finally:  # whatever went wrong: the prompt is read instead
            self._send(lambda: self._recalled(job, kept, contents))

    def _recalled(self, job: Job, kept: Kept, contents: Contents | None) -> None:
        self._reading.discard(kept.name)
        job.recalling = False
        if contents is None or job.request.cancelled:
            return
        timeline = self._new_timeline(contents.adapter)
        try:
            restore(contents, timeline)
        except Exception as error:  # MLX has no memory for it, say: the prompt is read
            self._tell("restored", f"a prompt kept on disk could not be taken: {error}")
            return
        job.recalled = timeline

    # --- what is told

    def _pause(self, error: Exception) -> None:
        """Nothing can be written: say so once, and try again much later."""
        self._paused = time.monotonic() + PAUSE_SECONDS
        self._tell("written", f"prompts are not kept on disk: {error}")

    def _tell(self, what: str, note: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self._loaded.notes.append(note)

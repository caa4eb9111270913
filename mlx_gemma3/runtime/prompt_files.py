"""The folder of the prompts on disk: which files are ours, what each can be used for, and which goes first.

Each file holds one timeline (state_file.py) under a name made of its model, its settings and its tokens. What a prompt
has in common with a file is told from the files' headers, which are read once; everything else, the digest of all
bytes before all, is checked when a file is read. Several programs may share the folder: files appear whole, a file that
has gone is none, and the time of last use is the file's own. Used from any thread.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..boundary import writing
from ..boundary.reading import open_regular
from ..errors import OutputError, SessionError
from ..model.cache import Caches, Extent, reach
from ..model.cache_state import CacheState
from . import state_file
from .loaded import Loaded
from .session_state import State, plain
from .state_file import Contents, HostArray
from .timeline import Identity, Tokens

SHORTEST = 256  # tokens that a file must save to be worth its reading, and has at least: docs/conversations.md measures
_NAME = re.compile(r"gemma3-[0-9a-f]{16}-[0-9a-f]{32}\.prompt")


@dataclass(frozen=True, eq=False)
class Kept:
    """A prompt on disk: what is known of it without its keys and values."""

    name: str  # of its file
    keys: NDArray[np.int64]  # of Tokens
    spans: tuple[tuple[int, int], ...]
    extents: tuple[Extent, ...]  # what it can be taken back to
    window: int

    def __len__(self) -> int:
        return len(self.keys)

    def reusable(self, prompt: Tokens) -> int:
        """How many tokens of a prompt it would save."""
        return reach(prompt.shared(self), self.extents, self.window) if self.begins(prompt) else 0

    def begins(self, prompt: Tokens) -> bool:
        """Whether SHORTEST tokens could be shared, looked at quickly."""
        last = SHORTEST - 1
        return len(prompt) > last and bool(prompt.keys[last] == self.keys[last])

    def replaces(self, other: Kept) -> bool:
        """Whether it can be used for all that the other can."""
        if len(self) < len(other) or not np.array_equal(self.keys[: len(other)], other.keys):
            return False
        return all(reach(end, self.extents, self.window) == end for end, _ in other.extents)


class PromptFiles:
    """The files of one folder, those of this model with these settings among them."""

    def __init__(self, folder: str | Path, budget: int, loaded: Loaded, caches: Caches) -> None:
        """
        Args:
            budget: bytes that all files may take, those of other models too.
            caches: empty ones of the engine's settings.
        """
        with suppress(RuntimeError):  # `~name` of nobody
            folder = Path(folder).expanduser()
        self.folder, self.budget = Path(folder).absolute(), budget
        self._loaded, self._caches = loaded, caches
        made_with = repr((state_file.FORMAT, state_file.VERSION, loaded.identity))
        self._prefix = f"gemma3-{hashlib.blake2b(made_with.encode(), digest_size=8).hexdigest()}-"
        self._scan, self._lock = threading.Lock(), threading.Lock()
        self._seen = -1  # the folder's time of change when it was looked through
        self._kept: dict[str, Kept] = {}
        self._unusable: set[str] = set()

    def open(self) -> None:
        """Make the folder where there is none, and clear what killed programs left.

        Raises:
            OutputError: there is none, or it cannot be written to.
        """
        try:
            self._make()
            writing.check_writable(self.folder / "new.prompt")
        except (OSError, ValueError, OutputError) as error:
            got = error.got if isinstance(error, OutputError) else getattr(error, "strerror", None) or error
            raise OutputError(f"{self.folder}", got=got, want="a folder that can be written to") from None
        self._make_room(0, math.inf)

    def look(self) -> None:
        """Take note of files that came or went, if any did."""
        with self._scan:
            try:
                changed = self.folder.stat().st_mtime_ns
                if changed == self._seen:
                    return
                names = {path.name for path in self.folder.iterdir() if _NAME.fullmatch(path.name)}
            except (OSError, ValueError):  # a NUL
                return
            self._seen = changed
            self._forget(*(self._names() - names))
            for name in sorted(names - self._names() - self._unusable):
                if name.startswith(self._prefix) and (contents := self._open(name, data=False)) is not None:
                    self._add(self._described(contents.state.tokens, contents.state, name))
                else:
                    self._unusable.add(name)

    def best(self, prompt: Tokens, least: int) -> Kept | None:
        """The file that saves most tokens of a prompt, if these are `least` or more."""
        with self._lock:
            kept = list(self._kept.values())
        found = max(kept, key=lambda one: one.reusable(prompt), default=None)
        return found if found is not None and found.reusable(prompt) >= least else None

    def shared(self, prompt: Tokens) -> int:
        """How much of a prompt a file begins with, whether or not it can be taken back so far."""
        with self._lock:
            kept = list(self._kept.values())
        return max((prompt.shared(one) for one in kept if one.begins(prompt)), default=0)

    def covers(self, tokens: Tokens) -> bool:
        """Whether a file has all of these."""
        return self.best(tokens, len(tokens)) is not None

    def read(self, kept: Kept) -> Contents | None:
        """All of a file, which is used now; None when it is gone.

        Raises:
            SessionError: it is damaged, and is no more.
        """
        try:
            contents = self._open(kept.name, data=True)
        except SessionError:
            self._drop(kept.name)
            raise
        if contents is None:
            self._forget(kept.name)
        else:
            with suppress(OSError):
                os.utime(self.folder / kept.name)
        return contents

    def write(
        self,
        tokens: Tokens,
        identity: Identity,
        state: CacheState,
        arrays: Mapping[str, HostArray],
        *,
        used: float,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """Keep a timeline; files that it can replace go, and those that were not used for longest where room ends.

        Args:
            tokens: those in the caches.
            identity: what they were computed with.
            used: when it was, as time.time() says it; where there is no room left by files of before then, it is not
                written.
            between: called before each array; what it raises leaves everything as it was.

        Raises:
            OSError: it cannot be written.
        """
        kept = self._described(tokens, state)
        self._make()
        if not self._make_room(sum(values.nbytes for _, values in arrays.values()), used):
            return
        path = self.folder / kept.name
        with writing.replacing(path, follow=False) as file:
            state_file.write(file, identity, plain(state, tokens), arrays, between)
            file.flush()  # later writes would change the time
            os.utime(file.fileno(), (used, used))
        with self._lock:
            replaced = [old.name for old in self._kept.values() if kept.replaces(old) and old.name != kept.name]
        self._add(kept)
        for name in replaced:
            self._drop(name)
        self._make_room(0, math.inf)

    # --- the folder

    def _make(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _make_room(self, nbytes: int, used: float) -> bool:
        """Remove what was not used for longest, and not since `used`, until there is room for so many bytes more.

        Returns:
            whether there is.
        """
        found = []
        with suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(OSError):
                    if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        stat = entry.stat(follow_symlinks=False)
                        found.append((stat.st_mtime, stat.st_size, entry.name))
        total = sum(size for _, size, _ in found) + nbytes
        for last, size, name in sorted(found):
            if total <= self.budget or last > used:
                break
            self._drop(name)
            total -= size
        return total <= self.budget

    def _open(self, name: str, *, data: bool) -> Contents | None:
        """What a file holds; None when it cannot be opened or, without `data`, is none of ours.

        Raises:
            SessionError: with `data`: it is damaged.
        """
        try:
            with open_regular(self.folder / name) as file:
                contents = state_file.read(file, name, self._loaded, self._caches, data=data)
        except OSError:
            return None
        except SessionError:
            if data:
                raise
            return None
        return contents if contents.state.offset >= SHORTEST else None

    def _drop(self, name: str) -> None:
        self._forget(name)
        with suppress(OSError):
            (self.folder / name).unlink()

    # --- the index

    def _described(self, tokens: Tokens, state: State | CacheState, name: str = "") -> Kept:
        """What is to be known of a file with such a state."""
        read = tokens.head(state.offset)
        digest = hashlib.blake2b(read.keys.tobytes(), digest_size=16).hexdigest()
        extents = tuple((end, self._local(filled)) for end, filled in ((state.offset, state.filled), *state.borders))
        return Kept(name or f"{self._prefix}{digest}.prompt", read.keys, read.spans, extents, self._caches.window)

    def _local(self, filled: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(rows for layer, rows in zip(self._caches, filled, strict=True) if layer.window is not None)

    def _names(self) -> set[str]:
        with self._lock:
            return set(self._kept)

    def _add(self, kept: Kept) -> None:
        with self._lock:
            self._kept[kept.name] = kept

    def _forget(self, *names: str) -> None:
        with self._lock:
            for name in names:
                self._kept.pop(name, None)

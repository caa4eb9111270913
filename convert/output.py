"""A folder that appears whole or not at all: written under a temporary name beside its place, then renamed.

The temporary folder is `.NAME.<16 hex digits>.converting`, locked (flock) while it is worked on; what is replaced is
`.NAME.<the same>.replaced` between two renames. One whose lock can be taken is of a process that is gone: the next
conversion to the same place clears it, and puts a replaced folder back where nothing has taken its place.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_gemma3.boundary.writing import is_at, is_dead, lock, refusal
from mlx_gemma3.errors import OutputError

_WORKING, _REPLACED = "converting", "replaced"
_SPARE = 64 << 20  # bytes for what stands beside the weights
_in_work: list[_Work] = []


@contextmanager
def new_folder(out: Path, *, nbytes: int, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder to write into; it becomes `out` when the block ends well, and vanishes when it does not.

    Args:
        out: from `place`.
        nbytes: how much will be written; refused before the start where the disk has no room for it.
        overwrite: replace what is there, at the start or at the end.

    Raises:
        OutputError: `out` is in use, at the start or at the end, or the disk is full or not writable.
    """
    check_free(out, overwrite=overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(out)
        free = shutil.disk_usage(out.parent).free
        if free < nbytes + _SPARE:
            raise OutputError(
                f"{out.parent}",
                got=f"{free / 1e9:.1f} GB free",
                want=f"{(nbytes + _SPARE) / 1e9:.1f} GB",
                do="make room",
            )
        work = _Work(out)
        _in_work.append(work)
        try:
            work.begin()
            yield work.folder
            work.finish(overwrite=overwrite)
        finally:
            work.undo()
            _in_work.remove(work)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        raise refusal(out, error) from None


def abandon() -> None:
    """Remove what is in work, and put back what was about to be replaced: for a program that leaves at once."""
    for work in _in_work:
        work.undo()


def place(out: str | Path) -> Path:
    """The absolute path of the folder that a person names; of a link, what it leads to.

    Raises:
        OutputError: it is the folder that the program runs in, or one around it; `~name` of nobody, or a NUL.
    """
    try:
        found = Path(os.path.realpath(Path(out).expanduser()))
        here = Path(os.path.realpath(Path.cwd()))
    except (OSError, RuntimeError, ValueError) as error:
        raise refusal(out, error) from None
    if found == here or found in here.parents:
        raise OutputError(f"{out}", got="the folder that you are in", want="the name of a new one")
    return found


def check_free(out: Path, *, overwrite: bool) -> None:
    """Refuse a place that is in use. Raises OutputError."""
    try:
        if out.is_dir() and not any(out.iterdir()):
            return
    except OSError as error:
        raise refusal(out, error) from None
    if os.path.lexists(out) and not (overwrite and out.is_dir()):
        raise _in_use(out, "something there already")


def check_apart(out: Path, sources: Iterable[Path]) -> None:
    """Refuse a place that holds a file or folder that is read, or lies in such a folder. Raises OutputError."""
    for source in sources:
        real = Path(os.path.realpath(source))
        inside = [Path(os.path.realpath(entry)) for entry in real.iterdir()] if real.is_dir() else []
        if real in out.parents or any(out == held or out in held.parents for held in (real, *inside)):
            raise OutputError(f"{out}", got="a place in or around the source", want="one apart from it")


class _Work:
    """A folder in work, on its way to its place."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._locks: list[int] = []
        self._name_parts()

    def _name_parts(self) -> None:
        mark = os.urandom(8).hex()
        self.folder = self.out.with_name(f".{self.out.name}.{mark}.{_WORKING}")
        self._old = self.out.with_name(f".{self.out.name}.{mark}.{_REPLACED}")

    def begin(self) -> None:
        """Make the temporary folder and lock it."""
        while True:
            self.folder.mkdir()
            with suppress(FileNotFoundError):  # here and below: somebody who clears took it for dead in between
                held = _opened(self.folder)
                self._locks.append(held)
                lock(held)
                if is_at(held, self.folder):
                    return
            self._name_parts()

    def finish(self, *, overwrite: bool) -> None:
        """Rename, over an empty folder at most unless told to `overwrite`."""
        while overwrite and self.out.is_dir() and not self.out.is_symlink():
            held = _opened(self.out)
            self._locks.append(held)
            with suppress(BlockingIOError):  # who clears must not put it back
                lock(held)
            self.out.rename(self._old)
            try:
                self._appear()
                return
            except OutputError:  # another one was faster: it is replaced too
                _remove(self._old)
        self._appear()

    def _appear(self) -> None:
        try:
            self.folder.rename(self.out)  # an empty folder is replaced, nothing else is: POSIX, rename
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise _in_use(self.out, "something that has come there meanwhile") from None
            raise

    def undo(self) -> None:
        """Remove what is left beside the place; what was moved aside goes back when its place is free."""
        _remove(self.folder)
        _put_back(self._old, self.out)
        while self._locks:
            os.close(self._locks.pop())


def _in_use(out: Path, got: str) -> OutputError:
    do = "take another name" if out.exists() and not out.is_dir() else "take another name, or say --overwrite"
    return OutputError(f"{out}", got=got, want="a new or an empty folder", do=do)


def _clear_abandoned(out: Path) -> None:
    """Remove what processes that are gone have left of their work on `out`."""
    ours = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{16}}\.({_WORKING}|{_REPLACED})", re.DOTALL)
    for path in list(out.parent.iterdir()):
        found = ours.fullmatch(path.name)
        if found is None:
            continue
        with suppress(OSError):  # no folder, a link, not ours to read
            held = _opened(path)
            try:
                if is_dead(held) and found[1] == _REPLACED:
                    _put_back(path, out)
                elif is_dead(held):
                    _remove(path)
            finally:
                os.close(held)


def _put_back(old: Path, out: Path) -> None:
    """Of a folder that was moved aside: back to its place, or away where another stands there."""
    if not old.is_dir():
        return
    if not os.path.lexists(out):
        with suppress(OSError):
            old.rename(out)
            return
    _remove(old)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

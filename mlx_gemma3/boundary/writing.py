"""Writes files that appear whole or not at all: under a temporary name beside their place, then renamed.

Owns where a named file is written in the end (`~`, links), what is no place for a file (folders, pipes, devices), and
the removal of what killed processes leave behind. A temporary file is `.NAME.<16 hex digits>.writing`, and locked
(flock) while it is written: one whose lock can be taken is dead. Process ids would not tell, for two containers may
share a folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import OutputError
from .reading import NotRegular, file_kind, open_regular

PATIENCE = 5.0  # seconds for which somebody else's lock is waited for
_MARK = ".writing"
_PART = re.compile(r"\..+\.[0-9a-f]{16}" + re.escape(_MARK), re.DOTALL)
_NAME = 40  # characters of a name that its temporary name repeats: at most 160 of a name's 255 bytes


def destination(path: str | Path, *, follow: bool = True) -> Path:
    """The absolute path that is written when a person names `path`.

    Args:
        follow: a link stays a link, and what it leads to is written. If False, the link itself is replaced.

    Raises:
        OSError: `~name` of nobody, a NUL, links in a circle; a file that may not be written; NotRegular for a folder,
            pipe, socket or device.
    """
    try:
        place = Path(path).expanduser()
        place = Path(os.path.realpath(place)) if follow else place.absolute()
        mode = place.stat(follow_symlinks=follow).st_mode
    except FileNotFoundError:
        return place
    except (RuntimeError, ValueError) as reason:  # no home folder; a NUL
        raise OSError(errno.EINVAL, str(reason), str(path)) from None
    if stat.S_ISLNK(mode):
        return place
    if not stat.S_ISREG(mode):
        raise NotRegular(0, file_kind(mode), str(path))
    if not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, "a file that is protected against writing", str(path))
    return place


def check_writable(path: str | Path) -> Path:
    """Find out now whether `path` can be written later; returns its `destination`.

    Raises:
        OutputError: it cannot be.
    """
    try:
        place = destination(path)
        folder = place.parent
        while not os.path.lexists(folder):  # it will be made, as far as one can see
            folder = folder.parent
        file, working = _begin(folder / place.name, 0o600)
        file.close()
        working.unlink()
        clear_abandoned(folder)
    except OSError as error:
        raise refusal(path, error) from None
    return place


def refusal(path: str | Path, error: Exception) -> OutputError:
    """What is told of an error while writing."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{path}", got="a full disk (no space left)", want="room for the file", do="make room")
    want = "a regular file" if isinstance(error, NotRegular) else "a place that can be written"
    return OutputError(f"{path}", got=getattr(error, "strerror", None) or error, want=want)


@contextmanager
def replacing(
    path: str | Path,
    *,
    mode: int = 0o600,
    follow: bool = True,
    check: Callable[[BinaryIO | None], object] | None = None,
) -> Iterator[BinaryIO]:
    """Yield a file to write (and read) that becomes `path` when the block ends well, and vanishes when it does not.

    Args:
        mode: of the new file, less what the process's umask takes away.
        follow: as of `destination`.
        check: called just before, with what stands there (locked, so that no other `replacing` of this kind comes
            between) or None for nothing. What it raises leaves everything as it was.

    Raises:
        OSError: it cannot be written; what was there before stays. BlockingIOError: another program holds the file.
    """
    place = destination(path, follow=follow)
    place.parent.mkdir(parents=True, exist_ok=True)
    clear_abandoned(place.parent)
    file, working = _begin(place, mode)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name without the content
            if check is None:
                working.replace(place)
            else:
                _replace_checked(working, place, check)
    finally:
        with suppress(OSError):
            working.unlink()


def write_whole(path: str | Path, data: bytes, *, mode: int = 0o600, follow: bool = True) -> None:
    """Write a whole file; arguments and errors are those of `replacing`."""
    with replacing(path, mode=mode, follow=follow) as file:
        file.write(data)


def clear_abandoned(folder: Path) -> None:
    """Remove the temporary files of processes that are gone. What cannot be removed is left."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _PART.fullmatch(entry.name):
                with suppress(OSError), _opened(Path(entry.path)) as file:
                    if is_dead(file):
                        Path(entry.path).unlink()


def is_dead(file: int | BinaryIO) -> bool:
    """Take the lock of an open file or folder at once. False when somebody holds it, or where a disk has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def lock(file: int | BinaryIO) -> None:
    """Take the lock of an open file or folder, until that is closed; where a disk has no locks, do without.

    Raises:
        BlockingIOError: another program has held it for PATIENCE seconds.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise BlockingIOError(errno.EWOULDBLOCK, "a file that another program holds locked") from None
            time.sleep(0.01)
            continue
        except OSError:
            return
        return


def is_at(file: int | BinaryIO, path: Path) -> bool:
    """Whether `path` still leads to this open file or folder."""
    held = os.fstat(file if isinstance(file, int) else file.fileno())
    try:
        return os.path.samestat(held, os.lstat(path))
    except OSError:
        return False


def _opened(path: Path) -> BinaryIO:
    """A regular file that is no link."""
    if path.is_symlink():
        raise NotRegular(0, "a link", str(path))
    return open_regular(path)


def _begin(place: Path, mode: int) -> tuple[BinaryIO, Path]:
    """A new temporary file beside `place`, locked."""
    while True:
        working = place.with_name(f".{place.name[:_NAME]}.{os.urandom(8).hex()}{_MARK}")
        handle = os.open(working, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        file = os.fdopen(handle, "w+b")
        try:
            lock(file)
            if is_at(file, working):  # else somebody who clears took it for dead in between
                return file, working
        except BaseException:
            working.unlink(missing_ok=True)
            file.close()
            raise
        file.close()


def _replace_checked(working: Path, place: Path, check: Callable[[BinaryIO | None], object]) -> None:
    """Rename, once `check` agrees with what stands there at that very moment."""
    while True:
        try:
            standing = _opened(place)
        except FileNotFoundError:
            check(None)
            if _appear(working, place):
                return
            continue  # something has come meanwhile
        with standing:
            lock(standing)
            if is_at(standing, place):
                check(standing)
                working.replace(place)
                return


def _appear(working: Path, place: Path) -> bool:
    """Rename to a place where nothing is. False when something is."""
    try:
        os.link(working, place)
    except FileExistsError:
        return False
    except OSError:  # a disk without links: claim the name, then rename over it
        try:
            os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            return False
        working.replace(place)
    return True

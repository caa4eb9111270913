"""A folder that appears whole or not at all: written under a temporary name beside its place, then renamed.

A process that is killed leaves `.NAME.PID.converting` behind; the next conversion to the same place clears it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_gemma3.errors import OutputError

_MARK = ".converting"
_SPARE = 64 << 20  # bytes for what stands beside the weights


@contextmanager
def new_folder(out: Path, *, nbytes: int, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder to write into; it becomes `out` when the block ends well, and vanishes when it does not.

    Args:
        nbytes: how much will be written; refused before the start where the disk has no room for it.
        overwrite: replace what is there.

    Raises:
        OutputError: `out` is in use, or the disk is full or not writable.
    """
    check_free(out, overwrite=overwrite)
    working = out.with_name(f".{out.name}.{os.getpid()}{_MARK}")
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
        working.mkdir()
        yield working
        _replace(working, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{out}", got="a full disk", want="room for the whole folder", do="make room") from None
        if error.filename is None and error.errno is None:
            raise
        raise OutputError(f"{out}", got=error.strerror or error, want="a place that can be written") from None
    finally:
        shutil.rmtree(working, ignore_errors=True)


def check_free(out: Path, *, overwrite: bool) -> None:
    """Refuse a place that is in use. Raises OutputError."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if os.path.lexists(out) and not (overwrite and out.is_dir()):
        do = "take another name" if out.exists() and not out.is_dir() else "take another name, or say --overwrite"
        raise OutputError(f"{out}", got="something there already", want="a new or an empty folder", do=do)


def _replace(working: Path, out: Path) -> None:
    if not out.exists():
        working.rename(out)
        return
    old = working.with_name(working.name + ".old")
    out.rename(old)
    working.rename(out)
    shutil.rmtree(old)


def _clear_abandoned(out: Path) -> None:
    """Remove what processes that are gone have left of their work on `out`."""
    for path in out.parent.glob(f".{out.name}.*{_MARK}*"):
        number = path.name.removeprefix(f".{out.name}.").partition(".")[0]
        if not number.isdigit() or _runs(int(number)):
            continue
        if path.name.endswith(".old") and not out.exists():
            path.rename(out)  # killed between the two renames: the old folder is whole
        else:
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()

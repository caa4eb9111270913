"""Where this package keeps files of its own: what it has rebuilt, and what a person typed; nothing downloaded."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from pathlib import Path

CACHE_VARIABLE = "MLX_GEMMA3_CACHE"
DATA_VARIABLE = "MLX_GEMMA3_DATA"


def cache_folder() -> Path:
    """The folder for rebuilt files, which need not exist yet. Deleting it costs time, never an answer, and so does a
    user without a home: then it is a temporary folder.

    $MLX_GEMMA3_CACHE if set, else ~/Library/Caches/mlx-gemma3 on macOS, else $XDG_CACHE_HOME/mlx-gemma3, and
    ~/.cache/mlx-gemma3 without it (XDG Base Directory Specification: a relative value is ignored).
    """
    return _folder(CACHE_VARIABLE, "Caches", "XDG_CACHE_HOME", Path(".cache"))


def data_folder() -> Path:
    """The folder for what cannot be made again (the lines typed in chats), which need not exist yet.

    $MLX_GEMMA3_DATA if set, else ~/Library/Application Support/mlx-gemma3 on macOS, else $XDG_DATA_HOME/mlx-gemma3,
    and ~/.local/share/mlx-gemma3 without it.
    """
    return _folder(DATA_VARIABLE, "Application Support", "XDG_DATA_HOME", Path(".local", "share"))


def may_exist(path: str) -> bool:
    """Whether somebody's words are a path that is there; True too where that cannot be asked, for whoever reads it says
    why: too long, no such user, a NUL.
    """
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return True


def temporary_folder() -> Path:
    """A folder for rebuilt files where the usual one cannot be: below the system's temporary folder, this user's own.

    What others may write there is not believed: where such a folder has been put by somebody else, the path returned is
    one at which nothing can be written or found.
    """
    with contextlib.suppress(OSError):
        path = Path(tempfile.gettempdir(), f"mlx-gemma3-{os.getuid()}")
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return path
    return Path(os.devnull, "mlx-gemma3")


def _folder(variable: str, library: str, base_variable: str, base_default: Path) -> Path:
    try:
        if chosen := os.environ.get(variable):
            return Path(chosen).expanduser()
        if sys.platform == "darwin":
            return Path.home() / "Library" / library / "mlx-gemma3"
        base = Path(os.environ.get(base_variable, ""))
        return (base if base.is_absolute() else Path.home() / base_default) / "mlx-gemma3"
    except RuntimeError:  # no home, or `~` of nobody
        return temporary_folder()

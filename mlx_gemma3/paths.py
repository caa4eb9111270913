"""Where this package keeps files of its own: vocabularies and checkpoints that it has rebuilt, nothing downloaded.

Beside config.py because prompt/ and checkpoint/ both need it. Deleting the folder costs time, never an answer.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

CACHE_VARIABLE = "MLX_GEMMA3_CACHE"


def cache_folder() -> Path:
    """The folder for rebuilt files, which need not exist yet.

    $MLX_GEMMA3_CACHE if set, else ~/Library/Caches/mlx-gemma3 on macOS, else $XDG_CACHE_HOME/mlx-gemma3, and
    ~/.cache/mlx-gemma3 without it (XDG Base Directory Specification: a relative value is ignored).
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx-gemma3"
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "mlx-gemma3"

"""What is done with a hostile file, by kind: each function opens one as a user would, and raises what is wrong."""

from __future__ import annotations

from pathlib import Path


def config(path: Path) -> None:
    """A config.json."""
    from mlx_gemma3 import Config

    Config.from_file(path)

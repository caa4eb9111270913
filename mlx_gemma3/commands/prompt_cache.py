"""The flags of commands that hold an engine for long: where prompts that leave memory are kept, and how many bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..boundary.sizes import read_size

Folder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="A folder for prompts that leave memory: each is read once.", show_default=False),
]
Size = Annotated[str, typer.Option(help="Of that folder; what was not used for longest is deleted.")]


def kept_in(folder: Path | None, size: str) -> dict[str, Any]:
    """The keyword arguments of `Engine` for these flags. Raises OptionError: a size that is none."""
    nbytes = read_size("--prompt-cache-size", size)
    return {} if folder is None else {"prompt_cache": folder.absolute(), "prompt_cache_bytes": nbytes}

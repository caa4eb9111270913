"""What is done with a hostile file, by kind: each function opens one as a user would, and raises what is wrong."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_gemma3 import Engine


def config(path: Path) -> None:
    """A config.json."""
    from mlx_gemma3 import Config

    Config.from_file(path)


@functools.cache
def _engine(folder: Path) -> Engine:
    from mlx_gemma3 import load

    return load(folder, quiet=True)


def session(path: Path) -> None:
    """A saved conversation, with the model in the folder `model` beside it: it is gone on with."""
    talk = _engine(path.parent / "model").session(resume=path)
    options = {"max_tokens": 2, "temperature": 0.0}
    _ = talk.messages, talk.tokens
    if talk.messages[-1:] != [] and talk.messages[-1]["role"] == "assistant":
        talk.retry(**options).reply
    talk.send("the user", **options).reply
    for _ in range(2):
        talk.undo()
    talk.send("the", **options).reply
    talk.save(path.with_name("again"))

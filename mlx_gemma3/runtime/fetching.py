"""Whether a model is here already, asked before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path

from ..checkpoint.hub import library_cache
from ..checkpoint.source import ALIASES


def must_be_fetched(model: str) -> bool:
    """Whether a name means a repository of which this machine has no whole copy: better fetched before the prompt,
    where its progress can be seen. A guess from the cache's folders; being wrong costs only the sight of a bar.
    """
    target = ALIASES.get(model, model)
    if not isinstance(target, str) or not re.match(r"[\w.-]+/[\w.-]+", target) or _exists(model):
        return False
    owner, name = target.split("@")[0].split("/")[:2]
    copy = library_cache() / f"models--{owner}--{name}"
    return not any(copy.glob("snapshots/*/*")) or any(copy.glob("blobs/*.incomplete"))


def _exists(model: str) -> bool:
    try:
        return Path(model).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # what it is, `resolve` says
        return True

"""Whether a model is here already, asked before anything is loaded."""

from __future__ import annotations

import re

from ..boundary.paths import may_exist


def must_be_fetched(model: str) -> bool:
    """Whether a name means a repository of which this machine has no whole copy: better fetched before the prompt,
    where its progress can be seen. A guess from the cache's folders; being wrong costs only the sight of a bar.
    """
    from ..checkpoint.source import ALIASES  # here, so that a prompt waits for neither

    target = ALIASES.get(model, model)
    if not isinstance(target, str) or not re.match(r"[\w.-]+/[\w.-]+", target) or may_exist(model):
        return False
    from ..checkpoint.hub import library_cache

    owner, name = target.split("@")[0].split("/")[:2]
    copy = library_cache() / f"models--{owner}--{name}"
    return not any(copy.glob("snapshots/*/*")) or any(copy.glob("blobs/*.incomplete"))

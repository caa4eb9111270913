"""`--adapter NAME=PATH`: adapters as they are named on a command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import OptionError

HELP = "An adapter, as NAME=PATH or the PATH of its folder alone"
_NAMED = re.compile(r"([\w.-]+)=(.+)")


def named(texts: Sequence[str] | None) -> dict[str, str]:
    """Folders by name; a path alone is called as the folder is, without an ending .adapter.

    Raises:
        OptionError: no path, or one name for two.
    """
    found: dict[str, str] = {}
    for text in texts or ():
        match = _NAMED.fullmatch(text)
        if match is not None and not Path(text).expanduser().exists():
            name, path = match.groups()
        else:
            path = text
            name = re.sub(r"[^\w.-]+", "-", Path(text).expanduser().resolve().name.removesuffix(".adapter"))
        if not path or not name:
            raise OptionError("--adapter", got=repr(text), want="NAME=PATH")
        if name in found:
            raise OptionError("--adapter", got=f"two called {name}", want="a name for each", do="say NAME=PATH")
        found[name] = path
    return found


def only(texts: Sequence[str] | None) -> dict[str, str]:
    """The one adapter that all that is written has. Raises OptionError: several."""
    found = named(texts)
    if len(found) > 1:
        raise OptionError("--adapter", got=" and ".join(found), want="one: answers are written with one adapter")
    return found

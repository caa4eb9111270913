"""A conversation in a file: what was said, and the caches that hold it (state_file.py says how).

A conversation knows the digests of the files that it was read from or written to: only these it replaces, so that of
two programs with one file the second is told, and nothing that was said is lost.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ..boundary import writing
from ..boundary.reading import open_regular
from ..errors import OutputError, SessionError
from . import state_file
from .conversation import Conversation
from .follow import state_of
from .scheduler import Scheduler
from .session_state import PICTURE, plain


def write(path: str | Path, conversation: Conversation, scheduler: Scheduler, *, replace: bool = True) -> None:
    """Write under a temporary name, then rename: the old file or the new one, never a third thing.

    Args:
        replace: a file that this conversation has not been in before is replaced.

    Raises:
        OutputError: the file cannot be written, or holds what this conversation does not know.
    """
    for name in list(conversation.pixels):  # of a turn that was cancelled before they were encoded
        conversation.rows(name, partial(scheduler.encode, name, adapter=conversation.timeline.caches.adapter))
    identity = conversation.timeline.identity
    assert identity is not None, "the scheduler's have one"
    caches = state_of(conversation.timeline.caches)
    arrays = {f"{PICTURE}{name}": rows for name, rows in conversation.features.items()} | dict(caches.arrays)
    state = plain(caches, conversation.timeline.tokens, conversation.system, conversation.exchanges)
    try:
        place = writing.destination(path)

        def check(standing: BinaryIO | None) -> None:
            unknown = standing is not None and state_file.said_digest(standing) not in conversation.versions
            if unknown and place in conversation.places:
                raise _lost(path, "a file that another program has changed since it was read")
            if unknown and not replace:
                raise _lost(path, "a file that this conversation has not been read from")

        with writing.replacing(place, check=check) as file:
            digest = state_file.write(file, identity, state, state_file.host_arrays(arrays), scheduler.beat)
    except OSError as error:
        raise writing.refusal(path, error) from None
    conversation.versions.add(digest)
    conversation.places.add(place)


def _lost(path: str | Path, got: str) -> OutputError:
    return OutputError(
        f"{path}", got=got, want="what this conversation knows", do="nothing was overwritten: save under another name"
    )


def read(path: str | Path, scheduler: Scheduler, adapter: str | None = None) -> Conversation:
    """Read a conversation that this model can go on with.

    Args:
        adapter: the one that it must have been written with; None for its own.

    Raises:
        SessionError: no such file, no regular one, damaged, forged, of a newer version, or of another model or other
            settings.
    """
    try:
        with open_regular(Path(path).expanduser()) as file:
            contents = state_file.read(file, path, scheduler.loaded, scheduler.new_timeline().caches)
        conversation = scheduler.new_conversation(None, contents.adapter)
        arrays = state_file.restore(contents, conversation.timeline)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: `~name` of nobody; ValueError: a NUL
        raise SessionError(f"{path}", got=getattr(error, "strerror", None) or error, want=state_file.WANT) from None
    if adapter is not None and conversation.timeline.identity != scheduler.loaded.identity_with(adapter):
        got = "no adapter" if contents.adapter is None else f"the adapter {contents.adapter}"
        raise SessionError(f"{path}", got=f"a conversation with {got}", want=f"one with {adapter}")
    conversation.system, conversation.exchanges = contents.state.system, list(contents.state.exchanges)
    conversation.features = {
        name.removeprefix(PICTURE): rows for name, rows in arrays.items() if name.startswith(PICTURE)
    }
    conversation.versions.add(contents.digest)
    conversation.places.add(Path(os.path.realpath(Path(path).expanduser())))
    return conversation

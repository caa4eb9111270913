"""A conversation in a file: what was said, and the caches that hold it.

The file is safetensors (one tensor for each part of each layer's keys and values, and the rows of each picture), its
metadata the rest as JSON (session_state.py). A digest covers every byte, so a file that was cut or changed is refused;
what was changed on purpose, the digest with it, is read field by field and believed where it could have been written.

A conversation knows the digests of the files that it was read from or written to: only these it replaces, so that of
two programs with one file the second is told, and nothing that was said is lost.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from ..boundary import writing
from ..boundary.reading import MOST_JSON, open_regular, parse_json
from ..errors import OutputError, SessionError
from ..model.cache import Caches, CacheState
from ..visible import listed
from .conversation import Conversation
from .scheduler import Scheduler
from .session_state import BORDER_LOGITS, PICTURE, State, optional_shapes, plain, read_state, shapes

FORMAT, VERSION = "mlx-gemma3 session", 1
_NO_DIGEST = "0" * 64
_KEY = b'"digest":"'
_HEAD = 1 << 20  # bytes from the file's start within which its digest stands
_WANT = "a saved conversation"
# safetensors' names: how numpy reads them, and as what MLX takes them then
_DTYPES: Mapping[str, tuple[type[np.generic], mx.Dtype]] = {
    "F32": (np.float32, mx.float32),
    "F16": (np.float16, mx.float16),
    "BF16": (np.uint16, mx.bfloat16),
    "U32": (np.uint32, mx.uint32),
}


def write(path: str | Path, conversation: Conversation, scheduler: Scheduler, *, replace: bool = True) -> None:
    """Write under a temporary name, then rename: the old file or the new one, never a third thing.

    Args:
        replace: a file that this conversation has not been in before is replaced.

    Raises:
        OutputError: the file cannot be written, or holds what this conversation does not know.
    """
    for name in list(conversation.pixels):  # of a turn that was cancelled before they were encoded
        conversation.rows(name, partial(scheduler.encode, name, adapter=conversation.timeline.caches.adapter))
    caches = conversation.timeline.caches.state()
    arrays = {f"{PICTURE}{name}": rows for name, rows in conversation.features.items()} | dict(caches.arrays)
    state = {
        "version": VERSION,
        "fingerprint": scheduler.loaded.identity.weights,
        "settings": _settings(scheduler) | _adapter(conversation),
        **plain(conversation, caches),
    }
    arrays = {name: mx.contiguous(array) for name, array in arrays.items()} or {"empty": mx.zeros((1,))}
    metadata = {"format": FORMAT, "digest": _NO_DIGEST, "state": json.dumps(state)}
    try:
        place = writing.destination(path)

        def check(standing: BinaryIO | None) -> None:
            unknown = standing is not None and _said_digest(standing) not in conversation.versions
            if unknown and place in conversation.places:
                raise _lost(path, "a file that another program has changed since it was read")
            if unknown and not replace:
                raise _lost(path, "a file that this conversation has not been read from")

        with writing.replacing(place, check=check) as file:
            mx.save_safetensors(file, arrays, metadata)
            digest = _sign(file)
    except (OSError, RuntimeError) as error:  # RuntimeError: MLX could not write
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
            conversation = _read(file, path, scheduler)
            _check_adapter(conversation, path, scheduler, adapter)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: `~name` of nobody; ValueError: a NUL
        raise SessionError(f"{path}", got=getattr(error, "strerror", None) or error, want=_WANT) from None
    conversation.places.add(Path(os.path.realpath(Path(path).expanduser())))
    return conversation


def _read(file: BinaryIO, path: str | Path, scheduler: Scheduler) -> Conversation:
    header, start = _header(file, path)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise SessionError(f"{path}", got="a safetensors file of another kind", want=_WANT)
    said, state = metadata.get("digest"), metadata.get("state")
    state = parse_json(state, f"{path}", SessionError, want=_WANT) if isinstance(state, str) else None
    if not isinstance(state, dict):
        raise SessionError(f"{path}", got="a file that is damaged", want=_WANT)
    if state.get("version") != VERSION:
        raise SessionError(
            f"{path}", got=f"format version {state.get('version')}", want=VERSION, do="use the program that wrote it"
        )
    if said != _digest(file):
        raise SessionError(f"{path}", got="a file that was cut or changed", want="every byte as it was written")
    loaded = scheduler.loaded
    if state.get("fingerprint") != loaded.identity.weights:
        raise SessionError(
            f"{path}", got="a conversation with another model", want=f"one with {loaded.checkpoint.name}"
        )
    settings, now = state.get("settings"), _settings(scheduler)
    adapter = settings.pop("adapter", None) if isinstance(settings, dict) else None
    if settings != now:
        known = settings.items() if isinstance(settings, dict) else ()
        differ = ", ".join(f"{name} {value}" for name, value in known if now.get(name) != value)
        raise SessionError(
            f"{path}", got=f"a conversation with {differ or 'no settings'}", want="the settings of this engine"
        )
    conversation = scheduler.new_conversation(None, _loaded_adapter(adapter, path, scheduler))
    caches = conversation.timeline.caches
    believed = read_state(state, path, caches, loaded.config)
    size = os.fstat(file.fileno()).st_size - start
    arrays = _arrays(file, start, _entries(header, believed, caches, scheduler, path, size))
    caches.restore(CacheState(believed.offset, believed.filled, believed.border, arrays))
    conversation.timeline.tokens = believed.tokens
    conversation.system, conversation.exchanges = believed.system, list(believed.exchanges)
    conversation.features = {
        name.removeprefix(PICTURE): rows for name, rows in arrays.items() if name.startswith(PICTURE)
    }
    conversation.versions.add(str(said))
    return conversation


def _header(file: BinaryIO, path: str | Path) -> tuple[dict[str, Any], int]:
    """The JSON at the file's start, and where the data begin."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    raw = file.read(length) if 0 < length <= min(size - 8, MOST_JSON) else b""
    if not raw.startswith(b"{"):
        raise SessionError(f"{path}", got="something else, or a file that is damaged", want=_WANT)
    header = parse_json(raw, f"{path}", SessionError, want=_WANT)
    assert isinstance(header, dict), "it begins with a brace"
    return header, 8 + length


def _entries(
    header: dict[str, Any], state: State, caches: Caches, scheduler: Scheduler, path: str | Path, nbytes: int
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names, dtypes and shapes of the arrays in the order of their data, each as it must be.

    Raises:
        SessionError: one is missing, too many, of another shape or dtype, or their data are not `nbytes` without gaps.
    """
    config = scheduler.loaded.config
    must = shapes(state, caches, config)
    wanted = optional_shapes(state, header, config) | must
    wrong = partial(SessionError, want="the arrays of the conversation it tells of", do="delete it")
    if missing := must.keys() - header.keys():
        raise wrong(f"{path}", got=f"no {min(missing)}")
    entries: list[tuple[list[int], str, str, tuple[int, ...]]] = []
    for name, entry in header.items():
        allowed, size = wanted.get(name, ((), ()))
        kind, shape, ends = _entry(entry)
        if kind not in allowed or shape != list(size):
            raise wrong(f"{path}: {name}", got=f"{kind} {shape} at {ends}")
        entries.append((ends, name, kind, size))
    entries.sort()
    floats = {kind for _, name, kind, _ in entries if name != BORDER_LOGITS and name.startswith(("layer.", "border."))}
    if len(floats - {"U32"}) > 1:
        raise wrong(f"{path}", got=f"rows in {listed(floats)}")
    end = 0
    for (start, stop), name, kind, size in entries:
        if (start, stop) != (end, end + math.prod(size) * np.dtype(_DTYPES[kind][0]).itemsize):
            raise wrong(f"{path}: {name}", got=f"bytes {start} to {stop}")
        end = stop
    if end != nbytes:
        raise wrong(f"{path}", got=f"{nbytes} bytes of {end}")
    return [(name, kind, size) for _, name, kind, size in entries]


def _entry(entry: object) -> tuple[str, object, list[int]]:
    """What a header says of an array: dtype, shape, and where its data begin and end; "" as dtype when it does not."""
    kind, shape, ends = map(entry.get, ("dtype", "shape", "data_offsets")) if isinstance(entry, dict) else [None] * 3
    if isinstance(kind, str) and isinstance(ends, list) and [type(end) for end in ends] == [int, int]:
        return kind, shape, ends
    return "", shape, []


def _arrays(file: BinaryIO, start: int, entries: list[tuple[str, str, tuple[int, ...]]]) -> dict[str, mx.array]:
    """Read them, one after another. Raises OSError when the file has become shorter."""
    file.seek(start)
    arrays = {}
    for name, kind, shape in entries:
        dtype, target = _DTYPES[kind]
        raw = file.read(math.prod(shape) * np.dtype(dtype).itemsize)
        try:
            values = np.frombuffer(raw, dtype).reshape(shape)
        except ValueError:
            raise OSError(0, "a file that another program cuts while it is read") from None
        array = mx.array(values)
        arrays[name] = array.view(mx.bfloat16) if target == mx.bfloat16 else array
        mx.eval(arrays[name])
    return arrays


def _settings(scheduler: Scheduler) -> dict[str, Any]:
    """What the caches' contents depend on beside the weights."""
    identity = scheduler.loaded.identity
    return {"dtype": identity.dtype, "kv_bits": identity.kv_bits, "local_kv_bits": identity.local_kv_bits}


def _adapter(conversation: Conversation) -> dict[str, Any]:
    """One setting more; none without an adapter, as in files from before there were any."""
    caches, identity = conversation.timeline.caches, conversation.timeline.identity
    if caches.adapter is None or identity is None:
        return {}
    return {"adapter": {"name": caches.adapter, "fingerprint": identity.adapter}}


def _loaded_adapter(said: object, path: str | Path, scheduler: Scheduler) -> str | None:
    """The name here of the adapter that a file was written with. Raises SessionError: it is not loaded."""
    if said is None:
        return None
    fields = said if isinstance(said, dict) else {}
    name = scheduler.loaded.adapter_of(str(fields.get("fingerprint")))
    if name is None:
        raise SessionError(
            f"{path}",
            got=f"a conversation with the adapter {fields.get('name')}",
            want="that adapter, as it was then",
            do="load the model with it",
        )
    return name


def _check_adapter(conversation: Conversation, path: str | Path, scheduler: Scheduler, asked: str | None) -> None:
    own = conversation.timeline.caches.adapter
    if asked is not None and conversation.timeline.identity != scheduler.loaded.identity_with(asked):
        got = "no adapter" if own is None else f"the adapter {own}"
        raise SessionError(f"{path}", got=f"a conversation with {got}", want=f"one with {asked}")


def _sign(file: BinaryIO) -> str:
    """Put the digest of the whole file, itself as zeros, into its place; returns it."""
    signed = _digest(file)
    file.seek(0)
    file.seek(file.read(_HEAD).index(_KEY) + len(_KEY))
    file.write(signed.encode())
    return signed


def _said_digest(file: BinaryIO) -> str:
    """What a file says that its digest is; "" when it says nothing."""
    file.seek(0)
    _, key, rest = file.read(_HEAD).partition(_KEY)
    return rest[:64].decode("latin-1") if key else ""


def _digest(file: BinaryIO) -> str:
    """blake2b of the file with the 64 characters of its digest as zeros."""
    digest = hashlib.blake2b(digest_size=32)
    file.seek(0)
    head = file.read(_HEAD)
    key = head.find(_KEY)
    if key >= 0:
        at = key + len(_KEY)
        head = head[:at] + _NO_DIGEST.encode() + head[at + 64 :]
    digest.update(head)
    while piece := file.read(1 << 22):
        digest.update(piece)
    return digest.hexdigest()

"""The file that holds a timeline: of a conversation (session_file.py), or of a prompt without one (prompt_cache.py).

The file is safetensors (one tensor for each part of each layer's keys and values, and the rows of each picture), its
metadata the rest as JSON (session_state.py). A digest covers every byte, so a file that was cut or changed is refused;
what was changed on purpose, the digest with it, is read field by field and believed where it could have been written.

Arrays are taken over in the engine's thread, without a copy (`host_arrays`), and given back to it (`restore`); all
between is numpy, for any thread.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..boundary.reading import MOST_JSON, parse_json
from ..errors import SessionError
from ..model.cache import Caches
from ..model.cache_state import CacheState
from ..visible import listed
from . import follow
from .loaded import Loaded
from .session_state import State, optional_shapes, read_state, shapes
from .timeline import Identity, Timeline

FORMAT, VERSION = "mlx-gemma3 session", 1
WANT = "a saved conversation"
_NO_DIGEST = "0" * 64
_KEY = b'"digest":"'
_HEAD = 1 << 20  # bytes from the file's start within which its digest stands
# safetensors' names, and how numpy holds them
_DTYPES: Mapping[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32}
_NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32"}
HostArray = tuple[str, NDArray[Any]]  # safetensors' name of the dtype, and the values
_Entry = tuple[str, str, tuple[int, ...]]  # an array's name, dtype and shape


@dataclass(frozen=True)
class Contents:
    """What a file holds, read and checked, but for the data where nobody asked for them."""

    state: State
    digest: str
    arrays: Mapping[str, tuple[str, mx.array]]  # with the dtype's name: BF16 are still the bits, as uint16
    adapter: str | None = None  # with which it was computed, by its name here


def host_arrays(arrays: Mapping[str, mx.array]) -> dict[str, HostArray]:
    """What other threads can read of arrays: their own memory, which later writes of MLX do not reach."""
    raw = {name: array.view(mx.uint16) if array.dtype == mx.bfloat16 else array for name, array in arrays.items()}
    mx.eval(list(raw.values()))
    return {name: (_NAMES[arrays[name].dtype], np.asarray(memoryview(array))) for name, array in raw.items()}  # type: ignore[arg-type]


def restore(contents: Contents, timeline: Timeline) -> dict[str, mx.array]:
    """Put the contents into an empty timeline; returns all arrays, pictures among them."""
    state = contents.state
    arrays = {
        name: array.view(mx.bfloat16) if kind == "BF16" else array for name, (kind, array) in contents.arrays.items()
    }
    follow.restore(timeline.caches, CacheState(state.offset, state.filled, state.borders, arrays))
    timeline.tokens = state.tokens
    return arrays


def write(
    file: BinaryIO,
    identity: Identity,
    state: Mapping[str, Any],
    arrays: Mapping[str, HostArray],
    between: Callable[[], None] = lambda: None,
) -> str:
    """Write an empty file that can be read too; returns its digest.

    Args:
        state: session_state.py's `plain`.
        between: called before each array; what it raises ends the writing.

    Raises:
        OSError: it cannot be written.
    """
    whole = {"version": VERSION, "fingerprint": identity.weights, "settings": settings(identity), **state}
    header: dict[str, Any] = {
        "__metadata__": {"format": FORMAT, "digest": _NO_DIGEST, "state": json.dumps(whole)}
    }  # first: its digest must be near the start
    arrays = arrays or {"empty": ("F32", np.zeros(1, np.float32))}
    end = 0
    for name, (kind, values) in arrays.items():
        start, end = end, end + values.nbytes
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    file.write(len(head).to_bytes(8, "little") + head)
    for _, values in arrays.values():
        between()
        file.write(np.ascontiguousarray(values).data)
    signed = _digest(file)
    file.seek(0)
    file.seek(file.read(_HEAD).index(_KEY) + len(_KEY))
    file.write(signed.encode())
    return signed


def read(file: BinaryIO, path: object, loaded: Loaded, caches: Caches, *, data: bool = True) -> Contents:
    """Read a file that this model can go on with.

    Args:
        caches: empty ones of the engine's settings; they stay so.
        data: if False the header alone is read, and its digest not compared.

    Raises:
        SessionError: it is damaged, forged, of a newer version, or of another model or other settings.
        OSError: it cannot be read.
    """
    header, start = _header(file, path)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise SessionError(f"{path}", got="a safetensors file of another kind", want=WANT)
    said, values = metadata.get("digest"), metadata.get("state")
    values = parse_json(values, f"{path}", SessionError, want=WANT) if isinstance(values, str) else None
    if not isinstance(values, dict):
        raise SessionError(f"{path}", got="a file that is damaged", want=WANT)
    if values.get("version") != VERSION:
        raise SessionError(
            f"{path}", got=f"format version {values.get('version')}", want=VERSION, do="use the program that wrote it"
        )
    if data and said != _digest(file):
        raise SessionError(f"{path}", got="a file that was cut or changed", want="every byte as it was written")
    adapter = _made_with(loaded, values, path)
    state = read_state(values, path, caches, loaded.config)
    state = replace(state, tokens=replace(state.tokens, adapter=loaded.files_of(adapter)))
    size = os.fstat(file.fileno()).st_size - start
    entries = _entries(header, state, caches, loaded, path, size)
    return Contents(state, str(said), _arrays(file, start, entries) if data else {}, adapter)


def said_digest(file: BinaryIO) -> str:
    """What a file says that its digest is; "" when it says nothing."""
    file.seek(0)
    _, key, rest = file.read(_HEAD).partition(_KEY)
    return rest[:64].decode("latin-1") if key else ""


def settings(identity: Identity) -> dict[str, Any]:
    """What the caches' contents depend on beside the weights."""
    values = {"dtype": identity.dtype, "kv_bits": identity.kv_bits, "local_kv_bits": identity.local_kv_bits}
    return values if identity.adapter is None else values | {"adapter": identity.adapter}


def _made_with(loaded: Loaded, state: Mapping[str, Any], path: object) -> str | None:
    """The name of the adapter that it was computed with.

    Raises:
        SessionError: another model, or one with other settings or an adapter that is not loaded, has computed it.
    """
    if state.get("fingerprint") != loaded.identity.weights:
        raise SessionError(
            f"{path}", got="a conversation with another model", want=f"one with {loaded.checkpoint.name}"
        )
    made, now = state.get("settings"), settings(loaded.identity)
    adapter, name = made.pop("adapter", None) if isinstance(made, dict) else None, None
    if made != now:
        known = made.items() if isinstance(made, dict) else ()
        differ = ", ".join(f"{name} {value}" for name, value in known if now.get(name) != value)
        raise SessionError(
            f"{path}", got=f"a conversation with {differ or 'no settings'}", want="the settings of this engine"
        )
    if adapter is not None and (name := loaded.adapter_of(adapter)) is None:
        got, want = "a conversation with an adapter that is not loaded", "that adapter, as it was then"
        raise SessionError(f"{path}", got=got, want=want, do="load the model with it")
    return name


def _header(file: BinaryIO, path: object) -> tuple[dict[str, Any], int]:
    """The JSON at the file's start, and where the data begin."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    raw = file.read(length) if 0 < length <= min(size - 8, MOST_JSON) else b""
    if not raw.startswith(b"{"):
        raise SessionError(f"{path}", got="something else, or a file that is damaged", want=WANT)
    header = parse_json(raw, f"{path}", SessionError, want=WANT)
    assert isinstance(header, dict), "it begins with a brace"
    return header, 8 + length


def _entries(
    header: dict[str, Any], state: State, caches: Caches, loaded: Loaded, path: object, nbytes: int
) -> list[_Entry]:
    """Names, dtypes and shapes of the arrays in the order of their data, each as it must be.

    Raises:
        SessionError: one is missing, too many, of another shape or dtype, or their data are not `nbytes` without gaps.
    """
    config = loaded.config
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
    rows = (kind for _, name, kind, _ in entries if name.startswith(("layer.", "border")) and name[-7:] != ".logits")
    floats = set(rows)
    if len(floats - {"U32"}) > 1:
        raise wrong(f"{path}", got=f"rows in {listed(floats)}")
    end = 0
    for (start, stop), name, kind, size in entries:
        if (start, stop) != (end, end + math.prod(size) * np.dtype(_DTYPES[kind]).itemsize):
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


def _arrays(file: BinaryIO, start: int, entries: list[_Entry]) -> dict[str, tuple[str, mx.array]]:
    """Read them, one after another. Raises OSError when the file has become shorter."""
    file.seek(start)
    arrays = {}
    for name, kind, shape in entries:
        dtype = _DTYPES[kind]
        raw = file.read(math.prod(shape) * np.dtype(dtype).itemsize)
        try:
            values = np.frombuffer(raw, dtype).reshape(shape)
        except ValueError:
            raise OSError(0, "a file that another program cuts while it is read") from None
        arrays[name] = kind, mx.array(values)  # copied at once, in whatever thread
    return arrays


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

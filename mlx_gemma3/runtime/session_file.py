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

from .. import writing
from ..checkpoint.fingerprint import fingerprint
from ..errors import OutputError, SessionError
from ..model.cache import Caches, GlobalCache, Rows, Snapshot
from ..reading import MOST_JSON, open_regular, parse_json
from ..visible import listed
from .host import Host
from .session import Conversation
from .session_state import BORDER_LOGITS, PICTURE, SIDES, State, optional_shapes, plain, read_state, shapes

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


def write(path: str | Path, conversation: Conversation, host: Host, *, replace: bool = True) -> None:
    """Write under a temporary name, then rename: the old file or the new one, never a third thing.

    Args:
        replace: a file that this conversation has not been in before is replaced.

    Raises:
        OutputError: the file cannot be written, or holds what this conversation does not know.
    """
    caches = conversation.timeline.caches
    for name in list(conversation.pixels):  # of a turn that was cancelled before they were encoded
        conversation.rows(name, partial(host.features.get, host.model, name))
    arrays = {f"{PICTURE}{name}": rows for name, rows in conversation.features.items()}
    for number, layer in enumerate(caches):
        stop = layer.offset if isinstance(layer, GlobalCache) else layer.filled
        for side, buffer in zip(SIDES, (layer.keys, layer.values), strict=True):
            if stop:
                parts = buffer.view(0, stop)
                arrays |= {f"layer.{number}.{side}.{part}": rows for part, rows in enumerate(parts)}
    border = _border(caches)
    if border is not None:
        arrays |= _snapshot_arrays(border)
    filled = [0 if isinstance(layer, GlobalCache) else layer.filled for layer in caches]
    held = None if border is None else (border.position, [layer[0] if layer else 0 for layer in border.layers])
    state = {
        "version": VERSION,
        "fingerprint": fingerprint(host.checkpoint),
        "settings": _settings(host),
        **plain(conversation, filled, held),
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


def read(path: str | Path, host: Host) -> Conversation:
    """Read a conversation that this model can go on with.

    Raises:
        SessionError: no such file, no regular one, damaged, forged, of a newer version, or of another model or other
            settings.
    """
    try:
        with open_regular(Path(path).expanduser()) as file:
            conversation = _read(file, path, host)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: `~name` of nobody; ValueError: a NUL
        raise SessionError(f"{path}", got=getattr(error, "strerror", None) or error, want=_WANT) from None
    conversation.places.add(Path(os.path.realpath(Path(path).expanduser())))
    return conversation


def _read(file: BinaryIO, path: str | Path, host: Host) -> Conversation:
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
    if state.get("fingerprint") != fingerprint(host.checkpoint):
        raise SessionError(f"{path}", got="a conversation with another model", want=f"one with {host.checkpoint.name}")
    settings, now = state.get("settings"), _settings(host)
    if settings != now:
        known = settings.items() if isinstance(settings, dict) else ()
        differ = ", ".join(f"{name} {value}" for name, value in known if now.get(name) != value)
        raise SessionError(
            f"{path}", got=f"a conversation with {differ or 'no settings'}", want="the settings of this engine"
        )
    timeline = host.new_timeline()
    believed = read_state(state, path, timeline.caches, host.checkpoint.config)
    entries = _entries(header, believed, timeline.caches, host, path, os.fstat(file.fileno()).st_size - start)
    conversation = Conversation(timeline, believed.system)
    _fill(conversation, _arrays(file, start, entries), believed)
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
    header: dict[str, Any], state: State, caches: Caches, host: Host, path: str | Path, nbytes: int
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names, dtypes and shapes of the arrays in the order of their data, each as it must be.

    Raises:
        SessionError: one is missing, too many, of another shape or dtype, or their data are not `nbytes` without gaps.
    """
    config = host.checkpoint.config
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


def _fill(conversation: Conversation, arrays: dict[str, mx.array], state: State) -> None:
    """Put what was read into its place."""
    timeline = conversation.timeline
    for number, layer in enumerate(timeline.caches):
        layer.offset = state.offset
        if not isinstance(layer, GlobalCache):
            layer.filled = state.filled[number]
        for side, buffer in zip(SIDES, (layer.keys, layer.values), strict=True):
            buffer.parts = list(_parts(arrays, f"layer.{number}.{side}"))
    if state.border is not None:
        timeline.caches.snapshots = [_snapshot(arrays, *state.border)]
    timeline.tokens = state.tokens
    conversation.exchanges = list(state.exchanges)
    conversation.features = {
        name.removeprefix(PICTURE): rows for name, rows in arrays.items() if name.startswith(PICTURE)
    }


def _parts(arrays: dict[str, mx.array], name: str) -> Rows:
    return tuple(arrays[part] for part in (f"{name}.{number}" for number in range(3)) if part in arrays)


def _border(caches: Caches) -> Snapshot | None:
    """The end of the last prompt, where the local layers have moved on since: from there an answer is given again."""
    last = caches.snapshots[-1] if caches.snapshots else None
    return None if last is None or all(layer.reaches(last.position) for layer in caches) else last


def _snapshot_arrays(border: Snapshot) -> dict[str, mx.array]:
    arrays = {} if border.logits is None else {BORDER_LOGITS: border.logits}
    for number, layer in enumerate(border.layers):
        if layer is not None:
            filled, *sides = layer
            for side, rows in zip(("keys", "values"), sides, strict=True):
                arrays |= {f"border.{number}.{side}.{part}": x[:, :, :filled] for part, x in enumerate(rows)}
    return arrays


def _snapshot(arrays: dict[str, mx.array], position: int, filled: tuple[int, ...]) -> Snapshot:
    layers = tuple(
        (count, _parts(arrays, f"border.{number}.keys"), _parts(arrays, f"border.{number}.values")) if count else None
        for number, count in enumerate(filled)
    )
    return Snapshot(position, layers, arrays.get(BORDER_LOGITS))


def _settings(host: Host) -> dict[str, Any]:
    """What the caches' contents depend on beside the weights."""
    dtype = str(host.model.language_model.norm.weight.dtype).removeprefix("mlx.core.")
    return {"dtype": dtype, "kv_bits": host.options.kv_bits, "local_kv_bits": host.options.local_kv_bits}


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

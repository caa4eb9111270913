"""A conversation in a file: what was said, and the caches that hold it.

The file is safetensors (one tensor for each part of each layer's keys and values, and the rows of each picture), its
metadata the rest as JSON. A digest covers every byte, so a file that was cut or changed is refused, never believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoint.fingerprint import fingerprint
from ..errors import OutputError, SessionError
from ..model.cache import Caches, GlobalCache, Rows, Snapshot
from .host import Host
from .session import Conversation, Exchange
from .timeline import Tokens

FORMAT, VERSION = "mlx-gemma3 session", 1
_NO_DIGEST = "0" * 64


def write(path: Path, conversation: Conversation, host: Host) -> None:
    """Write under a temporary name, then rename: the old file or the new one, never a third thing.

    Raises:
        OutputError: the file cannot be written.
    """
    caches = conversation.timeline.caches
    for name in list(conversation.pixels):  # of a turn that was cancelled before they were encoded
        conversation.rows(name, partial(host.features.get, host.model, name))
    arrays = {f"picture.{name}": rows for name, rows in conversation.features.items()}
    for number, layer in enumerate(caches):
        stop = layer.offset if isinstance(layer, GlobalCache) else layer.filled
        for side, buffer in (("keys", layer.keys), ("values", layer.values)):
            if buffer.parts:
                parts = buffer.view(0, stop)
                arrays |= {f"layer.{number}.{side}.{part}": rows for part, rows in enumerate(parts)}
    border = _border(caches)
    if border is not None:
        arrays |= _snapshot_arrays(border)
    state = {
        "version": VERSION,
        "fingerprint": fingerprint(host.checkpoint),
        "settings": _settings(host),
        "offset": caches.offset,
        "filled": [0 if isinstance(layer, GlobalCache) else layer.filled for layer in caches],
        "border": None if border is None else [border.position, [layer[0] if layer else 0 for layer in border.layers]],
        "tokens": asdict(conversation.timeline.tokens),
        "system": conversation.system,
        "exchanges": [asdict(exchange) for exchange in conversation.exchanges],
    }
    arrays = {name: mx.contiguous(array) for name, array in arrays.items()} or {"empty": mx.zeros((1,))}
    metadata = {"format": FORMAT, "digest": _NO_DIGEST, "state": json.dumps(state)}
    working = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".safetensors")
        os.close(handle)
        working = Path(name)
        mx.save_safetensors(name, arrays, metadata)
        _sign(working)
        working.replace(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: MLX could not write
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path}", got=reason, want="a place that can be written") from None
    finally:
        if working is not None:
            working.unlink(missing_ok=True)


def read(path: Path, host: Host) -> Conversation:
    """Read a conversation that this model can go on with.

    Raises:
        SessionError: no such file, damaged, of a newer version, or of another model or other settings.
    """
    try:
        signed = _digest(path)
    except OSError as error:
        raise SessionError(f"{path}", got=error.strerror or error, want="a saved conversation") from None
    try:
        arrays, metadata = _load(path)
        state: dict[str, Any] = json.loads(metadata["state"]) if metadata.get("format") == FORMAT else {}
    except (RuntimeError, ValueError, KeyError):
        raise SessionError(
            f"{path}", got="something else, or a file that is damaged", want="a saved conversation"
        ) from None
    if not state:
        raise SessionError(f"{path}", got="a safetensors file of another kind", want="a saved conversation")
    if state.get("version") != VERSION:
        raise SessionError(
            f"{path}", got=f"format version {state.get('version')}", want=VERSION, do="use the program that wrote it"
        )
    if metadata.get("digest") != signed:
        raise SessionError(f"{path}", got="a file that was cut or changed", want="every byte as it was written")
    if state["fingerprint"] != fingerprint(host.checkpoint):
        raise SessionError(f"{path}", got="a conversation with another model", want=f"one with {host.checkpoint.name}")
    if state["settings"] != (now := _settings(host)):
        saved = ", ".join(f"{name} {value}" for name, value in state["settings"].items() if now.get(name) != value)
        raise SessionError(f"{path}", got=f"a conversation with {saved}", want="the settings of this engine")
    mx.eval(arrays)
    return _conversation(arrays, state, host)


def _load(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    return loaded[0], loaded[1]


def _conversation(arrays: dict[str, mx.array], state: dict[str, Any], host: Host) -> Conversation:
    conversation = Conversation(host.new_timeline(), state["system"])
    timeline = conversation.timeline
    for number, layer in enumerate(timeline.caches):
        layer.offset = state["offset"]
        if not isinstance(layer, GlobalCache):
            layer.filled = state["filled"][number]
        for side, buffer in (("keys", layer.keys), ("values", layer.values)):
            names = (f"layer.{number}.{side}.{part}" for part in range(3))
            buffer.parts = [arrays[name] for name in names if name in arrays]
    if state["border"] is not None:
        timeline.caches.snapshots = [_snapshot(arrays, *state["border"])]
    timeline.tokens = _tokens(state["tokens"])
    for values in state["exchanges"]:
        said = values["said"]
        conversation.exchanges.append(
            Exchange(
                text=values["text"],
                images=values["images"],
                asked=_tokens(values["asked"]),
                said=None if said is None else _tokens(said),
                reply=values["reply"],
            )
        )
    conversation.features = {
        name.removeprefix("picture."): rows for name, rows in arrays.items() if name.startswith("picture.")
    }
    return conversation


def _border(caches: Caches) -> Snapshot | None:
    """The end of the last prompt, where the local layers have moved on since: from there an answer is given again."""
    last = caches.snapshots[-1] if caches.snapshots else None
    return None if last is None or all(layer.reaches(last.position) for layer in caches) else last


def _snapshot_arrays(border: Snapshot) -> dict[str, mx.array]:
    arrays = {} if border.logits is None else {"border.logits": border.logits}
    for number, layer in enumerate(border.layers):
        if layer is not None:
            filled, *sides = layer
            for side, rows in zip(("keys", "values"), sides, strict=True):
                arrays |= {f"border.{number}.{side}.{part}": x[:, :, :filled] for part, x in enumerate(rows)}
    return arrays


def _snapshot(arrays: dict[str, mx.array], position: int, filled: list[int]) -> Snapshot:
    def rows(number: int, side: str) -> Rows:
        names = (f"border.{number}.{side}.{part}" for part in range(3))
        return tuple(arrays[name] for name in names if name in arrays)

    layers = tuple(
        (count, rows(number, "keys"), rows(number, "values")) if f"border.{number}.keys.0" in arrays else None
        for number, count in enumerate(filled)
    )
    return Snapshot(position, layers, arrays.get("border.logits"))


def _tokens(values: dict[str, Any]) -> Tokens:
    return Tokens(tuple(values["ids"]), tuple((a, b) for a, b in values["spans"]), tuple(values["digests"]))


def _settings(host: Host) -> dict[str, Any]:
    """What the caches' contents depend on beside the weights."""
    dtype = str(host.model.language_model.norm.weight.dtype).removeprefix("mlx.core.")
    return {"dtype": dtype, "kv_bits": host.options.kv_bits, "local_kv_bits": host.options.local_kv_bits}


def _sign(path: Path) -> None:
    """Put the digest of the whole file, itself as zeros, into its place."""
    signed = _digest(path)
    with path.open("r+b") as file:
        head = file.read(1 << 20)
        at = head.index(_NO_DIGEST.encode())
        file.seek(at)
        file.write(signed.encode())
        file.flush()
        os.fsync(file.fileno())


def _digest(path: Path) -> str:
    """blake2b of the file with the 64 characters of its digest as zeros."""
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        head = file.read(1 << 20)
        key = head.find(b'"digest":"')
        if key >= 0:
            at = key + len(b'"digest":"')
            head = head[:at] + _NO_DIGEST.encode() + head[at + 64 :]
        digest.update(head)
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()

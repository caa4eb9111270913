"""Safetensors folders: which files hold the weights, what is in them, and every published naming style.

Owns the check of each file's header before MLX maps it, the rule that turns a published name into the model's, and
which tensors are left unread. Knows nothing of the model's modules (load.py) nor of GGUF (gguf.py).

Canonical names are the model's attribute paths: `language_model.layers.0.…`, `vision_tower.…`,
`multi_modal_projector.…`, and `lm_head.…` for an untied head.

Sources: the safetensors format (8-byte length, JSON, data); transformers 5.23, conversion_mapping.py ("llava" rules)
for the Hub's styles; folders written by mlx-lm 0.32 and mlx-vlm 0.7 for theirs.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..boundary.reading import open_regular, parse_json, read_json
from ..config import Config
from ..errors import CheckpointError
from ..model.shard import WHOLE, Shard
from ..visible import listed
from .parts import part_of

INDEX = "model.safetensors.index.json"
EMBEDDING = "language_model.embed_tokens.weight"
PATCH_WEIGHT = "vision_tower.embeddings.patch_embedding.weight"
DENSE_FILE = "model.safetensors"  # in the folder of an embedding model's matrix, as linear.weight (and linear.bias)

_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
# Floats are weights, U32 packed weights, U8 the scales of mxfp4, mxfp8 and nvfp4.
_READABLE = frozenset(("F32", "F16", "BF16", "U32", "U8"))
_METADATA, _MOST_AXES = "__metadata__", 8
_LONGEST_HEADER = 100_000_000  # the format's own limit
# Constants that some tools save beside the weights; the model computes them itself.
_BUFFERS = (".position_ids", ".inv_freq")


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a safetensors header. `start` and `stop` count bytes from the start of the file."""

    name: str
    dtype: str  # as the format spells it: F32, BF16, U32, …
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """What a safetensors file holds, by name; none of its data is read.

    Raises:
        CheckpointError: not a safetensors file, empty, damaged, or shorter than its header says.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            raw = file.read(length) if 0 < length <= min(size - 8, _LONGEST_HEADER) else b""
    except FileNotFoundError:
        raise CheckpointError(f"{path}", got="no such file", want="a safetensors file") from None
    except (OSError, ValueError) as error:
        got = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}", got=got, want="a readable safetensors file") from None
    if not raw.startswith(b"{"):
        raise _not_safetensors(path, size)
    entries = parse_json(raw, f"{path}: a damaged header", CheckpointError, want="a safetensors file")
    found = [_tensor_info(path, name, entry, 8 + length) for name, entry in entries.items() if name != _METADATA]
    end = max((info.stop for info in found), default=8 + length)
    if end > size:
        raise CheckpointError(f"{path}", got=f"{size} bytes", want=f"{end}", do="it is cut off: fetch it again")
    before: TensorInfo | None = None
    for info in sorted(found, key=lambda info: (info.start, info.stop)):
        item = _ITEM_BYTES.get(info.dtype)
        if item is not None and info.stop - info.start != item * math.prod(info.shape):
            raise CheckpointError(
                f"{path}: {info.name}",
                got=f"{info.stop - info.start} bytes",
                want=f"{item * math.prod(info.shape)} for {info.dtype} {info.shape}",
                do="fetch it again",
            )
        if item is not None and (info.start - 8 - length) % item:
            raise CheckpointError(
                f"{path}: {info.name}",
                got=f"data at byte {info.start - 8 - length}",
                want=f"a multiple of {item} for {info.dtype}",
                do="fetch it again",
            )
        if before is not None and info.start < before.stop and info.start < info.stop:
            raise CheckpointError(
                f"{path}: {info.name}", got=f"the bytes of {before.name}", want="its own", do="fetch it again"
            )
        if info.start < info.stop:
            before = info
    return {info.name: info for info in found}


def _tensor_info(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    """One entry, its numbers within what a file can hold."""
    values = entry if isinstance(entry, dict) else {}
    dtype: Any = values.get("dtype")
    shape: Any = values.get("shape")
    ends: Any = values.get("data_offsets")
    good = isinstance(dtype, str) and _are_counts(shape) and _are_counts(ends)
    if not good or len(shape) > _MOST_AXES or len(ends) != 2 or ends[0] > ends[1]:
        raise CheckpointError(
            f"{path}: {name}", got="a damaged header", want="dtype, shape and data_offsets", do="fetch it again"
        )
    return TensorInfo(name, str(dtype), tuple(shape), base + ends[0], base + ends[1])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 60 for value in values)


def _not_safetensors(path: Path, size: int) -> CheckpointError:
    if size == 0:
        return CheckpointError(f"{path}", got="an empty file", want="a safetensors file", do="fetch it again")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            return CheckpointError(f"{path}", got="a Git LFS pointer", want="the file itself", do="run git lfs pull")
    return CheckpointError(
        f"{path}", got="something else or a file that is cut off", want="a safetensors file", do="fetch it again"
    )


def canonical_name(name: str) -> str:
    """The model's name for a published one; a name of no known style comes back as it is.

    model.layers.0.… · language_model.model.layers.0.… · model.language_model.layers.0.… · of ShieldGemma 2 also
    model.language_model.model.layers.0.… · model.model.language_model.model.layers.0.…
        → language_model.layers.0.…
    vision_tower.vision_model.encoder.… · model.vision_tower.[vision_model.]encoder.…
        → vision_tower.encoder.…
    lm_head.… · language_model.lm_head.…
        → lm_head.…
    """
    name = name.removeprefix("model.").removeprefix("model.")
    if name.startswith("language_model."):
        rest = name.removeprefix("language_model.").removeprefix("model.")
        return rest if rest.startswith("lm_head.") else f"language_model.{rest}"
    if name.startswith("vision_tower."):
        return "vision_tower." + name.removeprefix("vision_tower.").removeprefix("vision_model.")
    if name.startswith(("layers.", "embed_tokens.", "norm.")):
        return f"language_model.{name}"
    return name


def is_vision(name: str) -> bool:
    """Whether a canonical name belongs to the tower or the projector."""
    return name.startswith(("vision_tower.", "multi_modal_projector."))


def is_used(name: str, config: Config, *, text_only: bool) -> bool:
    """Whether the model of this config takes the tensor at all; the others stay unread.

    What stands under lm_head is left out where the config says tied: a copy of the embedding, which fine-tunes and
    mlx-vlm write, or scales for mlx-vlm. A head that differs makes the config of an opened checkpoint untied (head.py).
    """
    if name.endswith(_BUFFERS) or (name.startswith("lm_head.") and config.tie_word_embeddings):
        return False
    return not (text_only and is_vision(name))


def shards(folder: Path) -> dict[Path, frozenset[str]]:
    """The weight files of a folder, each with the names that the index promises in it (none without an index).

    Raises:
        CheckpointError: no weights, a broken index, or a gap in files named model-00001-of-00003.safetensors.
    """
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.exists():
        files = read_index(index)
        stale = single.exists() and single.name not in files and not all((folder / file).exists() for file in files)
        if not stale:  # of an upload that was joined into one file later, its index forgotten
            return {folder / file: names for file, names in files.items()}
    if single.is_file():
        return {single: frozenset()}
    found = sorted(folder.glob("model*.safetensors"))
    if not found:
        raise CheckpointError(f"{folder}", got="no weights", want=f"model.safetensors or {INDEX}")
    names = {path.name for path in found}
    for name in sorted(names):
        if numbered := re.fullmatch(r"(model-)(\d+)(-of-)(\d+)(\.safetensors)", name):
            before, digits, of, last, after = numbered.groups()
            for number in range(1, int(last) + 1):
                if (wanted := f"{before}{number:0{len(digits)}}{of}{last}{after}") not in names:
                    raise _missing_shard(folder / wanted)
    return {path: frozenset() for path in found}


def read_index(index: Path | str, place: str = "") -> dict[str, frozenset[str]]:
    """The weight files that an index names, each with the tensors that it promises there.

    Args:
        index: its file, or its text, which `place` names in errors.

    Raises:
        CheckpointError: it is broken, or names a file that is no plain name.
    """
    what, want = f"{index if isinstance(index, Path) else place}", "weight_map: a file in this folder for each tensor"
    broken = f"{what}: a broken index"
    if isinstance(index, Path):
        read = read_json(index, CheckpointError, want=want)
    else:
        read = parse_json(index, broken, CheckpointError, want=want)
    weight_map = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(what, got="a broken index", want=want, do="fetch it again")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not _is_name(file):
            raise CheckpointError(what, got=f"{file!r} for {name}", want=want, do="fetch it again")
        files.setdefault(file, set()).add(name)
    return {file: frozenset(names) for file, names in files.items()}


def _is_name(file: object) -> bool:
    """Whether it is the name of a file in the same folder, as file systems take it."""
    if not isinstance(file, str) or not 0 < len(file.encode("utf-8", "surrogatepass")) <= 255:
        return False
    return Path(file).name == file and "\0" not in file


def _missing_shard(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}", got="no such file", want="every shard of the checkpoint", do="fetch it again")


@dataclass(frozen=True)
class Place:
    """Where one tensor of the model lies."""

    path: Path
    info: TensorInfo  # under its published name


def locate(folder: Path, config: Config, *, text_only: bool = False) -> dict[str, Place]:
    """The place of each tensor that the model uses, by canonical name; nothing but headers is read.

    A shard whose promised tensors are all unused (the vision tower of a text-only load) is not opened and may be
    absent.

    Raises:
        CheckpointError: a shard is missing, cut off or damaged, lacks what the index promises, a dtype cannot be
            read, or two names mean the same tensor.
    """
    places: dict[str, Place] = {}
    for path, promised in shards(folder).items():
        if promised and not _used_names(promised, config, text_only):
            continue
        if not path.exists():
            raise _missing_shard(path)
        header = read_header(path)
        if absent := promised - set(header):
            raise CheckpointError(
                f"{path}", got=f"no {listed(absent)}", want=f"what {INDEX} promises", do="fetch both again"
            )
        for name, canonical in _used_names(header, config, text_only).items():
            if header[name].dtype not in _READABLE:
                raise CheckpointError(
                    f"{path}: {name}", got=f"dtype {header[name].dtype}", want="F32, F16, BF16 or MLX-packed U32"
                )
            if canonical in places:
                raise CheckpointError(
                    f"{path}: {name}",
                    got=f"the same tensor as {places[canonical].info.name}",
                    want="each tensor once",
                )
            places[canonical] = Place(path, header[name])
    for number, dense in enumerate(config.embedder.dense if config.embedder is not None else ()):
        if dense.folder:
            path = folder / dense.folder / DENSE_FILE
            for name, info in read_header(path).items():
                if info.dtype not in _READABLE:
                    raise CheckpointError(f"{path}: {name}", got=f"dtype {info.dtype}", want="F32, F16, BF16 or U32")
                places[f"dense.{number}.{name.removeprefix('linear.')}"] = Place(path, info)
    return places


def dense_weights(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes, as stored, of an embedding model's matrices that lie with its other weights, as `dense.0.weight`.

    Raises:
        CheckpointError: weights missing or damaged.
    """
    found = {}
    for path in shards(folder):
        if not path.exists():
            raise _missing_shard(path)
        for name, info in read_header(path).items():
            if (canonical := canonical_name(name)).startswith("dense."):
                found[canonical] = info.shape
    return found


def read_folder(folder: Path, config: Config, *, text_only: bool = False, shard: Shard = WHOLE) -> dict[str, mx.array]:
    """The folder's tensors by canonical name: lazy arrays, read from disk when they are evaluated.

    Only what the model uses is in the result, so nothing else is ever read.

    Args:
        shard: of the model on this machine: other parts are not read.

    Raises:
        CheckpointError: as `locate`, or a file that MLX cannot read.
        OptionError: groups of a packed matrix would be cut.
    """
    places = locate(folder, config, text_only=text_only or shard.rank > 0)
    files = {path: _map_file(path) for path in dict.fromkeys(place.path for place in places.values())}
    tensors = {}
    for name, place in places.items():
        cut = shard.cut(name, place.info.shape, config.text)
        info = place.info
        tensors[name] = (
            files[place.path][info.name]
            if cut is None
            else part_of(place.path, info.dtype, info.shape, info.start, *cut)
        )
    if (weight := tensors.get(PATCH_WEIGHT)) is not None:
        tensors[PATCH_WEIGHT] = channels_last(weight)
    return tensors


def _map_file(path: Path) -> dict[str, mx.array]:
    try:
        arrays = mx.load(str(path), format="safetensors")
    except RuntimeError as error:
        raise CheckpointError(f"{path}", got=error, want="a safetensors file that MLX reads") from None
    assert isinstance(arrays, dict), type(arrays)
    return arrays


def channels_last(weight: mx.array) -> mx.array:
    """The patch convolution as MLX wants it: (hidden, 3, P, P) → (hidden, P, P, 3), which mlx-vlm stores already."""
    return weight.transpose(0, 2, 3, 1) if weight.ndim == 4 and weight.shape[1] == 3 else weight


def _used_names(names: Iterable[str], config: Config, text_only: bool) -> dict[str, str]:
    pairs = ((name, canonical_name(name)) for name in names)
    return {name: canonical for name, canonical in pairs if is_used(canonical, config, text_only=text_only)}

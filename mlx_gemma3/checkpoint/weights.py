"""Opens a checkpoint to be gone through one parameter at a time: what it holds, and rows of it. See contents.Store."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..model.gemma3 import Gemma3
from . import gguf
from .entries import Entry, Packing, Store
from .load import Checkpoint, check_entries, fitted_model
from .safetensors import PATCH_WEIGHT, Place, channels_last, locate, read_folder

_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "U8": "u1"}


def open_store(checkpoint: Checkpoint, *, exact: bool = False) -> Store:
    """The store of an opened checkpoint. Reads headers only.

    Args:
        exact: matrices of a GGUF that can only be packed anew, with a loss, are plain.

    Raises:
        CheckpointError: what `load_model` would refuse too.
    """
    if checkpoint.gguf is None:
        return FolderStore(checkpoint)
    header, projector = checkpoint.gguf
    store = gguf.GGUFStore(header, None if checkpoint.text_only else projector, checkpoint.config, exact=exact)
    check_entries(checkpoint.config, store.entries, checkpoint.path)
    return store


class FolderStore:
    """A folder of safetensors files, plain or packed by MLX."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        folder, text_only = checkpoint.path, checkpoint.text_only
        self.places = locate(folder, checkpoint.config, text_only=text_only)
        lazy = read_folder(folder, checkpoint.config, text_only=text_only)
        self.entries = entries_of(fitted_model(checkpoint.config, lazy, where=folder), self.places)

    def read(self, entry: Entry, start: int = 0, stop: int | None = None) -> dict[str, mx.array]:
        """See `Store.read`."""
        return {name: self._rows(name, start, stop) for name in parts(entry)}

    def _rows(self, name: str, start: int, stop: int | None) -> mx.array:
        path, info = self.places[name].path, self.places[name].info
        rows, row = info.shape[0], math.prod(info.shape[1:])
        stop = rows if stop is None else min(stop, rows)
        dtype = np.dtype(_NUMPY[info.dtype])
        offset = info.start + start * row * dtype.itemsize
        values = np.fromfile(path, dtype=dtype, count=(stop - start) * row, offset=offset)
        array = mx.array(values.reshape(stop - start, *info.shape[1:]))
        if info.dtype == "BF16":
            array = array.view(mx.bfloat16)
        return channels_last(array) if name == PATCH_WEIGHT else array


def entries_of(model: Gemma3, places: Mapping[str, Place]) -> tuple[Entry, ...]:
    """An entry for each parameter of a fitted model; scales and biases belong to their matrix."""
    modules = dict(model.named_modules())
    entries = []
    for name, array in tree_flatten(model.parameters()):
        path, _, leaf = name.rpartition(".")
        if leaf in ("scales", "biases"):
            continue
        module, packing, shape = modules.get(path), None, array.shape
        if leaf == "weight" and isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            packing = Packing(module.bits, module.group_size, module.mode)
            shape = (shape[0], shape[1] * 32 // module.bits)
        entry = Entry(name, shape, places[name].info.dtype, packing, nbytes=0)
        infos = [places[part].info for part in parts(entry)]
        entries.append(replace(entry, nbytes=sum(info.stop - info.start for info in infos)))
    return tuple(entries)


def parts(entry: Entry) -> list[str]:
    """The tensors that one parameter consists of."""
    if entry.packing is None:
        return [entry.name]
    path = entry.name.removesuffix(".weight")
    return [entry.name, f"{path}.scales", *([f"{path}.biases"] if entry.packing.mode == "affine" else [])]

"""Whether the numbers of a checkpoint are numbers: NaN and infinity in it, and where."""

from __future__ import annotations

import math

import mlx.core as mx

from ..errors import CheckpointError
from .entries import Entry, Packing, Store
from .safetensors import PATCH_WEIGHT

PIECE = 1 << 22  # numbers looked at together: 16 MiB in float32


def unpacked(arrays: dict[str, mx.array], entry: Entry, packing: Packing | None) -> mx.array:
    """The numbers that some arrays stand for."""
    if packing is None:
        return arrays[entry.name]
    path = entry.name.removesuffix(".weight")
    scales, biases = arrays[f"{path}.scales"], arrays.get(f"{path}.biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(
        arrays[entry.name], scales, biases, group_size=packing.group_size, bits=packing.bits, mode=packing.mode
    )


def step(entry: Entry, piece: int = PIECE) -> int:
    """Rows of a parameter that are read together, of about `piece` numbers."""
    rows, width = entry.shape[0], math.prod(entry.shape[1:])
    return rows if entry.name == PATCH_WEIGHT else max(1, piece // max(1, width))


def not_finite(store: Store) -> str | None:
    """The name of the first parameter that holds NaN or infinity; None without one. Reads all of the checkpoint."""
    for entry in store.entries:
        rows = step(entry)
        for start in range(0, entry.shape[0], rows):
            read = store.read(entry, start, min(start + rows, entry.shape[0]))
            if not mx.isfinite(unpacked(read, entry, entry.packing)).all().item():
                return entry.name
    return None


def refusal(where: object, name: str) -> CheckpointError:
    """What to raise about a parameter with such numbers."""
    return CheckpointError(
        f"{where}: {name}",
        got="NaN or infinity among its numbers",
        want="numbers",
        do="fetch the checkpoint again, or ask who made it: no answer can come of it",
    )

"""Caches as plain numbers and named arrays, for a file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from .cache import Caches, Rows, Snapshot, keys_and_values, reach


@dataclass(frozen=True)
class CacheState:
    """Caches as plain numbers and named arrays: what a file holds of them.

    Arrays are called `layer.N.keys.P`, `layer.N.values.P`, and, of the borders, `border.N.…` and `border.logits`,
    `border1.N.…` and so on; P counts the parts of packed rows. (1, K, rows, …) each.
    """

    offset: int
    filled: tuple[int, ...]  # rows of each local layer; 0 for a global one
    borders: tuple[tuple[int, tuple[int, ...]], ...]  # snapshots, the last one first: position, and rows as above
    arrays: Mapping[str, mx.array]


def state_of(caches: Caches, first: int | None = None) -> CacheState:
    """What `restore` makes the same caches of. Of the snapshots only the border: the last one, where the local
    layers have moved on since.

    Args:
        first: also the first snapshot of so many tokens or more, where no later one reaches back to it.
    """
    arrays: dict[str, mx.array] = {}
    for number, layer in enumerate(caches.layers):
        if layer.filled:
            arrays |= _named(f"layer.{number}", layer.rows())
    wanted = caches.snapshots[-1:]
    if first is not None:
        wanted = [old for old in caches.snapshots if old.position >= first][:1] + wanted
    extents, borders = [caches.extent], list[tuple[int, tuple[int, ...]]]()
    for snapshot in reversed(wanted):
        if reach(snapshot.position, extents, caches.window) == snapshot.position:
            continue
        name = border_name(len(borders))
        for number, held in enumerate(snapshot.layers):
            if held is not None:
                arrays |= _named(f"{name}.{number}", tuple(part[:, :, : held[0]] for part in held[1]))
        if snapshot.logits is not None:
            arrays[f"{name}.logits"] = snapshot.logits
        borders.append((snapshot.position, tuple(layer[0] if layer else 0 for layer in snapshot.layers)))
        extents.append(snapshot.extent)
    filled = tuple(layer.filled if layer.window is not None else 0 for layer in caches.layers)
    return CacheState(caches.offset, filled, tuple(borders), arrays)


def restore(caches: Caches, state: CacheState) -> None:
    """Take over a state of caches of the same kind; its shapes were checked."""
    for number, (layer, filled) in enumerate(zip(caches.layers, state.filled, strict=True)):
        layer.take(state.offset, filled, _joined(f"layer.{number}", state.arrays))
    caches.ends_in_image, caches.snapshots = False, []
    for index, (position, counts) in enumerate(state.borders):
        name = border_name(index)
        held = tuple(
            (count, _joined(f"{name}.{number}", state.arrays)) if count else None for number, count in enumerate(counts)
        )
        caches.snapshots.insert(0, Snapshot(position, held, state.arrays.get(f"{name}.logits")))
    mx.eval(
        caches.arrays, [part for snapshot in caches.snapshots for held in snapshot.layers if held for part in held[1]]
    )


def border_name(index: int) -> str:
    """What the names of the arrays of a state's n-th border begin with."""
    return f"border{index or ''}"


def _named(name: str, rows: Rows) -> dict[str, mx.array]:
    keys, values = keys_and_values(rows)
    sides = (("keys", keys), ("values", values))
    return {f"{name}.{side}.{part}": array for side, parts in sides for part, array in enumerate(parts)}


def _joined(name: str, arrays: Mapping[str, mx.array]) -> Rows:
    """What `_named` made two of; nothing where there are no rows."""
    numbers = [part for part in range(3) if f"{name}.keys.{part}" in arrays]
    return tuple(
        mx.concatenate([arrays[f"{name}.{side}.{part}"] for side in ("keys", "values")], axis=1) for part in numbers
    )

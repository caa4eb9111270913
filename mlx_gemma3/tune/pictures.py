"""The pictures of the data: their rows, computed once and kept on disk while the tower is frozen.

A picture is called by the digest of its pixels, so that one in a hundred examples is one. Rows stand in
`cache_folder()/tower/MODEL/DI/DIGEST.npy`; what finds no room in the budget is computed again when it is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..boundary.paths import cache_folder
from ..boundary.writing import write_whole
from .encoding import Item, Pixels
from .forward import Sample

_Rows = npt.NDArray[np.generic]


class Pictures:
    """The pictures of some data, for one model."""

    def __init__(
        self, model: str, budget: int, compute: Callable[[Pixels], mx.array], again: Callable[[Item], Sequence[Pixels]]
    ) -> None:
        """
        Args:
            model: a fingerprint: of weights, and of what the tower computes in.
            budget: bytes on disk, of all models together; 0 keeps nothing.
            compute: (N, S, S, 3) → (N, T, D), by the frozen tower.
            again: the pixels of an item, in the order of its samples.
        """
        self._folder = cache_folder() / "tower" / model
        self._budget, self._compute, self._again = budget, compute, again
        self._used = sum(path.stat().st_size for path in self._folder.parent.rglob("*.npy")) if budget else 0
        self._kept: dict[str, bool] = {}  # whether it is on disk, by name
        self.computed = 0

    def fill(self, items: Sequence[Item], progress: Callable[[int, int], None]) -> None:
        """Compute the rows of all pictures that are not on disk yet, as far as the budget goes."""
        where = {name: item for item in items for one in item.samples for name in one.pictures}
        for number, (name, item) in enumerate(where.items()):
            progress(number, len(where))
            if name in self._kept:
                continue
            self._kept[name] = self._path(name).is_file()
            if not self._kept[name] and self._budget:
                for pixels in self._again(item):
                    other = digest(pixels)
                    if not self._kept.get(other):
                        self._kept[other] = self._path(other).is_file() or self._keep(other, pixels)

    def rows(self, items: Sequence[Item], samples: Sequence[Sample]) -> mx.array | None:
        """(N, T, D) of the pictures of some samples, which are of these items; None without pictures."""
        names = [name for one in samples for name in one.pictures]
        if not names:
            return None
        pixels: dict[str, Pixels] = {}
        found = []
        for name in names:
            rows = self._read(name)
            if rows is None:
                if name not in pixels:
                    for item in items:
                        if any(name in one.pictures for one in item.samples):
                            pixels |= {digest(one): one for one in self._again(item)}
                rows = self._compute(pixels[name][None])
                self.computed += 1
            found.append(rows)
        return mx.concatenate(found)

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / f"{name}.npy"

    def _read(self, name: str) -> mx.array | None:
        if not self._kept.get(name):
            return None
        try:
            stored: _Rows = np.load(self._path(name), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            self._kept[name] = False
            return None
        rows = mx.array(stored)
        return (rows.view(mx.bfloat16) if stored.dtype == np.uint16 else rows)[None]

    def _keep(self, name: str, pixels: Pixels) -> bool:
        if not self._budget:
            return False
        rows = self._compute(pixels[None])[0]
        self.computed += 1
        stored = np.array(rows.view(mx.uint16) if rows.dtype == mx.bfloat16 else rows)
        if self._used + stored.nbytes > self._budget:
            return False
        buffer = io.BytesIO()
        np.save(buffer, stored)
        with contextlib.suppress(OSError):
            write_whole(self._path(name), buffer.getvalue())
            self._used += stored.nbytes
            return True
        return False


def digest(pixels: Pixels) -> str:
    """The name of a picture (S, S, 3)."""
    return hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest()

"""In which order items are learnt: each once an epoch, shuffled by the seed, so many together.

The order follows from the seed and the epoch alone: a training that is gone on with takes up at any step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def batches(lengths: Sequence[int], *, size: int, tokens: int | None, seed: int, epoch: int | None) -> list[list[int]]:
    """The items of each batch, the shortest first: neighbours of one length go through attention together.

    Args:
        lengths: tokens of each item.
        size: items of a batch.
        tokens: fill batches up to so many tokens instead, with whole items; one that is longer is alone.
        epoch: None leaves the order as it is.
    """
    order = list(range(len(lengths)))
    if epoch is not None:
        order = np.random.default_rng([seed, epoch]).permutation(len(lengths)).tolist()
    found: list[list[int]] = []
    filled = 0
    for index in order:
        fits = len(found[-1]) < size if tokens is None and found else filled + lengths[index] <= (tokens or 0)
        if found and fits:
            found[-1].append(index)
            filled += lengths[index]
        else:
            found.append([index])
            filled = lengths[index]
    return [sorted(batch, key=lambda index: (lengths[index], index)) for batch in found]


def steps(
    lengths: Sequence[int], *, size: int, tokens: int | None, accumulate: int, seed: int
) -> Iterator[list[list[int]]]:
    """Without end: the batches of each step of the optimizer. An epoch's last step may have fewer."""
    epoch = 0
    while True:
        each = batches(lengths, size=size, tokens=tokens, seed=seed, epoch=epoch)
        for start in range(0, len(each), accumulate):
            yield each[start : start + accumulate]
        epoch += 1

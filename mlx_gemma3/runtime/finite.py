"""The first logits of an answer, looked at once: NaN and infinity there come from the weights, which are then named."""

from __future__ import annotations

import mlx.core as mx

from ..checkpoint.load import Checkpoint
from ..checkpoint.numbers import not_finite, refusal
from ..checkpoint.weights import open_store
from ..errors import CheckpointError


def check_finite(logits: mx.array, checkpoint: Checkpoint) -> None:
    """Refuse (1, V) logits with NaN or infinity, which would make an empty or random answer.

    Raises:
        CheckpointError: with the parameter that is to blame, for which the whole checkpoint is read.
    """
    if mx.isfinite(logits).all().item():
        return
    if (name := not_finite(open_store(checkpoint))) is not None:
        raise refusal(checkpoint.path, name)
    raise CheckpointError(
        f"{checkpoint.name}: first logits",
        got="NaN or infinity, though every weight is finite",
        want="numbers",
        do='try dtype "float32"; if that does not help the checkpoint is broken',
    )

"""Checkpoints whose answers never end by themselves, for tests that cancel them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

NEVER = 1_000_000  # no token of the tiny vocabulary
END_OF_TURN = 106  # which ends an answer of a chat whatever the settings say


def endless(folder: Path, target: Path) -> Path:
    """A copy of a tiny checkpoint at target/<its name>, in which no token ends an answer.

    <end_of_turn> never comes: one coordinate of all rows of the embedding, which is the head too, is large, and of its
    row as much below zero.
    """
    copy = target / folder.name
    shutil.copytree(folder, copy)
    for name in ("config.json", "generation_config.json"):
        if (copy / name).exists():
            values = json.loads((copy / name).read_text(encoding="utf-8"))
            (copy / name).write_text(json.dumps(_without_end(values)), encoding="utf-8")
    weights = dict(mx.load(str(copy / "model.safetensors")).items())  # type: ignore[union-attr]
    (name,) = (name for name in weights if name.endswith("embed_tokens.weight"))
    table = np.array(weights[name])
    table[:, 0] = 4
    table[END_OF_TURN, 0] = -4
    mx.save_safetensors(str(copy / "model.safetensors"), weights | {name: mx.array(table)}, metadata={"format": "mlx"})
    return copy


def _without_end(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {name: [NEVER] if name == "eos_token_id" else _without_end(value) for name, value in values.items()}

"""Checkpoints whose answers never end by themselves, for tests that cancel them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

NEVER = 1_000_000  # no token of the tiny vocabulary


def endless(folder: Path, target: Path) -> Path:
    """A copy of a tiny checkpoint at target/<its name>, in which no token ends an answer."""
    copy = target / folder.name
    shutil.copytree(folder, copy)
    for name in ("config.json", "generation_config.json"):
        if (copy / name).exists():
            values = json.loads((copy / name).read_text(encoding="utf-8"))
            (copy / name).write_text(json.dumps(_without_end(values)), encoding="utf-8")
    return copy


def _without_end(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {name: [NEVER] if name == "eos_token_id" else _without_end(value) for name, value in values.items()}

"""A short name for the weights of a checkpoint: what was computed with one must not be mixed with another's."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .load import Checkpoint
from .safetensors import shards

_SAMPLES, _BYTES = 64, 4096


def fingerprint(checkpoint: Checkpoint) -> str:
    """Of the config, and of each weight file its size, its head and samples spread over its length.

    A fine-tune moves nearly all weights, so samples tell it; reading all of 27B's 54 GB would take a minute. The
    folder's place and name do not count.
    """
    digest = hashlib.blake2b(repr(checkpoint.config).encode(), digest_size=16)
    for path in _files(checkpoint):
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(sample * max(size - _BYTES, 0) // (_SAMPLES - 1))
                digest.update(file.read(_BYTES))
    return digest.hexdigest()


def _files(checkpoint: Checkpoint) -> list[Path]:
    if checkpoint.gguf is not None:
        return list(dict.fromkeys(path for header in checkpoint.gguf if header is not None for path, _ in header.files))
    return [path for path in shards(checkpoint.path) if path.exists()]

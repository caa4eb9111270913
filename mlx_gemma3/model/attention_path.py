"""Which kernel attention takes on Metal, by MLX's own rule: MLX has no function that says it.

    queries   1 to 8                   9 and more
    heads     64, 96, 128, 256         64, 72, 80, 96, 128    256
    kernel    vector, in one pass      fused                  fused where it pays (`_pays`), else unfused
              or two, else unfused

Unfused, the scores are an array in memory. Source: MLX 0.32.4, backend/metal/scaled_dot_product_attention.cpp
(`has_fused_kernel`, `use_fallback`, `eval_gpu`) with its pull requests 3842, 4416 and 4455, and `is_nax_available`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

VECTOR, TWO_PASS = "vector kernel", "2-pass vector kernel"
FUSED, NEURAL, UNFUSED = "fused", "fused (neural accelerators)", "unfused"

Mask = Literal["causal", "array"] | None

_VECTOR_QUERIES, _VECTOR_ROWS = 8, 32  # at most; rows are queries times query heads a key head
_VECTOR_HEADS = frozenset((64, 96, 128, 256))
_FUSED_HEADS = frozenset((64, 72, 80, 96, 128, 256))


@dataclass(frozen=True)
class Gpu:
    """What MLX's choice depends on.

    Args:
        architecture: as Metal names it: "applegpu_g16s" is generation 16 (M4), s for Max.
        macos: (15, 3) for 15.3.
        tf32: MLX may multiply float32 as TF32 (MLX_ENABLE_TF32).
    """

    architecture: str
    macos: tuple[int, ...]
    tf32: bool = False

    @property
    def neural(self) -> bool:
        """Whether MLX uses the neural accelerators of M5: generation 17 (18 on phones' chips), macOS 26.2."""
        found = re.search(r"g(\d+)(\w)$", self.architecture)
        return self.macos >= (26, 2) and found is not None and int(found[1]) >= (18 if found[2] == "p" else 17)

    @property
    def large(self) -> bool:
        """A Max or an Ultra."""
        return self.architecture[-1:] in ("s", "d")


def attention_path(
    gpu: Gpu,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    queries: int,
    keys: int,
    mask: Mask,
    float32: bool = False,
    kv_bits: int = 16,
) -> str:
    """The path that attention takes: VECTOR, TWO_PASS, FUSED, NEURAL or UNFUSED.

    Args:
        heads: H, query heads; a multiple of kv_heads.
        queries: L of one call.
        keys: S that these queries are given.
        mask: "array" for one of bools, None where every query sees every key.
        float32: q, k and v are; else of 16 bits.
        kv_bits: below 16 the keys are packed, which no kernel reads (attention.py).
    """
    if kv_bits != 16:
        return UNFUSED
    if queries <= _VECTOR_QUERIES:
        fits = queries <= keys and queries * (heads // kv_heads) <= _VECTOR_ROWS
        if head_dim not in _VECTOR_HEADS or not fits:
            return UNFUSED
        long = (gpu.large and keys >= 1024) or (kv_heads < heads and keys >= 4096)
        return TWO_PASS if long else VECTOR
    neural = gpu.neural and (gpu.tf32 or not float32)
    if head_dim not in _FUSED_HEADS or (mask == "causal" and queries > keys):
        return UNFUSED
    if head_dim == 256 and not _pays(queries, keys, mask, neural):
        return UNFUSED
    return NEURAL if neural else FUSED


def _pays(queries: int, keys: int, mask: Mask, neural: bool) -> bool:
    """Whether MLX finds its kernel for heads of 256 faster than scores in memory."""
    if neural:
        return queries >= 1024 and mask is not None
    return mask == "causal" and queries == keys >= 2048

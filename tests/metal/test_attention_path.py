"""The program's statement of MLX's choice of a kernel and the lint's, written apart, say the same."""

from __future__ import annotations

from itertools import product

import metal_rules
import mlx.core as mx
from metal_trace import Spec

from mlx_gemma3.model.attention_path import FUSED, NEURAL, TWO_PASS, UNFUSED, VECTOR, Gpu, attention_path

KINDS = {VECTOR: "vector", TWO_PASS: "vector", FUSED: "full", NEURAL: "full", UNFUSED: "unfused"}
GPUS = {False: Gpu("applegpu_g13g", (14, 5)), True: Gpu("applegpu_g17g", (26, 2))}
HEADS = ((4, 1), (8, 4), (32, 16), (16, 16), (32, 2))  # of queries, of keys
SIZES = (32, 64, 72, 80, 96, 112, 128, 256)
LENGTHS = (1, 2, 5, 8, 9, 512, 1023, 1024, 2047, 2048, 4096)


def test_both_statements_agree() -> None:
    seen = set()
    for size, (heads, groups), queries, keys, mask, m5 in product(
        SIZES, HEADS, LENGTHS, LENGTHS, (None, "causal", "array"), GPUS
    ):
        q, k = Spec((1, heads, queries, size), mx.bfloat16), Spec((1, groups, keys, size), mx.bfloat16)
        given = Spec((1, 1, queries, keys), mx.bool_) if mask == "array" else mask
        ours = attention_path(
            GPUS[m5], heads=heads, kv_heads=groups, head_dim=size, queries=queries, keys=keys, mask=mask
        )
        assert KINDS[ours] == metal_rules.attention_path(q, k, k, given, m5=m5), (q, k, mask, m5)
        seen.add((ours, m5))
    assert seen == {(path, m5) for path in KINDS for m5 in GPUS} - {(NEURAL, False), (FUSED, True)}

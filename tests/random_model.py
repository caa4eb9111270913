"""A small Gemma 3 with random weights, in memory: for tests of pairs (cached = uncached, batch = single)."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gemma3.config import Config
from mlx_gemma3.model.gemma3 import Gemma3

WINDOW, PER_IMAGE, IMAGE, SIZE = 8, 4, 60, 28


def tiny_config(*, vision: bool = True, **text: Any) -> Config:
    """8 layers (the sixth is global), window 8, pictures of 28 pixels in 4 tokens, 64 ids."""
    values: dict[str, Any] = {
        "model_type": "gemma3",
        "mm_tokens_per_image": PER_IMAGE,
        "boi_token_index": 58,
        "eoi_token_index": 59,
        "image_token_index": IMAGE,
        "eos_token_id": [1, 3],
        "text_config": {
            "vocab_size": 64,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "sliding_window": WINDOW,
            "max_position_embeddings": 256,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            **text,
        },
    }
    if vision:
        values["vision_config"] = {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIZE,
            "patch_size": 7,
        }
    return Config.from_dict(values)


def random_model(config: Config, *, seed: int = 0) -> Gemma3:
    """Float32 weights large enough that a wrong mask or position moves the logits by far more than rounding."""
    model, random = Gemma3(config), np.random.default_rng(seed)
    weights = []
    for name, array in tree_flatten(model.parameters()):
        scale = 0.3 if "norm" in name else 1.5 / np.sqrt(array.shape[-1]) if array.ndim > 1 else 0.1
        weights.append((name, mx.array(random.normal(0, scale, array.shape).astype(np.float32))))
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    return model


def random_pictures(count: int, *, seed: int = 0) -> np.ndarray:
    """(N, S, S, 3) float32 in [-1, 1]"""
    return np.random.default_rng(seed).uniform(-1, 1, (count, SIZE, SIZE, 3)).astype(np.float32)


def tokens_with_pictures(plan: str, *, seed: int = 0) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids for a plan such as "tttIttI": t a random text token, I a picture between its two border tokens."""
    random, ids, spans = np.random.default_rng(seed), [2], []
    for letter in plan:
        if letter == "t":
            ids.append(int(random.integers(4, 58)))
        else:
            spans.append((len(ids) + 1, len(ids) + 1 + PER_IMAGE))
            ids += [58, *[IMAGE] * PER_IMAGE, 59]
    return ids, spans

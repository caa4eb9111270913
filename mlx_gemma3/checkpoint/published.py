"""The five published sizes as data: what can be said of a size before any of its files are here.

Sources: the technical report's table of sizes and the config.json files on the Hub; the settings they leave out are
config.py's defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config import Config

_SMALL: Mapping[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
}
_SIGLIP: Mapping[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
}


def _text_only(*, hidden: int, inner: int, layers: int) -> Config:
    own = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return Config.from_dict({**_SMALL, **own})


def _with_pictures(*, hidden: int, inner: int, layers: int, heads: int, **more: Any) -> Config:
    text = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 1024,
    }
    return Config.from_dict({"model_type": "gemma3", "text_config": {**text, **more}, "vision_config": _SIGLIP})


SIZES: Mapping[str, Config] = {
    "270M": _text_only(hidden=640, inner=2048, layers=18),
    "1B": _text_only(hidden=1152, inner=6912, layers=26),
    "4B": _with_pictures(hidden=2560, inner=10240, layers=34, heads=8),
    "12B": _with_pictures(hidden=3840, inner=15360, layers=48, heads=16),
    "27B": _with_pictures(hidden=5376, inner=21504, layers=62, heads=32, head_dim=128, query_pre_attn_scalar=5376 / 32),
}

# EmbeddingGemma, by its model card and configuration: half of the window to each side, no head of its own.
EMBEDDING = Config.from_dict(
    {
        **_SMALL,
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 24,
        "num_attention_heads": 3,
        "max_position_embeddings": 2048,
        "use_bidirectional_attention": True,
    }
)

_IN_A_NAME = re.compile(rf"(?<![a-z0-9])({'|'.join(SIZES)})(?![a-z0-9])", re.IGNORECASE)


def size_of(config: Config) -> str | None:
    """ "4B" for a config whose decoder has the shape of the published 4B; None for any other."""

    def shape(of: Config) -> tuple[int, ...]:
        text = of.text
        return text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.head_dim

    return next((name for name, published in SIZES.items() if shape(published) == shape(config)), None)


def size_in(name: str) -> str | None:
    """ "4B" for "4b" and "mlx-community/gemma-3-4b-it-8bit"; None where a name says no size."""
    found = _IN_A_NAME.search(name)
    return found[1].upper() if found else None


def member_in(name: str) -> tuple[str, Config] | None:
    """What is known of a model of the family by its name, as "medgemma-27b-text-it"; None of a name that says nothing.

    Returns:
        Its size in words, and its config.
    """
    said = name.lower()
    if "embeddinggemma" in said:
        return "EmbeddingGemma 300M", EMBEDDING
    if (size := size_in(name)) is None:
        return None
    config = SIZES[size]
    return size, replace(config, vision=None) if "medgemma" in said and "text" in said else config

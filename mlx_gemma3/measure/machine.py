"""What this machine is and does with Gemma 3, in plain types: chip, memory, limits, and the path attention takes."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from ..boundary.system import tf32
from ..checkpoint.memory import this_machine
from ..checkpoint.published import SIZES, size_of
from ..config import Config
from ..model.attention_path import Gpu, Mask, attention_path
from ..model.chunks import chunk_size
from ..model.device import fused_from, gpu, may_wire, most_wired, unfused_tokens

CONTEXTS = (512, 8192, 131072)
CPU = "CPU: numpy"  # model/cpu.py


def machine(config: Config | None = None, *, dtype_bytes: int = 2, kv_bits: int = 16) -> dict[str, Any]:
    """This machine; sizes in bytes.

    Args:
        config: of one model, whose attention is told; None for every published size.
        dtype_bytes: of the activations; 4 for float32.
        kv_bits: of the keys and values of global layers.

    Returns:
        working_set: what Metal recommends at most; None without Metal, as `wired`.
        wired: the most that an engine's weights and caches are kept resident with (model/device.py).
        tf32: whether MLX may multiply float32 as TF32.
        attention: one row for each model, layer ("local", "global", "tower"), context and number of queries, with the
            keys, the mask and the path (model/attention_path.py); none without Metal.
    """
    here, found = this_machine(), gpu()
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    models = SIZES if config is None else {size_of(config) or "this model": config}
    rows: list[dict[str, Any]] = []
    if found is not None and on_gpu:
        rows = [row for name in models for row in _attention(found, name, models, dtype_bytes, kv_bits)]
    return {
        "chip": str(mx.device_info(mx.default_device()).get("device_name", platform.processor())),
        "architecture": None if found is None else found.architecture,
        "system": system(),
        "mlx": version("mlx"),
        "backend": CPU if not on_gpu else "Metal" if found is not None else "GPU without Metal",
        "memory": here.memory,
        "working_set": None if found is None else here.budget,
        "wired": None if found is None else most_wired() if may_wire() else 0,
        "tf32": tf32(),
        "neural_accelerators": found is not None and found.neural,
        "attention": rows,
    }


def system() -> str:
    """ "macOS 15.3", or another system's name and version."""
    release = platform.mac_ver()[0]
    return f"macOS {release}" if release else platform.platform()


def _attention(
    gpu: Gpu, name: str, models: Mapping[str, Config], dtype_bytes: int, kv_bits: int
) -> Iterator[dict[str, Any]]:
    """Steps and the last chunks of prompts of one model, then its tower."""
    config = models[name]
    text, vision = config.text, config.vision
    float32 = dtype_bytes == 4

    def row(layer: str, context: int | None, queries: int, keys: int, mask: Mask) -> dict[str, Any]:
        path = attention_path(
            gpu,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            queries=queries,
            keys=keys,
            mask=mask,
            float32=float32,
            kv_bits=kv_bits if layer == "global" else 16,
        )
        about = {"layer": layer, "context": context, "queries": queries, "keys": keys, "mask": mask}
        return {"model": name, **about, "path": path}

    for context in CONTEXTS:
        if context > text.max_position_embeddings:
            continue
        chunk = chunk_size(
            config, context, kv_bits=kv_bits, dtype_bytes=dtype_bytes, unfused=unfused_tokens(),
            left=context, fused_from=fused_from(),
        )  # fmt: skip
        for queries in (1, min(chunk, context)):
            whole: Mask = None if queries == 1 else "causal"
            reach = min(context, text.sliding_window - 1 + queries)
            yield row("local", context, queries, reach, "array" if reach > text.sliding_window else whole)
            yield row("global", context, queries, context, whole)
    if vision is not None:
        heads, patches = vision.num_attention_heads, vision.grid**2
        path = attention_path(
            gpu,
            heads=heads,
            kv_heads=heads,
            head_dim=vision.hidden_size // heads,
            queries=patches,
            keys=patches,
            mask=None,
            float32=float32,
        )
        about = {"layer": "tower", "context": None, "queries": patches, "keys": patches, "mask": None}
        yield {"model": name, **about, "path": path}

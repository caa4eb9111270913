"""The roofline of decoding: the bytes that one step has to read, and how many bytes a second the machine can read.

A step reads every matrix of the decoder once, whatever the batch, and the keys and values of each row of the batch. No
step can be faster than these bytes divided by the bandwidth; how near it comes is the share of the bandwidth.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..checkpoint.entries import Entry
from ..checkpoint.memory import loaded_bytes
from ..checkpoint.safetensors import EMBEDDING, is_vision
from ..config import Config
from ..model.cache import KV_GROUP

_GB = 10**9
# GB/s by device name: Apple's technical specifications of the Macs with these chips (support.apple.com, "Tech Specs")
# and the chips' announcements (apple.com/newsroom). M1's 68 is 8 channels of LPDDR4X-4266; Apple gave no figure.
_PUBLISHED = {
    "Apple M1": 68, "Apple M1 Pro": 200, "Apple M1 Max": 400, "Apple M1 Ultra": 800,
    "Apple M2": 100, "Apple M2 Pro": 200, "Apple M2 Max": 400, "Apple M2 Ultra": 800,
    "Apple M3": 100, "Apple M3 Pro": 150, "Apple M3 Max": 400, "Apple M3 Ultra": 819,
    "Apple M4": 120, "Apple M4 Pro": 273, "Apple M4 Max": 546,
    "Apple M5": 153, "Apple M5 Pro": 307, "Apple M5 Max": 614,
}  # fmt: skip
# The Max with fewer GPU cores has the same name; it is sold with these GiB of memory and no others.
_FEWER_CORES = {"Apple M3 Max": ((36, 96), 300), "Apple M4 Max": ((36,), 410), "Apple M5 Max": ((36,), 460)}
_COPY = 256 << 20  # bytes: far more than any cache holds


@dataclass(frozen=True)
class Bandwidth:
    """Of the memory that the model's device reads."""

    device: str
    bytes_per_second: float
    source: str  # "published" or "measured with a copy"


def step_weight_bytes(entries: Iterable[Entry], config: Config, *, batch: int, dtype_bytes: int) -> int:
    """Weights that one step reads, as they are once loaded: packed stays packed, floats have `dtype_bytes`.

    All of the decoder and the head; the embedding's matrix is the head too where it is tied, and else only gives a row
    for each token of the batch. The vision tower and the projector are not read.

    Args:
        entries: of the checkpoint (`open_store`).
    """
    words = [entry for entry in entries if not is_vision(entry.name)]
    embedding = [entry for entry in words if entry.name == EMBEDDING]
    rows = batch * loaded_bytes(embedding, dtype_bytes=dtype_bytes) // config.text.vocab_size
    whole = words if config.tie_word_embeddings else [entry for entry in words if entry.name != EMBEDDING]
    return rows + loaded_bytes(whole, dtype_bytes=dtype_bytes)


def step_kv_bytes(config: Config, depth: int, *, kv_bits: int, dtype_bytes: int) -> int:
    """Keys and values that one step reads for one row of the batch when `depth` tokens are in the caches.

    The step's own token counts: depth + 1 rows in a global layer, at most the window in a local one. A row is 2 * K * D
    numbers; packed ones (global layers only) have a scale and a bias for each group of 64.
    """
    text = config.text
    row = 2 * text.num_key_value_heads * text.head_dim
    global_layers = sum(text.is_global(layer) for layer in range(text.num_hidden_layers))
    seen = global_layers * (depth + 1) * row
    local = (text.num_hidden_layers - global_layers) * min(depth + 1, text.sliding_window) * row
    packed = seen * kv_bits // 8 + seen * 2 * dtype_bytes // KV_GROUP
    return local * dtype_bytes + (seen * dtype_bytes if kv_bits == 16 else packed)


def bandwidth() -> Bandwidth:
    """What this machine's device can read a second: published where its name is known, else measured now."""
    device = mx.default_device()
    on_gpu = device.type == mx.DeviceType.gpu
    info = mx.device_info(device)
    name = str(info.get("device_name", "unknown device"))
    known = published(name, int(info.get("memory_size", 0))) if on_gpu else None
    if known is not None:
        return Bandwidth(name, known, "published")
    return Bandwidth(name, _copy_on_gpu() if on_gpu else _copy_on_cpu(), "measured with a copy")


def published(name: str, memory: int) -> float | None:
    """Bytes a second of an Apple chip with so many bytes of memory; None for one that is not in the table."""
    sizes, less = _FEWER_CORES.get(name, ((), 0))
    speed = less if memory >> 30 in sizes else _PUBLISHED.get(name)
    return None if speed is None else float(speed * _GB)


def _copy_on_gpu() -> float:
    source = mx.zeros((_COPY // 4,), dtype=mx.float32)
    mx.eval(source)
    best = 0.0
    for _ in range(8):
        began = time.perf_counter()
        mx.eval(source + 1)
        best = max(best, 2 * _COPY / (time.perf_counter() - began))  # read and written
    return best


def _copy_on_cpu() -> float:
    """All cores at once, a part each: one alone does not reach what the memory can do."""
    cores = os.cpu_count() or 1
    parts = [(np.ones(_COPY // cores, np.uint8), np.zeros(_COPY // cores, np.uint8)) for _ in range(cores)]
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(8):
            began = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), parts))
            best = max(best, 2 * _COPY / (time.perf_counter() - began))
    return best

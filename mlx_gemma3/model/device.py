"""The device's memory: what MLX keeps of it after use, and what Metal keeps resident.

MLX holds freed buffers for the next array of about their size. Scores and keys grow with every chunk of a prompt, so
theirs never fit again: until the working set is nearly full they stay, and the system swaps. So they are given back
after loading, after each chunk, and now and then while an answer is written.

Metal may page out what is not wired, and brings it back at the next use. From macOS 15 on, an engine's weights and
caches are wired while it lives, never so much that the system has too little left.

Source: MLX 0.32.4, backend/metal/allocator.cpp and resident.h, backend/common/buffer_cache.h.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import mlx.core as mx

from ..boundary.system import tf32
from .attention_path import Gpu
from .chunks import NEURAL_QUERIES, unfused_chunk

STEPS_BETWEEN = 256  # tokens of an answer
FREED_SHARE = 8  # of the memory for the model, the part that freed buffers may take
WORK_BYTES = 1 << 30  # beside weights and caches
LEFT_SHARE, LEFT_BYTES = 0.35, 8 << 30  # of all memory, the larger of both, is left to the system
WIRING_FROM = 15  # macOS

F = TypeVar("F", bound=Callable[..., Any])

_wanted: dict[int, int] = {}  # bytes by engine
_before: list[int] = []  # the limit that we found
_lock = threading.Lock()


def compiled(function: F) -> F:
    """Compiled by MLX where there is a GPU: short steps in a row are one kernel. On a CPU MLX would ask for g++."""
    fused = mx.compile(function)

    @wraps(function)
    def call(*given: Any) -> Any:
        return (function if mx.default_device().type == mx.DeviceType.cpu else fused)(*given)

    return cast(F, call)


def bound_freed(budget: int) -> None:
    """Hold at most a part of the memory that a model may take in freed buffers."""
    mx.set_cache_limit(budget // FREED_SHARE)


def release() -> None:
    """Give freed buffers back."""
    mx.clear_cache()


def leave_thread() -> None:
    """At the end of a thread that used MLX: Metal's queue of this thread is freed in order, before the thread ends.

    On the CPU streams go from engine to engine (streams.py).
    """
    release()
    if mx.metal.is_available():
        mx.clear_streams()


def wire(owner: int, nbytes: int) -> None:
    """Keep so many bytes more resident, until `unwire`. Does nothing without Metal, or before macOS 15."""
    if not may_wire():
        return
    with _lock:
        _wanted[owner] = nbytes
        _apply()


def unwire(owner: int) -> None:
    """Let go of what `owner` wired; after the last one the limit is what it was before the first."""
    with _lock:
        if _wanted.pop(owner, None) is not None:
            _apply()


def may_wire() -> bool:
    """With Metal, from macOS 15 on."""
    return mx.metal.is_available() and _macos() >= (WIRING_FROM,)


def most_wired() -> int:
    """Bytes that may be wired together. 0 on a Mac of 8 GB, which needs all for its system."""
    info = mx.device_info(mx.Device(mx.gpu))
    memory, working = int(info["memory_size"]), int(info["max_recommended_working_set_size"])
    return max(0, min(working, memory - int(max(LEFT_SHARE * memory, LEFT_BYTES))))


def _apply() -> None:
    if not _wanted:
        mx.set_wired_limit(_before.pop())
        return
    found = mx.set_wired_limit(min(most_wired(), sum(_wanted.values())))
    if not _before:
        _before.append(found)


def gpu() -> Gpu | None:
    """What attention's path depends on here; None without Metal."""
    if not mx.metal.is_available():
        return None
    architecture = str(mx.device_info(mx.Device(mx.gpu)).get("architecture", ""))
    return Gpu(architecture, _macos(), tf32=tf32())


def neural_accelerators() -> bool:
    """Whether MLX uses those of M5 here."""
    found = gpu()
    return found is not None and found.neural


def unfused_tokens() -> int:
    """Tokens that are read at once here where attention is not fused: chunks.py's rule."""
    metal = mx.metal.is_available()
    working = int(mx.device_info(mx.Device(mx.gpu))["max_recommended_working_set_size"]) if metal else 0
    return unfused_chunk(working, metal=metal, neural=neural_accelerators())


def fused_from() -> int:
    """Queries from which heads of 256 are fused here; 0 for never."""
    return NEURAL_QUERIES if neural_accelerators() else 0


def memory_bytes() -> int:
    """Of this machine, where there is no Metal to say it."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _macos() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.mac_ver()[0].split(".") if part.isdigit())

"""The memory of MLX in a test: what is counted from here on is of the test's own making."""

from __future__ import annotations

import gc

import mlx.core as mx


def start_measuring() -> int:
    """Bytes that arrays hold now; the peak starts anew.

    Arrays that an earlier test left in a cycle of references go first: else they may go while this test measures.
    """
    mx.synchronize()
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()

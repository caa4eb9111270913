"""CPU streams that outlive their threads, so that engines opened one after another use the same ones.

MLX starts a native thread for each CPU stream and never ends it, not by `clear_streams` nor with the thread that made
the stream (MLX 0.32.4: 20 Python threads with one small evaluation each leave 20 native ones). A stream of
`new_thread_unsafe_stream` may be used in any thread, by one at a time: a lent one is that thread's alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

_idle: list[mx.Stream] = []
_here = threading.local()  # .streams: those of this thread; .lent: whether they go back


@contextmanager
def lent() -> Iterator[None]:
    """Until the block ends, this thread works on streams of threads that have ended; it must do nothing afterwards."""
    _here.streams, _here.lent = [_new()], True
    mx.set_default_stream(_here.streams[0])
    try:
        yield
    finally:
        for stream in _here.streams:
            mx.synchronize(stream)
        _idle.extend(_here.streams)
        _here.streams = []


def cpu_streams(count: int) -> list[mx.Stream]:
    """The default CPU stream of this thread and `count` - 1 more."""
    if not hasattr(_here, "streams"):
        _here.streams, _here.lent = [mx.default_stream(mx.cpu)], False
    while len(_here.streams) < count:
        _here.streams.append(_new() if _here.lent else mx.new_stream(mx.cpu))
    streams: list[mx.Stream] = _here.streams[:count]
    return streams


def _new() -> mx.Stream:
    return _idle.pop() if _idle else mx.new_thread_unsafe_stream(mx.cpu)

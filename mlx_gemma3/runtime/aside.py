"""Work that must not hold up the thread that asks for it: a picture decodes, an address is waited for.

The work is done in a thread of its own, as long as it is wanted. Then it is left behind: it ends by itself, at its next
word of progress or when its picture is decoded, which is bounded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_BEAT = 0.02  # seconds between two questions whether it is still wanted


class Unwanted(Exception):
    """Nobody waits for it any more."""


class _Work(threading.Thread, Generic[T]):
    def __init__(self, work: Callable[[], T]) -> None:
        super().__init__(name="mlx-gemma3 pictures", daemon=True)
        self._work = work
        self.result: T | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:  # raised again in the thread that waits
            self.error = error


def aside(work: Callable[[], T], wanted: Callable[[], bool]) -> T:
    """What the work returns or raises, done in another thread.

    Raises:
        Unwanted: as soon as it is not wanted any more.
    """
    thread = _Work(work)
    thread.start()
    while thread.is_alive():
        if not wanted():
            raise Unwanted
        thread.join(_BEAT)
    if thread.error is not None:
        raise thread.error
    return thread.result  # type: ignore[return-value]

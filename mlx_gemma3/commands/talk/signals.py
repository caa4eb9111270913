"""Signals of a chat: what ends it saves what it must on the way; Ctrl-C stops what is being done."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

ENDS = (signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT)


class Leave(SystemExit):
    """The end of the program with this status; what must be saved is saved on the way."""


def leave_by(number: int) -> NoReturn:
    """Raises Leave for this signal, and lets no other disturb what is then saved."""
    for name in ENDS:
        signal.signal(name, signal.SIG_IGN)
    raise Leave(128 + number)


@contextlib.contextmanager
def as_exceptions() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt; a hang-up or a request to end is a Leave."""

    def end(number: int, _: FrameType | None) -> None:
        leave_by(number)

    with _handled({signal.SIGINT: signal.default_int_handler} | dict.fromkeys(ENDS, end)):
        yield


@contextlib.contextmanager
def stopping(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `stop`; once more, and the program ends.

    Raises:
        Leave: where the program is when the second Ctrl-C comes.
    """
    asked = False

    def interrupted(_: int, __: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise Leave(130)
        asked = True
        stop()

    with _handled({signal.SIGINT: interrupted}):
        yield


@contextlib.contextmanager
def held(arrived: Callable[[], object]) -> Iterator[list[int]]:
    """Signals interrupt nothing: each is put into the list, and `arrived` is called."""
    numbers: list[int] = []

    def put(number: int, _: FrameType | None) -> None:
        numbers.append(number)
        arrived()

    with _handled(dict.fromkeys((signal.SIGINT, *ENDS), put)):
        yield numbers


_Handler = Callable[[int, FrameType | None], object]


@contextlib.contextmanager
def _handled(handlers: dict[signal.Signals, _Handler]) -> Iterator[None]:
    before = {name: signal.signal(name, handler) for name, handler in handlers.items()}
    try:
        yield
    finally:
        for name, handler in before.items():
            if signal.getsignal(name) is handlers[name]:  # otherwise the program leaves
                signal.signal(name, handler)

"""An engine that is loaded while the person already types."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...errors import OptionError

if TYPE_CHECKING:
    from ...runtime.engine import Engine, Session

Loaded = tuple["Engine", "Session"]


class Loading:
    """Makes an engine and its first conversation in a thread of its own.

    Args:
        model: what errors call it.
        make_engine, make_session: called there, one after the other. A base checkpoint is refused between them.
    """

    def __init__(
        self, model: str, make_engine: Callable[[], Engine], make_session: Callable[[Engine], Session]
    ) -> None:
        self.model = model
        self.failure: Exception | None = None
        self._loaded: Loaded | None = None
        self._ended = threading.Event()
        self._make_engine, self._make_session = make_engine, make_session

    def start(self) -> None:
        threading.Thread(target=self._run, name="loading", daemon=True).start()

    def _run(self) -> None:
        engine = None
        try:
            engine = self._make_engine()
            if not engine.about["instruct"]:
                raise OptionError(
                    "chat",
                    got=f"{self.model}, a base checkpoint that only completes text",
                    want="an instruction-tuned one (-it)",
                    do="for this one there is mlx-gemma3 generate",
                )
            self._loaded = engine, self._make_session(engine)
        except Exception as error:  # raised again where the result is asked for
            self.failure = error
            if engine is not None:
                engine.close()
        finally:
            self._ended.set()

    def ended(self, timeout: float = 0) -> bool:
        """Whether it is done, or has failed, within so many seconds."""
        return self._ended.wait(timeout)

    @property
    def loaded(self) -> Loaded:
        """What was made. Waits for it.

        Raises:
            Gemma3Error: what went wrong.
        """
        self._ended.wait()
        if self.failure is not None:
            raise self.failure
        assert self._loaded is not None
        return self._loaded

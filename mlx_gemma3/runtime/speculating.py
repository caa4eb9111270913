"""What guesses the tokens of an engine's answers: made for each answer as it begins, with what earlier ones taught."""

from __future__ import annotations

from collections.abc import Sequence

from ..generation.speculation import LookUp, Proposer, Record
from .loaded import Loaded
from .timeline import Tokens


class Speculation:
    """Of one engine."""

    def __init__(self, loaded: Loaded) -> None:
        self._on = loaded.options.speculation
        self._skip = () if loaded.config.vision is None else (loaded.config.image_token_id,)
        self._record = Record()

    def proposers(self, prompt: Tokens) -> Sequence[Proposer]:
        """For an answer to this prompt."""
        return [LookUp(prompt.ids, skip=self._skip, record=self._record)] if self._on else []

"""What is asked of an engine: one answer, and the channel that its events go into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..generation.choice import Constraint
from .options import Options
from .stream import Channel, Messages, Picture

if TYPE_CHECKING:
    from .conversation import Conversation
    from .prompts import Prepared


class Request(Channel):
    """One answer."""

    def __init__(
        self,
        prompt: str | Messages | None,
        images: Sequence[Picture],
        options: Options,
        conversation: Conversation | None = None,
        *,
        like: Request | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        """
        Args:
            prompt: None answers the last turn of the conversation again.
            conversation: None when the prompt is all there is.
            like: an earlier request with the same prompt, which is prepared once for both.
            constraint: what the answer may consist of.
        """
        super().__init__()
        self.prompt, self.images, self.options, self.conversation = prompt, list(images), options, conversation
        self.like, self.constraint = like, constraint
        self.prepared: Prepared | None = None  # set once, by the engine's thread

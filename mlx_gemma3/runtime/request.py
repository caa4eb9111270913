"""What is asked of an engine: one answer, and the channel that its events go into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..generation.constraint import Constraint
from .options import Options
from .stream import Channel, Messages, Picture
from .timeline import Tokens

if TYPE_CHECKING:
    from .conversation import Conversation
    from .forms import Form


@dataclass(frozen=True)
class Prepared:
    """A prompt, or one turn of a conversation, as the model reads it."""

    tokens: Tokens
    pixels: Mapping[str, NDArray[np.float32]]  # (S, S, 3) by digest
    images: int  # pictures as people count them: crops are not


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
        second_bos: bool = False,
    ) -> None:
        """
        Args:
            prompt: None answers the last turn of the conversation again.
            conversation: None when the prompt is all there is.
            like: an earlier request with the same prompt, which is prepared once for both.
            constraint: what the answer may consist of.
            second_bos: one more <bos> before the prompt's own.
        """
        super().__init__(options.schema)
        self.prompt, self.images, self.options, self.conversation = prompt, list(images), options, conversation
        self.like, self.constraint, self.second_bos = like, constraint, second_bos
        self.form: Form | None = _form(options) if like is None else like.form
        self.prepared: Prepared | None = None  # set once, by the engine's thread


def _form(options: Options) -> Form | None:
    if options.free:
        return None
    from .forms import Form  # with what grammars need: nobody else waits for it

    return Form(options)

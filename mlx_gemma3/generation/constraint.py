"""What an answer may consist of, asked token by token. What makes one is grammar/; this only says what it can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Constraint(Protocol):
    """Begins at the answer's first token. Runs on the host; what it raises ends this answer alone.

    A class that derives from it need only say what is allowed and accept what was chosen.
    """

    def allowed(self) -> NDArray[np.uint32] | None:
        """(ceil(V / 32),): bit i of word w stands for token 32 w + i, set where it may come next; None for all.

        A token that ends the answer is set where it may end.
        """

    def accept(self, token: int) -> None:
        """This token was chosen, or forced."""

    def forced(self) -> Sequence[int]:
        """The tokens that come next, where only one text can; they are not accepted yet."""
        return ()

    @property
    def complete(self) -> bool:
        """Whether nothing may follow: the answer is over without a token that says so."""
        return False

    def rewind(self, count: int) -> None:
        """Take back the last `count` tokens that were accepted."""
        raise NotImplementedError(type(self).__name__)

"""Several sequences, each writing its own answer: one forward pass for all of them, one choice for each.

While the host looks at a token a GPU already works on the next: each forward pass is issued before the token before is
read, and with it the choice, but for sequences whose constraint must see the token first.

What a constraint forces is written at once, without a choice for each token, and is then read like a prompt: as one
chunk, where it is longer than the sequences are many, which go on without it meanwhile; else token by token with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from ..model.cache import Caches
from ..model.device import STEPS_BETWEEN, release
from ..model.runner import Runner
from .choice import Chooser, Chosen, Likelihood, choose
from .sampling import Sampling


@dataclass(eq=False)
class Row:
    """One sequence that writes."""

    caches: Caches
    chooser: Chooser
    left: int  # tokens that it may still write
    _unread: tuple[Chosen, int] | None = None  # the next token, chosen already, and its place in that choice
    _logits: mx.array | None = None  # (1, V) for the one after it, where the choice waits for the host
    _behind: list[int] = field(default_factory=list)  # written, and not in the caches yet, nor on the way there

    @property
    def over(self) -> bool:
        """Whether it writes no more."""
        return not self.left or self.chooser.complete


@dataclass(frozen=True)
class Written:
    """A token of a row, on the host."""

    row: Row
    token: int
    likelihood: Likelihood | None = None
    error: Exception | None = None  # what the row's constraint raised


class Batch:
    """The rows that write now. They join and leave between any two calls of `next`."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.rows: list[Row] = []
        self._begun: list[Written] = []  # what was forced at the beginning of answers
        self._steps = 0

    def join(self, row: Row, logits: mx.array) -> None:
        """Add a row that may write at least a token; the first comes from (1, V) float32 logits after its prompt."""
        self.rows.append(row)
        if forced := row.chooser.forced(row.left):
            row.chooser.look_up()
            self._begun += _forced(row, forced)
        else:
            _choose([row], logits)

    def leave(self, row: Row) -> None:
        """Take a row out. Its caches hold every token that it has written, but perhaps the last ones."""
        self.rows.remove(row)
        self._begun = [one for one in self._begun if one.row is not row]
        row._unread = row._logits = None

    def next(self) -> list[Written]:
        """More tokens, of each row in order: mostly one of every row. Then each row that is over must be taken out."""
        self._steps += 1
        if self._steps % STEPS_BETWEEN == 0:
            release()
        written, self._begun = self._begun, []
        rows = [row for row in self.rows if not row.over]
        if late := [row for row in rows if row._logits is not None]:
            _choose(late, _stacked([row._logits for row in late if row._logits is not None]))
        self._catch_up([row for row in rows if row._behind])
        reading = [(row, row._unread) for row in rows if row._unread is not None]
        for row, _ in reading:
            row._unread = None
        if self.runner.ahead:
            self._issue([(row, unread) for row, unread in reading if row.left > 1])
        return written + [one for row, unread in reading for one in _read(row, *unread)]

    def _catch_up(self, rows: list[Row]) -> None:
        """Read what they wrote: a token of each, or of a row all that was forced."""
        for row in [row for row in rows if len(row._behind) > len(self.rows)]:
            hidden = self.runner.read([row._behind], None, row.caches, last_only=True, spans=())
            row._behind = []
            _choose([row], self.runner.head(hidden)[:, 0])
        if stepping := [row for row in rows if row._behind]:
            logits = self._forward(stepping, mx.array([row._behind.pop(0) for row in stepping]))
            level = [at for at, row in enumerate(stepping) if not row._behind]  # the others have more to read
            if len(level) == len(stepping):
                _choose(stepping, logits)
            elif level:
                _choose([stepping[at] for at in level], _stacked([logits[at : at + 1] for at in level]))

    def _issue(self, going: list[tuple[Row, tuple[Chosen, int]]]) -> None:
        """The next forward pass, from tokens that need not be computed yet, and every choice that need not wait."""
        if not going:
            return
        rows = [row for row, _ in going]
        first = going[0][1][0]
        whole = len(first.likelihoods) == len(going) and all(
            chosen is first and place == at for at, (_, (chosen, place)) in enumerate(going)
        )
        tokens = first.tokens if whole else _stacked([one.tokens[at : at + 1] for _, (one, at) in going])
        logits = self._forward(rows, tokens)
        free = [at for at, row in enumerate(rows) if row.chooser.constraint is None]
        if len(free) == len(rows):
            _choose(rows, logits)
            return
        for at, row in enumerate(rows):
            if row.chooser.constraint is not None:
                row._logits = logits[at : at + 1]
        mx.async_eval([row._logits for row in rows if row._logits is not None])
        if free:
            _choose([rows[at] for at in free], _stacked([logits[at : at + 1] for at in free]))

    def _forward(self, rows: list[Row], tokens: mx.array) -> mx.array:
        return self.runner.step(tokens, [row.caches for row in rows])


def _choose(rows: Sequence[Row], logits: mx.array) -> None:
    chosen = choose(logits, [row.chooser for row in rows])
    mx.async_eval(chosen.arrays)
    for place, row in enumerate(rows):
        row._unread, row._logits = (chosen, place), None


def _read(row: Row, chosen: Chosen, place: int) -> list[Written]:
    """Wait for the token; the constraint looks at it while the device computes the pass after it.

    Returns:
        it, and what the constraint forces to follow.
    """
    token = int(chosen.read()[place])
    row.left -= 1
    if row._unread is None and row._logits is None:  # it is not on its way into the caches
        row._behind.append(token)
    try:
        forced = row.chooser.accept(token, row.left)
    except Exception as error:  # of the caller's code: it ends this row alone
        return [Written(row, token, error=error)]
    return [Written(row, token, chosen.likelihood(place)), *_forced(row, forced)]


def _forced(row: Row, tokens: list[int]) -> list[Written]:
    """Tokens that were written without a choice; logits for another one in their place are dropped."""
    if tokens:
        row._logits = None
        row._behind += tokens
        row.left -= len(tokens)
    return [Written(row, token) for token in tokens]


def _stacked(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def decode(
    runner: Runner,
    logits: mx.array,
    caches: Caches,
    *,
    prompt: Sequence[int] = (),
    sampling: Sampling,
    max_tokens: int,
) -> Iterator[int]:
    """Write at most `max_tokens` tokens of one sequence, and never more than the model has positions.

    Args:
        logits: (1, V) float32 after the prompt, from `prefill`.
        prompt: the ids before the answer, for the repetition penalty.

    Yields:
        One id at a time. The caller stops at an end id by closing the iterator; a step that was already issued is lost.
    """
    left = min(max_tokens, runner.config.text.max_position_embeddings - caches.offset)
    if left < 1:
        return
    batch, row = Batch(runner), Row(caches, Chooser(sampling, prompt), left)
    batch.join(row, logits)
    while row.left:
        for written in batch.next():
            yield written.token

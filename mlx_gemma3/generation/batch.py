"""Several sequences, each writing its own answer: one forward pass for all of them, one choice for each.

While the host looks at a token a GPU already works on the next: each forward pass is issued before the token before is
read, and with it the choice, but for sequences whose constraint must see the token first.

What a constraint forces is written at once, without a choice for each token, and is then read like a prompt: as one
chunk, where it is longer than the sequences are many, which go on without it meanwhile; else token by token with them.

What a proposer guesses (speculation.py) is verified in one pass with a token of each sequence that does not guess. A
guess begins at a token that the host knows, so a sequence that is about to guess is not issued ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from time import perf_counter

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..model.cache import Caches
from ..model.device import STEPS_BETWEEN, release
from ..model.runner import Runner
from .choice import Along, Chooser, Chosen, Likelihood, choose
from .depth import Depth
from .sampling import Sampling
from .speculation import Proposer, accepted

SHORT = 8  # tokens that a sequence may be behind and still be verified with others


@dataclass(eq=False)
class Row:
    """One sequence that writes."""

    caches: Caches
    chooser: Chooser
    left: int  # tokens that it may still write
    proposers: Sequence[Proposer] = ()  # guess how it goes on; the one that promises most is asked
    drafted: int = 0  # tokens that were guessed, and verified
    accepted: int = 0  # of them right
    passes: int = 0  # of the model, for what it has written
    _unread: tuple[Chosen, int] | None = None  # the next token, chosen already, and its place in that choice
    _logits: mx.array | None = None  # (1, V) for the one after it, where the choice waits for the host
    _behind: list[int] = field(default_factory=list)  # written, and not in the caches yet, nor on the way there

    @property
    def over(self) -> bool:
        """Whether it writes no more."""
        return not self.left or self.chooser.complete

    def wrote(self, tokens: Sequence[int]) -> None:
        """They are known on the host."""
        self.left -= len(tokens)
        for proposer in self.proposers:
            for token in tokens:
                proposer.wrote(token)


@dataclass(frozen=True)
class Written:
    """A token of a row, on the host."""

    row: Row
    token: int
    likelihood: Likelihood | None = None
    error: Exception | None = None  # what the row's constraint raised


@dataclass(frozen=True)
class Draft:
    """What is guessed to come next, and what the row's constraint allows at each place of it and after it."""

    tokens: list[int]
    masks: list[NDArray[np.uint32] | None]


class Batch:
    """The rows that write now. They join and leave between any two calls of `next`."""

    def __init__(self, runner: Runner, depth: Depth | None = None) -> None:
        """
        Args:
            depth: says how far to guess.
        """
        self.runner, self.depth = runner, depth or Depth(compiles=runner.ahead)
        self.rows: list[Row] = []
        self._begun: list[Written] = []  # what was forced at the beginning of answers
        self._steps = 0
        self._plain: list[Row] = []  # who took the last step, if it was no other

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
        began = perf_counter()
        written, self._begun = self._begun, []
        rows = [row for row in self.rows if not row.over]
        if late := [row for row in rows if row._logits is not None]:
            _choose(late, _stacked([row._logits for row in late if row._logits is not None]))
        drafting = perf_counter()
        drafts, held, failed = self._drafts(rows)
        drafting = perf_counter() - drafting
        behind = [row for row in rows if row._behind]
        verified = [row for row in behind if drafts and len(row._behind) <= SHORT]
        self._catch_up([row for row in behind if row not in verified])
        reading = [(row, row._unread) for row in rows if row._unread is not None]
        for row, _ in reading:
            row._unread = None
        going = [one for one in reading if self.runner.ahead and one[0].left > 1 and one[0] not in held]
        if verified:
            tokens = sum(len(row._behind) + len(drafts[row].tokens if row in drafts else ()) for row in verified)
            found = self._verify(verified, drafts, going)
            count = len(verified) + len(going)
            seconds = perf_counter() - began - drafting
            self.depth.took_pass(count, tokens + len(going), seconds, len(found) + len(going), drafting)
            written += found
        else:
            self._issue(going)
        written += [one for row, unread in reading for one in _read(row, *unread)]
        plain = [] if verified or held or len(behind) not in (0, len(reading)) else [row for row, _ in reading]
        if plain and plain == self._plain:  # else it may have taken a part of a step, or more
            self.depth.took_step(len(plain), perf_counter() - began)
        self._plain = plain
        return written + failed

    def _drafts(self, rows: list[Row]) -> tuple[dict[Row, Draft], set[Row], list[Written]]:
        """What those guess that can begin now, those that had better begin next time, and what constraints raised."""
        asked = [
            row
            for row in rows
            if row.proposers
            and row.left > 1
            and row.chooser.takes_back
            and (len(row._behind) <= SHORT if row._behind else self.runner.ahead)
        ]
        if not asked:
            return {}, set(), []
        guesses = [_likeliest(row) for row in asked]
        prices = [proposer.price for _, proposer in guesses]
        depths = self.depth.depths([odds for odds, _ in guesses], len(rows), prices)
        drafts: dict[Row, Draft] = {}
        held: set[Row] = set()
        failed: list[Written] = []
        for row, depth, (_, proposer) in zip(asked, depths, guesses, strict=True):
            if not depth:
                continue
            if not row._behind:
                held.add(row)
                continue
            try:
                tokens, masks = row.chooser.fitting(proposer.propose(depth))
            except Exception as error:  # of the caller's code: it ends this row alone
                failed.append(Written(row, row._behind[-1], error=error))
                continue
            if tokens:
                drafts[row] = Draft(tokens, masks)
        return drafts, held, failed

    def _verify(
        self, rows: list[Row], drafts: dict[Row, Draft], going: list[tuple[Row, tuple[Chosen, int]]]
    ) -> list[Written]:
        """Read what rows are behind and what they guess, and the next token of others; write what turns out right."""
        mine = [drafts.get(row, Draft([], [])) for row in rows]
        for row, draft in zip(rows, mine, strict=True):
            if not draft.tokens and row.chooser.constraint is not None:
                draft.masks.append(row.chooser.allowed)
        ids = [token for row, draft in zip(rows, mine, strict=True) for token in (*row._behind, *draft.tokens)]
        tokens = _stacked([mx.array(ids), *(chosen.tokens[at : at + 1] for _, (chosen, at) in going)])
        counts = [len(row._behind) + len(draft.tokens) for row, draft in zip(rows, mine, strict=True)]
        last = [len(draft.tokens) + 1 for draft in mine]
        others = [row for row, _ in going]
        caches = [row.caches for row in (*rows, *others)]
        logits = self.runner.verify(tokens, caches, [*counts, *[1] * len(going)], [*last, *[1] * len(going)])
        ends = list(accumulate(last, initial=0))
        alongs = [
            row.chooser.along(logits[start:stop], draft.tokens, draft.masks)
            for row, draft, start, stop in zip(rows, mine, ends, ends[1:], strict=False)
        ]
        mx.async_eval([array for along in alongs for array in along.arrays])
        if others:
            self._choose_free(others, logits[ends[-1] :])
        written: list[Written] = []
        wrong = []
        for row, draft, along in zip(rows, mine, alongs, strict=True):
            chosen: list[int] = np.array(along.tokens).tolist()
            right = accepted(draft.tokens, chosen)
            wrong.append(len(draft.tokens) - right)
            row.passes, row.drafted, row.accepted = (
                row.passes + 1,
                row.drafted + len(draft.tokens),
                row.accepted + right,
            )
            written += _take(row, along, chosen[: right + 1])
        self.runner.take_back(caches[: len(rows)], wrong)
        return written

    def _catch_up(self, rows: list[Row]) -> None:
        """Read what they wrote: a token of each, or of a row all that was forced."""
        for row in [row for row in rows if len(row._behind) > len(self.rows)]:
            hidden = self.runner.read([row._behind], None, row.caches, last_only=True, spans=())
            row._behind, row.passes = [], row.passes + 1
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
        self._choose_free(rows, self._forward(rows, tokens))

    def _choose_free(self, rows: list[Row], logits: mx.array) -> None:
        """Every choice that need not wait for the host; the logits of the others are kept."""
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
        for row in rows:
            row.passes += 1
        return self.runner.step(tokens, [row.caches for row in rows])


def _likeliest(row: Row) -> tuple[Sequence[float], Proposer]:
    """The guess that promises most, and how much it promises."""
    most = min(row.left - 1, row.caches.slack)
    found = [(proposer.odds()[:most], proposer) for proposer in row.proposers]
    return max(found, key=lambda one: sum(one[0]))


def _take(row: Row, along: Along, tokens: list[int]) -> list[Written]:
    """These were chosen in one pass; the caches hold all but the last."""
    row._behind = [tokens[-1]]
    row.wrote(tokens)
    likelihoods = along.likelihoods()
    written = [Written(row, token, likelihoods[at]) for at, token in enumerate(tokens)]
    try:
        forced = row.chooser.took(along, tokens, row.left)
    except Exception as error:  # of the caller's code: it ends this row alone
        return [*written[:-1], Written(row, tokens[-1], error=error)]
    return written + _forced(row, forced)


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
    row.wrote([token])
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
        row.wrote(tokens)
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

"""How far to draft: what a pass costs here, what a draft is likely to bring, and what may be lost by trying.

A pass over T tokens costs as much as cost(T) plain steps of its B rows. A row's next drafted token survives with some
probability, the one after it with less. Of all drafts the likeliest n tokens go into a pass; it writes B tokens and as
many as survive. n is where tokens for the time are most, and 0 where no n beats the plain step.

Costs are measured, never assumed: the plain step in the first tokens, longer passes by the passes themselves, the first
of which is a trial. They are kept as ratios to the step of that moment, so that a machine that is busy meanwhile
misleads nobody. Trials and wrong guesses are paid from an account, into which a small part of each plain step goes,
and what passes gain: so what drafting may lose stays about that part, and a few steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

MOST = 31  # drafted tokens of a row
EXTRA = (1, 2, 3, 4, 6, 8, 11, 15, 23, 31)  # drafted tokens of a pass: few sizes, since a GPU compiles for each
TRIAL = 8  # drafted tokens of the first pass
TRIAL_SURVIVES = 3.0  # of them, on average
MARGIN = 1.1  # times the plain step's tokens that a pass must promise for its time
# The account, in plain steps.
ALLOWANCE = 0.015  # of the plain steps may be lost
SAVED, EARNED, OWED = 3.0, 5.0, 1.0  # what it holds at most of what was allowed, and of gains; and what it may owe
CAUTION = 3.0  # it must hold so many times what a pass is expected to lose by a wrong first token
STEPS, PASSES = 8, 4  # measurements of one size that count: their median
OLD = 400  # steps and passes after which the measurements of a size count no more


class Depth:
    """What was measured so far, of one model on one machine."""

    def __init__(self, *, compiles: bool = False) -> None:
        """
        Args:
            compiles: the first pass of each size takes longer, and tells nothing.
        """
        self._compiles, self._sizes = compiles, set[int]()
        self._plain: dict[int, deque[float]] = {}  # seconds by rows
        self._passes: dict[int, deque[float]] = {}  # in plain steps, by tokens
        self._measured: dict[int, int] = {}  # when, by tokens
        self._account = SAVED
        self._turn = 0

    def took_step(self, rows: int, seconds: float) -> None:
        """A plain step of so many rows."""
        self._turn += 1
        self._plain.setdefault(rows, deque(maxlen=STEPS)).append(seconds)
        self._account = max(self._account, min(self._account + ALLOWANCE, SAVED))

    def took_pass(self, rows: int, tokens: int, seconds: float, written: int, drafting: float = 0.0) -> None:
        """A pass of so many rows over so many tokens, which wrote `written` ones.

        Args:
            drafting: seconds that the drafts took before it.
        """
        self._turn += 1
        plain = self.plain(rows)
        new = self._compiles and tokens not in self._sizes
        self._sizes.add(tokens)
        if plain is None or new:
            return
        ratio = max(1.0, seconds / plain)
        self._passes.setdefault(tokens, deque(maxlen=PASSES)).append(ratio)
        self._measured[tokens] = self._turn
        gain = written / rows - ratio - drafting / plain
        self._account = max(-OWED, min(self._account + gain, max(self._account, EARNED)))

    def plain(self, rows: int) -> float | None:
        """Seconds of a plain step; None before two were measured."""
        found = self._plain.get(rows)
        return _median(found) if found and len(found) > 1 else None

    def cost(self, rows: int, tokens: int) -> float | None:
        """Of a pass, in plain steps: as measured for so many tokens, or for the next more, or carried on beyond the
        most. None before a pass was measured.
        """
        known = {
            size: _median(found) for size, found in self._passes.items() if self._turn - self._measured[size] < OLD
        }
        if not known:
            return None
        if tokens in known:
            return known[tokens]
        above = [size for size in known if size > tokens]
        if above:
            return known[min(above)]
        most = max(known)
        return known[most] + (known[most] - 1) / max(1, most - rows) * (tokens - most)

    def depths(self, odds: Sequence[Sequence[float]], rows: int, prices: Sequence[float] = ()) -> list[int]:
        """How many tokens to draft for each row.

        Args:
            odds: for each row that could draft, the probability that its first n drafted tokens survive, n = 1, 2, …:
                falling.
            rows: of the pass in all, B.
            prices: for each row that could draft, seconds that a drafted token takes; none without a draft model.
        """
        plain = self.plain(rows)
        if plain is None or not any(odds):
            return [0] * len(odds)
        ranked = sorted(
            ((chance, row) for row, chances in enumerate(odds) for chance in chances[:MOST]), key=lambda one: -one[0]
        )
        price = [seconds / plain for seconds in prices] or [0.0] * len(odds)
        wrong = 1 - ranked[0][0]
        if self.cost(rows, rows + 1) is None:  # a trial
            trial = ranked[:TRIAL]
            pays = sum(chance for chance, _ in trial) >= TRIAL_SURVIVES + sum(price[row] for _, row in trial)
            return _shares(trial if pays and self._account >= CAUTION * wrong - OWED else [], len(odds))
        best, most, survive, spent, at = MARGIN, 0, 0.0, 0.0, 0
        for extra in EXTRA:
            if extra > len(ranked):
                break
            survive += sum(chance for chance, _ in ranked[at:extra])
            spent += sum(price[row] for _, row in ranked[at:extra])
            at = extra
            cost = self.cost(rows, rows + extra)
            assert cost is not None
            value = (1 + survive / rows) / (cost + spent)
            if value > best and self._account >= CAUTION * wrong * (cost + spent - 1) - OWED:
                best, most = value, extra
        return _shares(ranked[:most], len(odds))


def _shares(ranked: Sequence[tuple[float, int]], rows: int) -> list[int]:
    shares = [0] * rows
    for _, row in ranked:
        shares[row] += 1
    return shares


def _median(values: Sequence[float]) -> float:
    """As in statistics, whose import takes longer than a command's start can spare."""
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2

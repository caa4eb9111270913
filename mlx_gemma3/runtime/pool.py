"""Timelines that nobody uses now: the prompts of recent requests, kept because the next one often begins alike."""

from __future__ import annotations

from collections.abc import Callable

from .timeline import Identity, Timeline, Tokens


class Pool:
    """Idle timelines without a conversation; the one used last stands last. What is taken out is in use, and not here.

    Args:
        most: timelines that are kept.
        budget: and their bytes.
        dropped: called with each that is let go.
    """

    def __init__(self, most: int, budget: int, dropped: Callable[[Timeline], None] = lambda _: None) -> None:
        self.most, self.budget, self._dropped = most, budget, dropped
        self.timelines: list[Timeline] = []

    def best(self, tokens: Tokens, identity: Identity | None) -> tuple[Timeline | None, int]:
        """Of those with this identity the one with most to reuse, and how much; none when taking it would throw away
        more than it saves.
        """
        own = [timeline for timeline in self.timelines if timeline.identity == identity]
        best = max(own, key=lambda timeline: timeline.reusable(tokens), default=None)
        if best is None or not (reused := best.reusable(tokens)):
            return None, 0
        if len(best.tokens) - reused > 2 * reused and len(self.timelines) < self.most:
            return None, 0
        return best, reused

    def shared(self, tokens: Tokens) -> int:
        """How much of a prompt one of them begins with, whether or not it can be taken back so far."""
        return max((timeline.tokens.shared(tokens) for timeline in self.timelines), default=0)

    def take(self, timeline: Timeline) -> None:
        self.timelines.remove(timeline)

    def put(self, timeline: Timeline) -> None:
        self.timelines.append(timeline)
        while len(self.timelines) > self.most or (len(self.timelines) > 1 and self.nbytes > self.budget):
            self.drop_oldest()

    def drop_oldest(self) -> None:
        self._dropped(self.timelines.pop(0))

    @property
    def nbytes(self) -> int:
        return sum(timeline.nbytes for timeline in self.timelines)

"""Timelines that nobody uses now: the prompts of recent requests, kept because the next one often begins alike."""

from __future__ import annotations

from .timeline import Identity, Timeline, Tokens


class Pool:
    """Idle timelines without a conversation; the one used last stands last. What is taken out is in use, and not here.

    Args:
        most: timelines that are kept.
        budget: and their bytes.
    """

    def __init__(self, most: int, budget: int) -> None:
        self.most, self.budget = most, budget
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

    def take(self, timeline: Timeline) -> None:
        self.timelines.remove(timeline)

    def put(self, timeline: Timeline) -> None:
        self.timelines.append(timeline)
        while len(self.timelines) > self.most or (len(self.timelines) > 1 and self.nbytes > self.budget):
            self.drop_oldest()

    def drop_oldest(self) -> None:
        self.timelines.pop(0)

    @property
    def nbytes(self) -> int:
        return sum(timeline.nbytes for timeline in self.timelines)

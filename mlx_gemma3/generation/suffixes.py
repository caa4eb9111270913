"""Where the end of a text stood before in it: a suffix automaton, fed token by token.

Each state stands for the parts of the text that end at the same places. The suffix link of the whole text's state
leads to the longest end of the text that stands elsewhere in it too, and so to what followed there (Blumer et al.,
"The smallest automaton recognizing the subwords of a text", 1985). A token costs amortised constant time.
"""

from __future__ import annotations

RECENT = 16  # states along the suffix links that learn of the newest place; those beyond keep an older one


class Suffixes:
    """Of a text of int tokens that only grows. About 0.4 KB a token."""

    def __init__(self) -> None:
        self.text: list[int] = []
        self.matched = 0  # tokens of the longest end of the text that stood in it before
        self._then = 0  # where that stood last, the place after its last token
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._end = [-1], [0], [0]
        self._last = 0

    def push(self, token: int) -> None:
        """The text goes on."""
        following, link, length, end = self._next, self._link, self._length, self._end
        self.text.append(token)
        at, state, p = len(self.text), len(link), self._last
        following.append({})
        length.append(length[p] + 1)
        end.append(at)
        while p >= 0 and token not in following[p]:
            following[p][token] = state
            p = link[p]
        if p < 0:
            link.append(0)
        else:
            q = following[p][token]
            if length[q] != length[p] + 1:  # the shorter parts of q end at more places now: a state of their own
                link.append(state + 1)
                following.append(dict(following[q]))
                link.append(link[q])
                length.append(length[p] + 1)
                end.append(end[q])
                link[q] = state + 1
                while p >= 0 and following[p].get(token) == q:
                    following[p][token] = state + 1
                    p = link[p]
            else:
                link.append(q)
        self._last = state
        earlier = link[state]
        self.matched, self._then = length[earlier], end[earlier]
        for _ in range(RECENT):
            if earlier <= 0:
                break
            end[earlier] = at
            earlier = link[earlier]

    def following(self, count: int) -> list[int]:
        """What followed there, at most `count` tokens; a text that repeats itself up to its end goes on so."""
        if not self.matched:
            return []
        then, text = self._then, self.text
        found = text[then : then + count]
        period = len(text) - then
        while len(found) < count:
            found.append(found[len(found) - period])
        return found

    def follower(self) -> int | None:
        """The first token of `following`."""
        return self.text[self._then] if self.matched else None

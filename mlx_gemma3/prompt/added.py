"""Which added tokens are cut out of a text before SentencePiece sees it, and in what order.

Hugging Face tokenizers cut added tokens out in two rounds: first those that match the text as it was written, then
those marked `normalized` out of what is left, in which a space and U+2581 are the same. In each round the leftmost
match wins, of those the longest. SentencePiece does both at once, and knows no difference between a space and U+2581.
So it is left all tokens for which that comes to the same, and the others, which hold one of the two characters or share
text with such a token, are cut out before.

Knows nothing of files. Source: tokenizers, added_vocabulary.rs.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

SPACE = "\u2581"  # how a vocabulary writes a space
_MOST = 100_000_000  # characters of parts that are compared: a second or two; Gemma 3's own tokens take 6 million


class TooMany(ValueError):
    """So many and long added tokens that comparing them would take minutes."""


def normal(piece: str) -> str:
    """The text as Gemma 3's normalizer leaves it."""
    return piece.replace(" ", SPACE)


def cuts(added: Set[str], control: Set[str], normalized: Set[str]) -> tuple[list[str], list[str]]:
    """(what is cut out of the text as it was written, what is then cut out of the rest), control tokens in neither.

    Raises:
        TooMany: see there.
    """
    literal, loose = added - control - normalized, normalized - control
    then: set[str] = set()
    if loose:
        seeds = {piece for piece in loose if _spaced(piece)} | touching(added - loose, loose)
        then = _closure(seeds, loose)
    first = {piece for piece in literal if _spaced(piece)}
    first = _closure(first | touching(then, literal - first), literal)
    return sorted(first), sorted(then)


def touching(pieces: Iterable[str], others: Iterable[str], *, before: bool = True) -> set[str]:
    """Those of `others` that can match a place in a text where one of `pieces` matches too.

    Args:
        before: count those that begin in a match of `pieces` and end behind it.

    Raises:
        TooMany: see there.
    """
    whole = {normal(piece) for piece in pieces}
    letters, lengths = frozenset("".join(whole)), sorted({len(piece) for piece in whole})
    heads = {piece[:cut] for piece in whole for cut in range(1, len(piece))}
    tails = {piece[cut:] for piece in whole for cut in range(1, len(piece))}
    near = {other: normal(other) for other in others}
    near = {other: text for other, text in near.items() if not letters.isdisjoint(text)}
    widths = sorted({len(text) for text in near.values()})
    work = 0
    for texts, others_lengths in ((whole, widths), (near.values(), lengths)):
        work += sum(map(len, texts)) * (sum(others_lengths) + max(map(len, texts), default=0))
    if work > _MOST:
        raise TooMany(f"{len(near):,} beside {len(whole):,}")
    parts = {piece[at : at + width] for piece in whole for width in widths for at in range(len(piece) - width + 1)}
    return {
        other
        for other, text in near.items()
        if text in parts
        or any(text[at : at + length] in whole for length in lengths for at in range(len(text) - length + 1))
        or any(text[cut:] in heads for cut in range(1, len(text)))
        or (before and any(text[:cut] in tails for cut in range(1, len(text))))
    }


def _closure(seeds: Set[str], pieces: Set[str]) -> set[str]:
    """The seeds and all that share text with them, or with one that does."""
    found, fresh = set(seeds), set(seeds)
    while fresh:
        fresh = touching(fresh, pieces - found)
        found |= fresh
    return found


def _spaced(piece: str) -> bool:
    return " " in piece or SPACE in piece

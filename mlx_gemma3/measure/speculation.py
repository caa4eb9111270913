"""What guessing brings: the same answers with and without it, by kind of text.

Six texts whose answer repeats what it was given, completed greedily; six whose answer does not, drawn with a seed,
since a small model that is greedy soon repeats itself. All are completed as they are, so that a base model can write
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ..errors import OptionError
from ..runtime.engine import Engine, load

SEED = 7

LETTER = """Dear Ms Okafor, thank you for your letter of 4 March about the parcel that did not arrive. We have \
asked the carrier, who says that it was handed to a neighbour at number 17 on the afternoon of 27 February. If it is \
not there, please tell us before the end of the month, and we will send the two books and the lamp again."""
CODE = """def total(orders, rate):
    result = 0.0
    for order in orders:
        if order.cancelled:
            continue
        price = order.price * order.count
        if order.country == "CH":
            price = price * (1 + rate)
        result = result + price
    return round(result, 2)
"""
FORM = """{"name": "Ada Lovelace", "street": "12 St James's Square", "city": "London", "postcode": "SW1Y 4JH", \
"country": "United Kingdom", "born": "1815-12-10", "email": "ada@example.org", "newsletter": true}"""
TABLE = """| city | country | people | river |
|---|---|---|---|
| Basel | Switzerland | 178,000 | Rhine |
| Cologne | Germany | 1,085,000 | Rhine |
| Vienna | Austria | 1,975,000 | Danube |
| Budapest | Hungary | 1,752,000 | Danube |
"""
SPEECH = """Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in \
Liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, \
testing whether that nation, or any nation so conceived and so dedicated, can long endure."""
LOG = """2026-03-04 10:15:01 INFO server started on port 8080
2026-03-04 10:15:07 INFO client 10.0.0.7 connected
2026-03-04 10:15:09 WARNING client 10.0.0.7 sent no key
2026-03-04 10:15:09 INFO client 10.0.0.7 disconnected
2026-03-04 10:16:30 INFO client 10.0.0.9 connected
"""
REPEATING: Mapping[str, str] = {
    "quotation": f"The letter:\n{LETTER}\n\nThe letter once more, word for word:\n",
    "code edit": f"```python\n{CODE}```\n\nThe same function with a docstring:\n\n```python\n{CODE[:40]}",
    "form": f"Record 1:\n{FORM}\n\nRecord 1 again, as it stands:\n",
    "table": f"{TABLE}\nThe same table once more:\n\n",
    "speech": f"Text: {SPEECH}\nCopy: {SPEECH[:60]}",
    "log": f"File a.log:\n{LOG}\nFile b.log, a copy of a.log:\n",
}
OTHER: Mapping[str, str] = {
    "story": "Once upon a time, in a small harbour town in the north, there lived a clockmaker who",
    "explanation": "The reason why the sky is blue during the day and red in the evening is that",
    "letter": "Dear Sir or Madam,\n\nI am writing to you because",
    "history": "In the year 1453 the city of Constantinople",
    "recipe": "To bake a good loaf of bread at home you first",
    "opinion": "What I liked most about the film was not its plot but",
}


@dataclass(frozen=True)
class Guessed:
    """One text, with guesses and without."""

    kind: str
    repeats: bool
    drafted: int
    accepted: int
    passes: int
    tokens: int
    plain_seconds: float  # of the answer, median
    seconds: float  # with guesses, median
    same: bool  # the tokens

    @property
    def gain(self) -> float:
        """Times the tokens a second of plain decoding."""
        return self.plain_seconds / self.seconds


def measure(
    source: str | Path,
    *,
    draft: str | Path | None = None,
    dtype: str = "auto",
    tokens: int = 96,
    repeat: int = 3,
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Guessed]:
    """Each text, with guesses and without in turn, on two engines in one process.

    Args:
        tokens: of each answer.
        repeat: answers of each kind, after one that is not counted.

    Raises:
        Gemma3Error: a model cannot be loaded.
        OptionError: no token, or no repetition.
    """
    for name, value in (("tokens", tokens), ("repeat", repeat)):
        if value < 1:
            raise OptionError(name, got=value, want=">= 1")
    texts = [(kind, text, True) for kind, text in REPEATING.items()]
    texts += [(kind, text, False) for kind, text in OTHER.items()]
    with (
        load(source, dtype=dtype, speculation=False, text_only=True, force=force) as plain,
        load(source, dtype=dtype, draft=draft, text_only=True, force=force) as guessing,
    ):
        found = []
        for number, (kind, text, repeats) in enumerate(texts):
            progress("answers", number, len(texts))
            found.append(_one(plain, guessing, kind, text, repeats, tokens, repeat))
    return found


def _one(plain: Engine, guessing: Engine, kind: str, text: str, repeats: bool, tokens: int, repeat: int) -> Guessed:
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(repeat + 1):
        replies = {}
        for guesses in (False, True) if number % 2 else (True, False):
            engine = guessing if guesses else plain
            replies[guesses] = engine.generate(
                text, raw=True, max_tokens=tokens, temperature=0.0 if repeats else 1.0, seed=SEED
            )
            if number:
                seconds[guesses].append(replies[guesses].usage["answer_seconds"])
    usage = replies[True].usage
    return Guessed(
        kind=kind,
        repeats=repeats,
        drafted=usage["drafted_tokens"],
        accepted=usage["accepted_tokens"],
        passes=usage["passes"],
        tokens=usage["completion_tokens"],
        plain_seconds=median(seconds[False]),
        seconds=median(seconds[True]),
        same=replies[True].tokens == replies[False].tokens,
    )

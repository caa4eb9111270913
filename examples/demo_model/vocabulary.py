"""The demo's own tokenizer: Gemma's control tokens, all bytes, and words learnt from the questions.

Words come from byte-pair merges, so their ids are in the order of the merges, as SentencePiece wants them. Digits never
merge, nor capital letters with each other: a text that is read from a picture is one token a character.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

from mlx_gemma3.prompt.vocabulary import CONTROL_NAMES, SPACE, Vocabulary

from .scenes import COLOURS
from .strangers import every_text
from .words import ANSWERS, ASK, NAMES, PLURALS, agreed

CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>",
           "<image_soft_token>")  # fmt: skip
NEWLINES = ("\n", "\n\n", "\n\n\n", "\n\n\n\n")
MERGES = 640


def demo_vocabulary() -> Vocabulary:
    """Pieces by id: control tokens, newlines, bytes, characters, merges."""
    counts = _word_counts()
    letters = (
        {letter for word in counts for letter in word if letter != "\n"}
        | {chr(code) for code in range(33, 127)}
        | {SPACE}
    )
    merges = _merges(counts)
    pieces = (*CONTROL, *NEWLINES, *(f"<0x{value:02X}>" for value in range(256)), *sorted(letters), *merges)
    control = CONTROL_NAMES.intersection(pieces)
    return Vocabulary("demo", pieces, control | set(NEWLINES), control)


def write_tokenizer(folder: Path) -> None:
    """Write folder/tokenizer.model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(demo_vocabulary().sentencepiece())


def _word_counts() -> Counter[str]:
    """Words with the space before them: the ones of the demo's own questions first, then a few of all others."""
    counts: Counter[str] = Counter()
    texts: list[tuple[str, int]] = [("user", 30), ("model", 30)]
    for language, groups in ASK.items():
        texts += [(text.replace("{}", " "), 20) for group in groups.values() for text in group]
        texts += [(f" {word}", 40) for words in (NAMES, PLURALS) for word in words[language].values()]
        texts += [(word, 40) for word in (*NAMES[language].values(), "nothing", "yes", "una", "un")]  # begin an answer
        texts += [(answer, 20) for answer in ANSWERS[language].values()]
    for noun in ("estrella", "estrellas"):
        texts += [(f" {agreed(noun, words['es'][colour])}", 20) for words in (NAMES, PLURALS) for colour in COLOURS]
    texts += [(text, 1) for text in every_text()]
    for text, weight in texts:
        for word in text.replace(" ", f" {SPACE}").split(" "):
            if word:
                counts[word] += weight
    return counts


def _merges(counts: Counter[str]) -> list[str]:
    """The most frequent neighbours, joined one pair after another."""
    words = {word: list(word) for word in counts}
    merges: list[str] = []
    while len(merges) < MERGES:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                if not _kept_apart(*pair):
                    pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append("".join(best))
        for word, parts in words.items():
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            words[word] = joined
    return list(dict.fromkeys(merges))


def _kept_apart(left: str, right: str) -> bool:
    """Digits, punctuation beside words, and capitals other than at the start of a word."""
    both = left + right
    return any(mark in both for mark in "0123456789.,?!¿。？") or any("A" <= letter <= "Z" for letter in both[1:])

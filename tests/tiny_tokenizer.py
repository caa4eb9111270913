"""A tokenizer.model of 512 pieces for the tiny checkpoints: control tokens, bytes, ASCII and a few merges."""

from __future__ import annotations

from pathlib import Path

from mlx_gemma3.prompt.vocabulary import CONTROL_NAMES, Vocabulary

PLACES = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 105: "<start_of_turn>", 106: "<end_of_turn>",
    107: "\n", 108: "\n\n", 109: "\n\n\n", 500: "<start_of_image>", 501: "<end_of_image>", 502: "<image_soft_token>",
}  # fmt: skip
MERGES = ["th", "he", "in", "an", "▁t", "▁th", "▁the", "is", "▁is", "user", "us", "er", "mo", "de", "del", "model"]


def pieces() -> list[str]:
    letters = ["▁", *(chr(code) for code in range(33, 127)), "é", "ü", "中", "文"]
    rest = iter([f"<0x{value:02X}>" for value in range(256)] + MERGES + letters)
    out = [PLACES.get(token) or next(rest, f"<unused{token}>") for token in range(512)]
    assert next(rest, None) is None
    return out


def write_tokenizer(folder: Path) -> Path:
    """Write folder/tokenizer.model; returns the folder."""
    known = pieces()
    added = {piece for piece in known if piece in PLACES.values() or piece.startswith("<unused")}
    control = CONTROL_NAMES & set(known)
    vocabulary = Vocabulary("tests", tuple(known), frozenset(added), frozenset(control))
    (folder / "tokenizer.model").write_bytes(vocabulary.sentencepiece())
    return folder

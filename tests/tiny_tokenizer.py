"""A tokenizer.model of 512 pieces for the tiny checkpoints: control tokens, bytes, ASCII and a few merges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from mlx_gemma3.prompt.vocabulary import CONTROL_NAMES, Vocabulary

PLACES = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 105: "<start_of_turn>", 106: "<end_of_turn>",
    107: "\n", 108: "\n\n", 109: "\n\n\n", 500: "<start_of_image>", 501: "<end_of_image>", 502: "<image_soft_token>",
}  # fmt: skip
# FunctionGemma's, where a test asks for them, and the two around MedGemma's thoughts.
FUNCTIONS = {
    46: "<start_function_declaration>", 47: "<end_function_declaration>", 48: "<start_function_call>",
    49: "<end_function_call>", 50: "<start_function_response>", 51: "<end_function_response>", 52: "<escape>",
}  # fmt: skip
FAMILY = {**FUNCTIONS, 100: "<unused94>", 101: "<unused95>", 102: "<unused5>"}
MERGES = ["th", "he", "in", "an", "▁t", "▁th", "▁the", "is", "▁is", "user", "us", "er", "mo", "de", "del", "model"]


def pieces(more: Mapping[int, str] = MappingProxyType({})) -> list[str]:
    letters = ["▁", *(chr(code) for code in range(33, 127)), "é", "ü", "中", "文"]
    rest = iter([f"<0x{value:02X}>" for value in range(256)] + MERGES + letters)
    out = [{**PLACES, **more}.get(token) or next(rest, f"<unused{token}>") for token in range(512)]
    assert more or next(rest, None) is None
    return out


def write_tokenizer(folder: Path) -> Path:
    """Write folder/tokenizer.model; returns the folder."""
    known = pieces()
    added = {piece for piece in known if piece in PLACES.values() or piece.startswith("<unused")}
    control = CONTROL_NAMES & set(known)
    vocabulary = Vocabulary("tests", tuple(known), frozenset(added), frozenset(control))
    (folder / "tokenizer.model").write_bytes(vocabulary.sentencepiece())
    return folder


def family_vocabulary() -> Vocabulary:
    """The same with the tokens of Gemma 3's family: those of functions are control tokens, thoughts are not."""
    known = pieces(FAMILY)
    added = {piece for piece in known if piece in {**PLACES, **FAMILY}.values() or piece.startswith("<unused")}
    control = (CONTROL_NAMES & set(known)) | set(FUNCTIONS.values())
    return Vocabulary("tests", tuple(known), frozenset(added), frozenset(control))

"""A vocabulary from tokenizer.model, tokenizer.json or a GGUF header, and the SentencePiece model built from it.

Owns what the three formats mean for Gemma 3: which pieces are added tokens, which are control tokens, what order
the merges have; and refuses a file that means something else. Knows nothing of encoding: tokenizer.py does that.

Whatever a file claims is bounded before work is done for it: the bounds are about twice what Gemma 3's own has.

Sources: sentencepiece_model.proto of SentencePiece; the tokenizer.json of Gemma 3 (Hugging Face tokenizers); the GGUF
specification, section on the vocabulary.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..boundary.gguf_header import GGUFHeader, is_gguf
from ..boundary.reading import open_regular, read_json, reason
from ..errors import TokenizerError
from .added import SPACE, TooMany, cuts, normal, touching
from .protobuf import fields, varint

# A folder's vocabulary: the first that is there decides, as in transformers. Programs that tune a model rewrite the
# first and copy the second.
VOCABULARIES = ("tokenizer.json", "tokenizer.model")
_DO = "use the tokenizer of a Gemma 3 checkpoint"
BOS, START_OF_TURN, END_OF_TURN = "<bos>", "<start_of_turn>", "<end_of_turn>"
START_OF_IMAGE, IMAGE, END_OF_IMAGE = "<start_of_image>", "<image_soft_token>", "<end_of_image>"

# The tokens that steer the model. Their names are fixed; files disagree about their types.
CONTROL_NAMES = frozenset(
    ("<pad>", "<eos>", BOS, "<unk>", START_OF_TURN, END_OF_TURN, START_OF_IMAGE, IMAGE, END_OF_IMAGE)
)

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_BYTE_PIECES = frozenset(f"<0x{value:02X}>" for value in range(256))

# SentencePiece's piece types; GGUF uses the same numbers.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6

# Gemma 3's: 262,145 pieces of at most 31 characters, 1.5 million together; tokenizer.model has 4.7 MB.
_MOST_PIECES, _LONGEST_PIECE, _MOST_CHARACTERS = 1 << 19, 256, 4_000_000
_MOST_MODEL = 16 << 20  # bytes
_UNSAYABLE = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Vocabulary:
    """Pieces by id. An added token matches in the text before anything is merged; a control token is an added one."""

    source: str  # named in errors
    pieces: tuple[str, ...]
    added: frozenset[str]
    control: frozenset[str]
    normalized: frozenset[str] = frozenset()  # added tokens that match behind the normalizer: see added.py

    def __post_init__(self) -> None:
        _check_pieces(self.source, self.pieces)
        if missing := _BYTE_PIECES.difference(self.pieces):
            raise _refusal(self.source, "byte pieces", f"no {min(missing)}", "all of <0x00> to <0xFF> (byte fallback)")
        # Control tokens are cut out of a text before SentencePiece sees it: no other added token may reach into them.
        others, loose = self.added - self.control, self.control & self.normalized
        try:
            crossing = touching(self.control, others - self.normalized, before=False) | touching(loose, others)
        except TooMany as error:
            raise _too_many(self.source, error) from None
        crossing |= {piece for piece in loose if " " in piece or SPACE in piece}
        if crossing:
            raise _refusal(self.source, "added tokens", f"{min(crossing)!r} across a control token", "no overlap")
        behind = [normal(piece) for piece in self.normalized]
        if len(set(behind)) != len(behind):
            raise _refusal(self.source, "added tokens", "two for the same text", "one id for each text")

    @cached_property
    def cuts(self) -> tuple[list[str], list[str]]:
        """Added tokens that SentencePiece cannot match: cut out as written, then cut out of the rest (added.py).

        Raises:
            TokenizerError: too many to compare.
        """
        try:
            return cuts(self.added, self.control, self.normalized)
        except TooMany as error:
            raise _too_many(self.source, error) from None

    def sentencepiece(self) -> bytes:
        """The SentencePiece model: added tokens USER_DEFINED; CONTROL, so that no text makes one, what is cut out
        before. Runs of U+2581 are both: cut out where they are written, matched where they are spaces.

        Ids are in the order of the merges, so a piece's score is minus its id. An UNKNOWN piece, which SentencePiece
        asks for and byte fallback never reaches, stands behind the last id.
        """
        unknown, known = "<unknown>", set(self.pieces)
        while unknown in known:
            unknown += ">"
        first, then = self.cuts
        silent = self.control.union(then, (piece for piece in first if piece.strip(SPACE)))
        parts = []
        for token, piece in enumerate((*self.pieces, unknown)):
            if piece in silent:
                kind = _CONTROL
            elif piece in self.added:
                kind = _USER_DEFINED
            else:
                kind = _BYTE if piece in _BYTE_PIECES else _UNKNOWN if token == len(self.pieces) else _NORMAL
            text = piece.encode("utf-8")
            body = b"\x0a" + varint(len(text)) + text + b"\x15" + struct.pack("<f", -token) + bytes((0x18, kind))
            parts.append(b"\x0a" + varint(len(body)) + body)
        trainer = b"\x18\x02" + varint(35 << 3) + b"\x01"  # model_type BPE, byte_fallback
        # identity; add_dummy_prefix, remove_extra_whitespaces off; escape_whitespaces on
        normalizer = b"\x0a\x08identity" + b"\x18\x00" + b"\x20\x00" + b"\x28\x01"
        parts.append(b"\x12" + varint(len(trainer)) + trainer + b"\x1a" + varint(len(normalizer)) + normalizer)
        return b"".join(parts)


def read_vocabulary(path: Path) -> Vocabulary:
    """Read any of the three formats: GGUF by its signature, JSON by its suffix, else SentencePiece.

    Raises:
        TokenizerError: unreadable, or not Gemma 3's kind of vocabulary.
        CheckpointError: a damaged GGUF header.
    """
    if is_gguf(path):
        return _read_gguf(path)
    if path.suffix != ".json":
        return _read_sentencepiece(path)
    try:
        return _read_json(path)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _refusal(str(path), "structure", error, "vocab, merges and added tokens as Gemma 3 lists them") from None


def added_tokens_file(path: Path) -> Path:
    """Where names and ids lie that a tokenizer.model lacks (Gemma 3: <image_soft_token> only)."""
    return path.with_name("added_tokens.json")


def _read_sentencepiece(path: Path) -> Vocabulary:
    """Google's file has no <image_soft_token>, and marks control tokens CONTROL or USER_DEFINED: both are retagged."""
    source = str(path)
    pieces, scores, kinds = [], [], []
    settings: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    try:
        for number, value in list(fields(_model_bytes(path), _MOST_PIECES + 100)):  # too many: none is looked into
            if number == 1:
                entry = dict(fields(value, 4))
                pieces.append(entry[1].decode("utf-8"))
                scores.append(struct.unpack("<f", entry.get(2, bytes(4)))[0])
                kinds.append(int(entry.get(3, _NORMAL)))
            elif number in settings:
                if settings[number]:
                    raise ValueError("settings twice")
                settings[number] = dict(fields(value, 100_000))
        charsmap = len(settings[3].get(2, b""))
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error):
        raise _refusal(source, "format", "bytes that are no SentencePiece model", "a whole file") from None
    trainer, normalizer = settings[2], settings[3]
    for what, got, want in (
        ("model_type", trainer.get(3, 1), 2),  # 2 is BPE
        ("byte_fallback", trainer.get(35, 0), 1),
        ("precompiled_charsmap", charsmap, 0),
        ("add_dummy_prefix", normalizer.get(3, 1), 0),
        ("remove_extra_whitespaces", normalizer.get(4, 1), 0),
        ("escape_whitespaces", normalizer.get(5, 1), 1),
    ):
        if got != want:
            raise _refusal(source, what, got, want)
    if kinds and kinds[-1] == _UNKNOWN and "<unk>" in pieces[:-1]:  # as `sentencepiece` writes it: no id of the model's
        for column in (pieces, scores, kinds):
            column.pop()
    extra_path, known = added_tokens_file(path), set(pieces)
    extra = _load_json(extra_path) if os.path.lexists(extra_path) else {}
    for piece, token in sorted(extra.items(), key=lambda item: (not _is_id(item[1]), str(item[1]).rjust(20))):
        if piece in known:
            continue
        if not _is_id(token) or token != len(pieces):
            raise _refusal(str(extra_path), piece, f"id {token!r}", f"{len(pieces)}, the next free id")
        pieces.append(piece)
        kinds.append(_USER_DEFINED)
    return _typed(source, pieces, kinds, scores)


def _model_bytes(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            raw = file.read(_MOST_MODEL + 1)
    except OSError as error:
        raise TokenizerError(f"{path}", got=reason(error), want="a readable tokenizer file") from None
    if len(raw) > _MOST_MODEL:
        raise _refusal(str(path), "size", f"more than {_MOST_MODEL >> 20} MB", "a SentencePiece model")
    return raw


def _read_gguf(path: Path) -> Vocabulary:
    """llama.cpp's converter writes spaces for U+2581 in added tokens, and [PADn] where the model has spare rows."""
    header, source = GGUFHeader.read(path), str(path)
    if (kind := header.get("tokenizer.ggml.model", "text")) != "llama":
        raise _refusal(
            source,
            "tokenizer.ggml.model",
            repr(kind),
            "'llama', Gemma's own vocabulary",
            do="it was converted without the model's tokenizer.model: take another GGUF file of the model, its "
            "safetensors, or convert it again with tokenizer.model in the folder",
        )
    known = ("gemma3", "gemma-embedding")
    prefixed = header.get("general.architecture", "text") not in known  # where the file does not say
    if header.get("tokenizer.ggml.add_space_prefix", "switch", prefixed):
        raise _refusal(source, "tokenizer.ggml.add_space_prefix", "true", "false")
    tokens = header.get("tokenizer.ggml.tokens", "texts")
    kinds = header.get("tokenizer.ggml.token_type", "numbers")
    if tokens is None or kinds is None or len(tokens) != len(kinds):
        raise _refusal(source, "tokenizer.ggml.tokens", "nothing, or not one type for each", "a vocabulary")
    pieces = [token.replace(" ", SPACE) for token in tokens]
    while pieces and pieces[-1] == f"[PAD{len(pieces) - 1}]":
        pieces.pop()
    scores = header.get("tokenizer.ggml.scores", "numbers", ())
    return _typed(source, pieces, kinds[: len(pieces)].tolist(), scores[: len(pieces)])


def _typed(source: str, pieces: list[str], kinds: list[int], scores: Sequence[float]) -> Vocabulary:
    """A vocabulary from piece types: whatever is neither normal nor a byte is an added token."""
    _check_pieces(source, pieces)
    merged = [token for token, kind in enumerate(kinds) if kind == _NORMAL and len(pieces[token]) > 1]
    if len(scores):
        ranks = np.asarray(scores)[merged]
        if not np.all(ranks[1:] <= ranks[:-1]):
            raise _refusal(source, "scores", "a score above an earlier piece's", "ids in the order of the merges")
    if START_OF_IMAGE in pieces and IMAGE not in pieces:
        pieces.append(IMAGE)  # the one token of Gemma 3 that Google's SentencePiece file lacks: the last id
        kinds.append(_CONTROL)
    added = {piece for piece, kind in zip(pieces, kinds, strict=True) if kind not in (_NORMAL, _BYTE)}
    control = CONTROL_NAMES.intersection(pieces)
    added = (added - _BYTE_PIECES) | control
    # SentencePiece matches a space and U+2581 as one also in these.
    spaced = frozenset(piece for piece in added - control if SPACE in normal(piece) and piece.strip(SPACE))
    return Vocabulary(source, tuple(pieces), frozenset(added), control, spaced)


def _read_json(path: Path) -> Vocabulary:
    source, file = str(path), _load_json(path)
    model = file.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise _refusal(source, "model.vocab", "nothing", "an object of pieces and ids")
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    # Splits at spaces, of which the normalizer leaves none.
    splitter = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    for what, got, allowed in (
        ("model.type", model.get("type"), ["BPE"]),
        ("model.byte_fallback", model.get("byte_fallback"), [True]),
        ("model.ignore_merges", model.get("ignore_merges"), [False, None]),
        ("model.dropout", model.get("dropout"), [None, 0.0]),
        ("model.continuing_subword_prefix", model.get("continuing_subword_prefix"), [None, ""]),
        ("model.end_of_word_suffix", model.get("end_of_word_suffix"), [None, ""]),
        ("normalizer", file.get("normalizer"), [normalizer]),
        ("pre_tokenizer", file.get("pre_tokenizer"), [splitter, None]),
    ):
        if got not in allowed:
            raise _refusal(source, what, json.dumps(got), json.dumps(allowed[0], ensure_ascii=False))
    ids: dict[str, int] = dict(model["vocab"])
    added, control, loose = set(), set(), set()
    for entry in file.get("added_tokens") or []:
        piece, token = entry["content"], entry["id"]
        if flags := [flag for flag in ("single_word", "lstrip", "rstrip") if entry.get(flag)]:
            raise _refusal(source, f"added token {piece!r}", flags[0], "a literal match")
        if ids.setdefault(piece, token) != token:
            raise _refusal(source, f"added token {piece!r}", f"ids {ids[piece]} and {token}", "one id")
        added.add(piece)
        if entry.get("special") or piece in CONTROL_NAMES:
            control.add(piece)
        if entry.get("normalized"):
            loose.add(piece)
    _check_pieces(source, ids)
    if not all(map(_is_id, ids.values())):
        raise _refusal(source, "ids", "one that is no whole number", f"each of 0 to {len(ids) - 1} once")
    first = dict(zip(reversed(ids.values()), reversed(ids), strict=True))
    if twice := next((piece for piece, token in ids.items() if first[token] != piece), None):
        got = f"{ids[twice]} for {first[ids[twice]]!r} and for {twice!r}"
        raise _refusal(source, "ids", got, "one piece each: a token is renamed in model.vocab and in added_tokens")
    if max(first, default=-1) != len(ids) - 1:
        raise _refusal(source, "ids", "a gap", f"each of 0 to {len(ids) - 1} once")
    _check_merges(source, ids, model.get("merges") or [], added, loose)
    pieces = tuple(sorted(ids, key=ids.__getitem__))
    return Vocabulary(source, pieces, frozenset(added), frozenset(control), frozenset(loose))


def _check_pieces(source: str, pieces: Collection[str]) -> None:
    """Bounds on pieces, before anything is done with them, and characters that SentencePiece cannot hold."""
    want = f"at most {_MOST_PIECES:,} of at most {_LONGEST_PIECE} characters, {_MOST_CHARACTERS:,} together"
    if len(pieces) > _MOST_PIECES:
        raise _refusal(source, "pieces", f"{len(pieces):,}", want)
    if not all(isinstance(piece, str) for piece in pieces):
        raise _refusal(source, "pieces", "one that is no text", "texts")
    if (longest := max(map(len, pieces), default=0)) > _LONGEST_PIECE:
        raise _refusal(source, "pieces", f"one of {longest:,} characters", want)
    if (total := sum(map(len, pieces))) > _MOST_CHARACTERS:
        raise _refusal(source, "pieces", f"{total:,} characters together", want)
    if len(set(pieces)) != len(pieces) or not all(pieces):
        raise _refusal(source, "pieces", "an empty piece or the same piece twice", "one id for each piece")
    if broken := next((piece for piece in pieces if _UNSAYABLE.search(piece)), None):
        raise _refusal(source, "pieces", f"{broken!r}, with a NUL or half of a surrogate pair", "other texts")


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _check_merges(
    source: str, ids: Mapping[str, int], merges: Sequence[Any], added: Collection[str], loose: Collection[str]
) -> None:
    """SentencePiece joins any two neighbours that form a piece, lowest id first: the listed merges must say the same.

    Added tokens are matched before merging, so merges to them and of them do not count; except the runs of U+2581,
    which SentencePiece matches as a whole, longest first, where Hugging Face merges spaces. That comes to the same
    when their merges stand before all others, those of longer runs first, and no longer piece holds a run. Another
    added token with U+2581, if not `loose`, matches only that character: spaces would be merged to it, here they are
    not.
    """
    if not isinstance(merges, list) or len(merges) > _MOST_CHARACTERS:
        raise _refusal(source, "merges", "another thing, or too many", f"a list of at most {_MOST_CHARACTERS:,}")
    pairs = {tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair): None for pair in merges}
    last, listed, run = -1, 0, _LONGEST_PIECE
    for pair in pairs:
        piece = "".join(pair)
        if len(pair) != 2 or piece not in ids:
            raise _refusal(source, "merges", f"{pair!r}, which forms no piece", "pairs that form pieces")
        if piece not in added:
            if ids[piece] < last:
                got = f"{piece!r} (id {ids[piece]}) after id {last}"
                raise _refusal(source, "merges", got, "merges in the order of ids")
            last, listed = ids[piece], listed + (pair[0] not in added and pair[1] not in added)
        elif piece.strip(SPACE):
            if SPACE in piece and piece not in loose:
                raise _refusal(source, "merges", f"the added token {piece!r}, which spaces form too", "none of it")
        elif pair[1] == SPACE:  # a run grows by one: no other pair ever stands side by side
            if listed or len(piece) > run:
                raise _refusal(source, "merges", f"a run of {len(piece)} U+2581 late", "longer runs first, then words")
            run = len(piece)
    possible, mergeable = 0, ids.keys() - added
    for piece in ids:
        if piece not in added:
            halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
            possible += sum(one in mergeable and other in mergeable for one, other in halves)
    if listed != possible:
        raise _refusal(source, "merges", f"{listed} pairs", f"all {possible} pairs of pieces that form a piece")
    runs = sorted(piece for piece in added if not piece.strip(SPACE))
    for length, piece in enumerate(runs, start=2):
        if piece != SPACE * length or (SPACE * (length - 1), SPACE) not in pairs:
            raise _refusal(source, "added tokens", f"{piece!r}", f"a merged run of {length} U+2581")
    if runs and any(runs[0] in piece for piece in ids if piece not in added):
        raise _refusal(source, "pieces", "a run of U+2581 inside a longer piece", "runs by themselves")


def _load_json(path: Path) -> dict[str, Any]:
    values = read_json(path, TokenizerError)
    if not isinstance(values, dict):
        raise _refusal(str(path), "format", type(values).__name__, "a JSON object")
    return values


def _too_many(source: str, error: TooMany) -> TokenizerError:
    return _refusal(source, "added tokens", f"too many and long ones to compare: {error}", "fewer or shorter ones")


def _refusal(source: str, what: str, got: object, want: object, do: str = _DO) -> TokenizerError:
    return TokenizerError(f"{source}: {what}", got=got, want=want, do=do)

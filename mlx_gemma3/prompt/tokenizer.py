"""Text to token ids and back: SentencePiece, special tokens, and a decoder for text that arrives token by token.

Owns the cache of built SentencePiece models, so that a vocabulary is read and checked once, not at every start.
Knows nothing of turns or pictures; what the files mean is vocabulary.py's.

The ids are those of Hugging Face tokenizers on Gemma 3's tokenizer.json, with and without `encode_special_tokens`;
the text is that of its decoder, which is not SentencePiece's (see StreamDecoder).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..arguments import argument, described, elements, takes
from ..errors import OptionError, PromptError, TokenizerError
from ..paths import cache_folder
from ..writing import clear_abandoned, write_whole
from .vocabulary import BOS, BYTE_PIECE, SPACE, added_tokens_file, is_gguf, read_vocabulary

_FORMAT = b"mlx-gemma3 vocabulary 1"  # counted up whenever vocabulary.py builds something else from the same file
_GGUF_HEAD = 32 << 20  # bytes of a GGUF file that tell its vocabulary: Gemma 3's headers have 7 to 20 MB


@dataclass(frozen=True)
class _Built:
    """What a cache file holds: a checksum line, a line of JSON, the SentencePiece model."""

    size: int  # ids 0 to size - 1
    special: tuple[str, ...]  # control tokens
    marked: tuple[str, ...]  # added tokens written with U+2581
    proto: bytes

    def to_bytes(self) -> bytes:
        about = json.dumps({"size": self.size, "special": self.special, "marked": self.marked}).encode()
        body = about + b"\n" + self.proto
        return b"%s %s\n%s" % (_FORMAT, hashlib.sha256(body).hexdigest().encode(), body)

    @classmethod
    def from_bytes(cls, data: bytes) -> _Built | None:
        """None unless every byte is as it was written."""
        head, _, body = data.partition(b"\n")
        if head != b"%s %s" % (_FORMAT, hashlib.sha256(body).hexdigest().encode()):
            return None
        about, _, proto = body.partition(b"\n")
        values = json.loads(about)
        return cls(values["size"], tuple(values["special"]), tuple(values["marked"]), proto)


class Tokenizer:
    """Gemma 3's tokenizer. Immutable; may be used from several threads.

    Open it with `from_folder` or `from_file`.
    """

    def __init__(self, built: _Built) -> None:
        self._built = built

    @classmethod
    @takes(folder="path")
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Open a checkpoint folder's tokenizer.model or, without one, its tokenizer.json.

        Raises:
            TokenizerError: the folder has neither, or the file is not Gemma 3's kind.
        """
        folder = Path(folder)
        for name in ("tokenizer.model", "tokenizer.json"):
            with suppress(OSError):  # a name that is too long
                if (folder / name).is_file():
                    return cls.from_file(folder / name)
        raise TokenizerError(
            f"{folder}", got="no tokenizer", want="tokenizer.model or tokenizer.json", do="copy it from the checkpoint"
        )

    @classmethod
    @takes(path="path")
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Open a tokenizer.model, a tokenizer.json, or the vocabulary in a GGUF file's header.

        Reading a vocabulary takes a second or two, so the result is kept in the cache folder under the source's
        content hash. A cache that is damaged is replaced, one that cannot be written is done without.

        Raises:
            TokenizerError: no such file, or not Gemma 3's kind.
            CheckpointError: a damaged GGUF header.
        """
        path = Path(path)
        try:
            cached = cache_folder() / "vocabularies" / f"{_content_key(path)}.bin"
        except (OSError, ValueError) as error:  # ValueError: a NUL, or half a surrogate pair
            got = error.strerror if isinstance(error, OSError) else error
            raise TokenizerError(f"{path}", got=got, want="a readable tokenizer file") from None
        with suppress(OSError):
            if (found := _Built.from_bytes(cached.read_bytes())) is not None:
                clear_abandoned(cached.parent)
                return cls(found)
        vocabulary = read_vocabulary(path)
        special = sorted(vocabulary.control, key=len, reverse=True)
        built = _Built(len(vocabulary.pieces), tuple(special), vocabulary.marked, vocabulary.sentencepiece())
        with suppress(OSError):
            write_whole(cached, built.to_bytes())
        return cls(built)

    @property
    def vocab_size(self) -> int:
        """How many ids have a piece: they are 0 to vocab_size - 1. A model may have a few rows more."""
        return self._built.size

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The control tokens, which `special=False` never produces and `skip_special` leaves out."""
        return frozenset(map(self.id, self._built.special))

    @takes(piece="text")
    def id(self, piece: str) -> int:
        """The id of exactly this piece.

        Raises:
            TokenizerError: there is no such piece.
        """
        try:
            token = int(self._sentencepiece.piece_to_id(piece))
        except (UnicodeEncodeError, TypeError):  # half a surrogate pair; which of the two, its version decides
            token = self.vocab_size
        if token >= self.vocab_size or self._sentencepiece.id_to_piece(token) != piece:
            raise TokenizerError("piece", got=repr(piece), want="one of the vocabulary")
        return token

    @takes(text="text", bos="switch", special="switch")
    def encode(self, text: str, *, bos: bool = False, special: bool = True) -> list[int]:
        """Text to ids.

        Args:
            bos: put <bos> in front, whatever the text begins with.
            special: the name of a control token in the text becomes that token. If False it is encoded as the
                plain characters it is made of.

        Raises:
            PromptError: the text holds half of a surrogate pair, which no UTF-8 can say.
        """
        try:
            text.encode("utf-8")  # what SentencePiece raises here depends on its version
        except UnicodeEncodeError as error:
            raise PromptError(
                "text", got=f"a lone surrogate at character {error.start}", want="text that UTF-8 can encode"
            ) from None
        ids = [self.id(BOS)] if bos else []
        splitter = self._splitter if special else self._marked_splitter
        # Split on a group: plain stretches at even places, whole tokens at odd ones.
        for place, part in enumerate(splitter.split(text) if splitter else (text,)):
            if place % 2:
                ids.append(self.id(part))
            elif part:
                ids.extend(self._sentencepiece.encode(part))
        return ids

    @takes(skip_special="switch")
    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Ids to text. Ids without a piece are left out, as in the reference; U+2581 becomes a space.

        Raises:
            TokenizerError: a negative id.
            OptionError: no ids.
        """
        if (tokens := elements(ids)) is None:
            raise OptionError("ids", got=described(ids), want="whole numbers")
        stream = self.stream(skip_special=skip_special)
        return "".join([stream.push(argument("ids", token, "whole")) for token in tokens]) + stream.finish()

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self, skip_special=skip_special)

    def piece(self, token: int) -> str:
        """The piece of an id, "" for an id without one.

        Raises:
            TokenizerError: a negative id.
        """
        if not isinstance(token, int) or isinstance(token, bool):
            token = argument("token", token, "whole")
        if token < 0:
            raise TokenizerError("token id", got=token, want=">= 0")
        return str(self._sentencepiece.id_to_piece(int(token))) if token < self.vocab_size else ""

    @cached_property
    def _sentencepiece(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=self._built.proto)

    # SentencePiece sees spaces as U+2581, so it would match added tokens like "▁▁" in two spaces next to a typed
    # U+2581. They are cut out first, like the control tokens; both are hard borders for merging anyway.
    @cached_property
    def _splitter(self) -> re.Pattern[str] | None:
        return _any_of(self._built.special + self._built.marked)

    @cached_property
    def _marked_splitter(self) -> re.Pattern[str] | None:
        return _any_of(self._built.marked)


class StreamDecoder:
    """Text for ids pushed one by one. The strings returned, joined, are the text of all ids decoded at once.

    Byte pieces are held back until their run ends, for only then is it known what they are: as a whole they are
    UTF-8, or each of them, ASCII included, becomes one U+FFFD (Hugging Face tokenizers, ByteFallback). Tokens that
    are left out do not end a run.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._run = bytearray()

    def push(self, token: int) -> str:
        """The text that this id completes: "" while a byte run is open."""
        piece = "" if token in self._skipped else self._tokenizer.piece(token)
        if not piece:
            return ""
        if byte := BYTE_PIECE.fullmatch(piece):
            self._run.append(int(byte[1], 16))
            return ""
        return (self.finish() if self._run else "") + piece.replace(SPACE, " ")

    def finish(self) -> str:
        """The text of a byte run still open at the end."""
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)


def _any_of(pieces: tuple[str, ...]) -> re.Pattern[str] | None:
    """Matches the longest piece at the leftmost place, in a group for re.split."""
    longest_first = sorted(pieces, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if pieces else None


def _content_key(path: Path) -> str:
    """A name for what a vocabulary is read from, without reading it."""
    digest = hashlib.sha256(_FORMAT + (b" json" if path.suffix == ".json" else b""))
    if is_gguf(path):
        with path.open("rb") as file:
            digest.update(str(path.stat().st_size).encode() + file.read(_GGUF_HEAD))
        return digest.hexdigest()
    digest.update(path.read_bytes())
    extra = added_tokens_file(path)
    if path.suffix != ".json" and extra.is_file():
        digest.update(extra.read_bytes())
    return digest.hexdigest()

"""Text to token ids and back: SentencePiece, special tokens, and a decoder for text that arrives token by token.

Owns the cache of built SentencePiece models, so that a vocabulary is read and checked once, not at every start.
Knows nothing of turns or pictures; what the files mean is vocabulary.py's.

The ids are those of Hugging Face tokenizers on Gemma 3's tokenizer.json, with and without `encode_special_tokens`;
the text is that of its decoder, which is not SentencePiece's (see StreamDecoder).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..boundary.arguments import argument, described, elements, takes
from ..boundary.gguf_header import is_gguf
from ..boundary.paths import cache_folder
from ..boundary.reading import MOST_JSON, file_kind, open_regular, reason
from ..boundary.writing import clear_abandoned, write_whole
from ..errors import OptionError, PromptError, TokenizerError
from .added import SPACE, normal
from .vocabulary import BOS, BYTE_PIECE, VOCABULARIES, added_tokens_file, read_vocabulary

_FORMAT = b"mlx-gemma3 vocabulary 2"  # counted up whenever vocabulary.py builds something else from the same file
_GGUF_HEAD = 32 << 20  # bytes of a GGUF file that tell its vocabulary: Gemma 3's headers have 7 to 20 MB
_SETTLED_NS = 2_000_000_000  # no file system keeps coarser times
_KEY = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class _Built:
    """What a cache file holds: a checksum line, a line of JSON, the SentencePiece model."""

    size: int  # ids 0 to size - 1
    special: tuple[str, ...]  # control tokens
    first: tuple[str, ...]  # added tokens cut out of a text as it was written (see added.py)
    then: tuple[str, ...]  # and those cut out of the rest, where a space and U+2581 are the same
    proto: bytes

    def to_bytes(self) -> bytes:
        values = {"size": self.size, "special": self.special, "first": self.first, "then": self.then}
        about = json.dumps(values).encode()
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
        return cls(values["size"], tuple(values["special"]), tuple(values["first"]), tuple(values["then"]), proto)


class Tokenizer:
    """Gemma 3's tokenizer. Immutable; may be used from several threads.

    Open it with `from_folder` or `from_file`.
    """

    def __init__(self, built: _Built) -> None:
        self._built = built

    @classmethod
    @takes(folder="path")
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Open a checkpoint folder's tokenizer.json or, without one, its tokenizer.model.

        Raises:
            TokenizerError: the folder has neither, the first is not Gemma 3's kind, or one of a tokenizer's files is a
                folder, pipe or device.
        """
        folder = Path(folder)
        for path in (folder / name for name in (*VOCABULARIES, "added_tokens.json")):
            with suppress(OSError):  # a name that is too long
                if path.exists() and not path.is_file():
                    raise TokenizerError(f"{path}", got=file_kind(path.stat().st_mode), want="a file", do="remove it")
        for name in VOCABULARIES:
            if os.path.lexists(folder / name):
                return cls.from_file(folder / name)
        raise TokenizerError(
            f"{folder}", got="no tokenizer", want="tokenizer.json or tokenizer.model", do="copy it from the checkpoint"
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
            cached = cache_folder() / "vocabularies" / f"{_known_key(path)}.bin"
        except (OSError, ValueError) as error:  # ValueError: a NUL, or half a surrogate pair
            got = reason(error) if isinstance(error, OSError) else error
            raise TokenizerError(f"{path}", got=got, want="a readable tokenizer file") from None
        with suppress(OSError):
            if (found := _Built.from_bytes(cached.read_bytes())) is not None:
                clear_abandoned(cached.parent)
                return cls(found)
        vocabulary = read_vocabulary(path)
        special = sorted(vocabulary.control, key=len, reverse=True)
        first, then = vocabulary.cuts
        built = _Built(len(vocabulary.pieces), tuple(special), tuple(first), tuple(then), vocabulary.sentencepiece())
        tokenizer = cls(built)
        try:
            tokenizer._sentencepiece  # noqa: B018 (built here, before it is kept)
        except RuntimeError as error:  # what SentencePiece itself finds wrong
            raise TokenizerError(f"{path}", got=error, want="a vocabulary that SentencePiece loads") from None
        with suppress(OSError):
            write_whole(cached, built.to_bytes())
        return tokenizer

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
        for whole, part in _split(self._splitter if special else self._plain_splitter, text):
            if whole:
                ids.append(self.id(part))
                continue
            for loose, rest in _split(self._loose_splitter, part):
                ids.extend([self.id(self._loose[normal(rest)])] if loose else self._sentencepiece.encode(rest))
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

    def stream(self, *, skip_special: bool = True, kept: Set[int] = frozenset()) -> StreamDecoder:
        """A decoder for ids that arrive one by one; control tokens of `kept` stay in the text all the same."""
        return StreamDecoder(self, skip_special=skip_special, kept=kept)

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

    # What SentencePiece cannot match by itself is cut out first (added.py), like the control tokens; both are hard
    # borders for merging anyway.
    @cached_property
    def _splitter(self) -> re.Pattern[str] | None:
        return _any_of(self._built.special + self._built.first)

    @cached_property
    def _plain_splitter(self) -> re.Pattern[str] | None:
        return _any_of(self._built.first)

    @cached_property
    def _loose(self) -> dict[str, str]:
        return {normal(piece): piece for piece in self._built.then}

    @cached_property
    def _loose_splitter(self) -> re.Pattern[str] | None:
        return _any_of(tuple(self._loose), spaces=f"[ {SPACE}]")


class StreamDecoder:
    """Text for ids pushed one by one. The strings returned, joined, are the text of all ids decoded at once.

    Byte pieces are held back until their run ends, for only then is it known what they are: as a whole they are
    UTF-8, or each of them, ASCII included, becomes one U+FFFD (Hugging Face tokenizers, ByteFallback). Tokens that
    are left out do not end a run.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, kept: Set[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids - kept if skip_special else frozenset()
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


def _any_of(pieces: tuple[str, ...], *, spaces: str = SPACE) -> re.Pattern[str] | None:
    """Matches the longest piece at the leftmost place, in a group for re.split; `spaces` where one has U+2581."""
    longest_first = sorted(pieces, key=len, reverse=True)
    found = "|".join(map(re.escape, longest_first)).replace(SPACE, spaces)
    return re.compile(f"({found})") if pieces else None


def _split(splitter: re.Pattern[str] | None, text: str) -> Iterator[tuple[bool, str]]:
    """The stretches of a text that are not empty, and whether each is a match."""
    # Split on a group: plain stretches at even places, matches at odd ones.
    for place, part in enumerate(splitter.split(text) if splitter else (text,)):
        if part:
            yield place % 2 == 1, part


def _known_key(path: Path) -> str:
    """`_content_key`, by a note in the cache where the file is the one it was made of.

    A tokenizer.json of 33 MB takes 50 ms to read and to hash, at every start. The note goes by what tells one state of
    a file from another: device, inode, size and both times, of which nobody can set ctime. A file that is changed again
    within the grain of its times would pass for the same, so none is noted that changed in the last seconds.
    """
    sources = [path, *([added_tokens_file(path)] if path.suffix != ".json" else ())]
    digest, newest = hashlib.sha256(_FORMAT + path.suffix.encode("utf-8", "surrogateescape")), 0
    for source in sources:
        try:
            state = source.stat()
        except FileNotFoundError:
            if source is path:
                raise
            digest.update(b" none")
            continue
        times = (state.st_mtime_ns, state.st_ctime_ns)
        newest = max(newest, *times)
        digest.update(repr((state.st_dev, state.st_ino, state.st_mode, state.st_size, *times)).encode())
    note, settled = cache_folder() / "seen" / digest.hexdigest(), time.time_ns() - newest > _SETTLED_NS
    if settled:
        with suppress(OSError):
            if _KEY.fullmatch(found := note.read_text("ascii", "replace")):
                return found
    key = _content_key(path)
    if settled:
        with suppress(OSError):
            write_whole(note, key.encode())
    return key


def _content_key(path: Path) -> str:
    """A name for what a vocabulary is read from, without reading it.

    Raises:
        OSError: a file that cannot be read, or is no regular one.
        ValueError: a NUL in the path.
    """
    digest = hashlib.sha256(_FORMAT + (b" json" if path.suffix == ".json" else b""))
    if is_gguf(path):
        with open_regular(path) as file:
            digest.update(str(os.fstat(file.fileno()).st_size).encode() + file.read(_GGUF_HEAD))
        return digest.hexdigest()
    extra = added_tokens_file(path)
    for source in (path, extra) if path.suffix != ".json" and os.path.lexists(extra) else (path,):
        with open_regular(source) as file:
            digest.update(file.read(MOST_JSON + 1))  # who reads it refuses what is larger
    return digest.hexdigest()

"""The tokenizer as llguidance takes it: for each id the bytes that it adds to a text.

Exactly what the decoder writes (prompt/tokenizer.py): a byte piece is its byte, U+2581 a space, an added token its
name. Control tokens add nothing: they are marked, so that no text of a form can hold one.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

from ..errors import OptionError
from ..prompt.added import SPACE
from ..prompt.tokenizer import Tokenizer
from ..prompt.vocabulary import BYTE_PIECE

_MARKED = b"\xff"  # llguidance's mark of a token that is no text: no UTF-8 holds this byte
_lock = threading.Lock()
_known: weakref.WeakKeyDictionary[Tokenizer, Any] = weakref.WeakKeyDictionary()


def llguidance() -> Any:
    """The library.

    Raises:
        OptionError: it is not installed.
    """
    try:
        import llguidance
    except ImportError:
        raise OptionError(
            "answers in a form", got="no llguidance", want="it installed", do="pip install 'mlx-gemma3[grammar]'"
        ) from None
    return llguidance


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """What each id adds to a text, in the order of the ids; of a control token its name after the byte 0xFF."""
    special = tokenizer.special_ids
    found = []
    for token in range(tokenizer.vocab_size):
        piece = tokenizer.piece(token)
        if token in special:
            found.append(_MARKED + piece.encode())
        elif len(piece) == 6 and (byte := BYTE_PIECE.fullmatch(piece)):
            found.append(bytes([int(byte[1], 16)]))
        else:
            found.append(piece.replace(SPACE, " ").encode())
    return found


class _Words:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = token_bytes(tokenizer)
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.eos_token_id = tokenizer.id("<eos>")
        self.bos_token_id = tokenizer.id("<bos>")
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special=False)


def built(tokenizer: Tokenizer) -> Any:
    """llguidance's tokenizer, made once: it takes a second or two for 262,144 ids. Any thread.

    Raises:
        OptionError: llguidance is not installed.
    """
    library = llguidance()
    with _lock:
        if tokenizer not in _known:
            _known[tokenizer] = library.LLTokenizer(_Words(tokenizer), eos_token=tokenizer.id("<eos>"))
        return _known[tokenizer]

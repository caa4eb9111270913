"""What a saved conversation says of itself, read field by field before anything of it is believed.

The digest of the file tells of accidents only: anybody can compute it again. So each value must have the type and the
range that writing gives it, and each array the shape that the model's caches have at that place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import Config
from ..errors import SessionError
from ..model.cache import KV_GROUP, Caches, WindowCache
from ..model.cache_state import CacheState, border_name
from .conversation import Turn
from .timeline import Tokens

FLOATS = ("F32", "BF16", "F16")  # as safetensors spells them
_DIGEST = re.compile(r"[0-9a-f]{32}")
PICTURE, NOTHING = "picture.", "empty"
SIDES = ("keys", "values")


@dataclass(frozen=True)
class State:
    """The rest of a conversation beside its arrays."""

    offset: int  # tokens in the caches
    filled: tuple[int, ...]  # rows that each local layer holds; 0 for a global one
    borders: tuple[tuple[int, tuple[int, ...]], ...]  # snapshots, the last one first: position, and rows as above
    tokens: Tokens
    system: str | None
    exchanges: tuple[Turn, ...]


def plain(
    caches: CacheState, tokens: Tokens, system: str | None = None, exchanges: Sequence[Turn] = ()
) -> dict[str, Any]:
    """What `read_state` reads, as JSON takes it. A prompt that belongs to no conversation has no turns."""
    more = {"earlier": caches.borders[1:]} if caches.borders[1:] else {}
    return {
        "offset": caches.offset,
        "filled": caches.filled,
        "border": caches.borders[0] if caches.borders else None,
        **more,
        "tokens": _tokens(tokens),
        "system": system,
        "exchanges": [
            {name: getattr(turn, name) for name in ("text", "images", "reply")}
            | {"asked": _tokens(turn.asked), "said": None if turn.said is None else _tokens(turn.said)}
            for turn in exchanges
        ],
    }


def _tokens(tokens: Tokens) -> dict[str, Any]:
    """Without the adapter, which a file says once."""
    return {"ids": tokens.ids, "spans": tokens.spans, "digests": tokens.digests}


def read_state(values: Mapping[str, Any], path: object, caches: Caches, config: Config) -> State:
    """The state of a conversation with the model of this config and caches like these.

    Raises:
        SessionError: a value is missing, of another type, or one that writing does not give.
    """
    reader = _Reader(str(path), config)
    offset = reader.number("offset", values.get("offset"), 0, config.text.max_position_embeddings)
    filled = reader.filled("filled", values.get("filled"), caches, offset)
    borders: list[tuple[int, tuple[int, ...]]] = []
    first = [] if values.get("border") is None else [values["border"]]
    for held in first + reader.list("earlier", values.get("earlier", [])):
        position, rows = reader.list("border", held, 2)
        position = reader.number("border", position, 1, borders[-1][0] - 1 if borders else offset)
        borders.append((position, reader.filled("border", rows, caches, position)))
    tokens = reader.tokens("tokens", values.get("tokens"))
    if len(tokens) < offset:
        raise reader.wrong("tokens", len(tokens), f"one for each of {offset} rows")
    if any(start < offset < stop for start, stop in tokens.spans):
        raise reader.wrong("tokens", "a picture read in part", "pictures that are whole")
    system, exchanges = values.get("system"), []
    room = 2 * config.text.max_position_embeddings  # tokens of all turns: more cannot have been answered
    for value in reader.list("exchanges", values.get("exchanges")):
        exchanges.append(exchange := reader.exchange(value))
        known = 0  # of its prompt: with a template of the checkpoint's own, each turn's is the whole one
        if len(exchanges) > 1 and exchange.asked.ids[0] == config.bos_token_id:
            known = min(len(exchanges[-2].asked), len(exchange.asked))
        room -= len(exchange.asked) - known + len(exchange.said or ())
        if room < 0:
            raise reader.wrong("exchanges", "more tokens than fit", f"{config.text.max_position_embeddings} in all")
    return State(
        offset,
        filled,
        tuple(borders),
        tokens,
        None if system is None else reader.text("system", system),
        tuple(exchanges),
    )


def shapes(state: State, caches: Caches, config: Config) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """The dtypes and the shape of each array that must be there, by name."""
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
    for number, (layer, filled) in enumerate(zip(caches, state.filled, strict=True)):
        rows = state.offset if layer.window is None else filled
        wanted |= _rows(f"layer.{number}", layer.bits, rows, config)
    for index, (_, rows_of) in enumerate(state.borders):
        for number, (layer, filled) in enumerate(zip(caches, rows_of, strict=True)):
            if layer.window is not None:
                wanted |= _rows(f"{border_name(index)}.{number}", layer.bits, filled, config)
    for exchange in state.exchanges:
        for name in exchange.asked.digests:
            wanted[PICTURE + name] = picture_shape(config)
    return wanted


def optional_shapes(
    state: State, names: Mapping[str, Any], config: Config
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """The same for those of `names` that may be there or not."""
    pictures = [name for name in names if _DIGEST.fullmatch(name.removeprefix(PICTURE)) and name.startswith(PICTURE)]
    may: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = dict.fromkeys(pictures, picture_shape(config))
    may[NOTHING] = (FLOATS, (1,))
    for index in range(len(state.borders)):
        may[f"{border_name(index)}.logits"] = (("F32",), (1, config.text.vocab_size))
    return may


def picture_shape(config: Config) -> tuple[tuple[str, ...], tuple[int, ...]]:
    return FLOATS, (config.mm_tokens_per_image, config.text.hidden_size)


def _rows(name: str, bits: int, rows: int, config: Config) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Of keys and values of one layer; none where there are no rows."""
    heads, dim = config.text.num_key_value_heads, config.text.head_dim
    if not rows:
        return {}
    parts = [(FLOATS, dim)] if bits == 16 else [(("U32",), dim * bits // 32), *[(FLOATS, dim // KV_GROUP)] * 2]
    return {
        f"{name}.{side}.{part}": (kinds, (1, heads, rows, width))
        for side in SIDES
        for part, (kinds, width) in enumerate(parts)
    }


class _Reader:
    """Values of a state, checked."""

    def __init__(self, path: str, config: Config) -> None:
        self.path, self.config = path, config

    def wrong(self, name: str, got: object, want: object) -> SessionError:
        return SessionError(f"{self.path}: {name}", got=got, want=want, do="the file was not written so: delete it")

    def number(self, name: str, value: Any, least: int, most: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(name, repr(value)[:60], f"{least} to {most}")
        return value

    def text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.wrong(name, repr(value)[:60], "a text")
        return value

    def list(self, name: str, value: Any, length: int | None = None) -> list[Any]:
        if not isinstance(value, list) or length not in (None, len(value)):
            raise self.wrong(name, repr(value)[:60], "a list" if length is None else f"a list of {length}")
        return value

    def fields(self, name: str, value: Any, *names: str) -> tuple[Any, ...]:
        if not isinstance(value, dict) or value.keys() != set(names):
            raise self.wrong(name, repr(value)[:60], f"an object of {', '.join(names)}")
        return tuple(value[key] for key in names)

    def filled(self, name: str, value: Any, caches: Caches, offset: int) -> tuple[int, ...]:
        """Rows of each layer when `offset` tokens were read: all that a later query can see, as Caches.reach proves."""
        counts = []
        for layer, count in zip(caches, self.list(name, value, len(caches)), strict=True):
            least = most = 0
            if isinstance(layer, WindowCache):
                least, most = min(offset, layer.window - 1), min(offset, layer.capacity)
            counts.append(self.number(name, count, least, most))
        return tuple(counts)

    def tokens(self, name: str, value: Any) -> Tokens:
        ids, spans, digests = self.fields(name, value, "ids", "spans", "digests")
        rows, image = self.config.text.vocab_size, self.config.image_token_id
        most = self.config.text.max_position_embeddings + 1  # the last one written is not read
        if len(self.list(name, ids)) > most:
            raise self.wrong(name, f"{len(ids)} tokens", f"at most {most}")
        ids = tuple(self.number(name, token, 0, rows - 1) for token in ids)
        ranges, end = [], 0
        for span in self.list(name, spans):
            start, stop = self.list(name, span, 2)
            start = self.number(name, start, end, len(ids))
            end = self.number(name, stop, start + 1, len(ids))
            if end - start != self.config.mm_tokens_per_image or any(token != image for token in ids[start:end]):
                raise self.wrong(name, f"a picture at {start} to {end}", "image tokens there, as many as a picture has")
            ranges.append((start, end))
        for digest in self.list(name, digests, len(ranges)):
            if not _DIGEST.fullmatch(self.text(name, digest)):
                raise self.wrong(name, repr(digest)[:60], "32 hexadecimal digits")
        return Tokens(ids, tuple(ranges), tuple(digests))

    def exchange(self, value: Any) -> Turn:
        text, images, asked, said, reply = self.fields("exchange", value, "text", "images", "asked", "said", "reply")
        question = self.tokens("asked", asked)
        answer = None if said is None else self.tokens("said", said)
        if not question.ids:
            raise self.wrong("asked", "no tokens", "at least one")
        if answer is not None and answer.spans:
            raise self.wrong("said", "pictures", "none")
        spans = len(question.spans)  # a picture may be shown in crops too
        least = min(spans, 1) if question.ids[0] != self.config.bos_token_id else 0
        images = self.number("images", images, least, spans)
        return Turn(self.text("text", text), images, question, answer, self.text("reply", reply))

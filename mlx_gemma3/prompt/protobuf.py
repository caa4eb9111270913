"""The few fields of a SentencePiece model, a protobuf message, written and read by hand.

The protobuf package would be one more dependency, of an extension module and a generated file that must fit its
version, for forty lines.

Source: the protobuf encoding (protobuf.dev, Encoding).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_LONGEST = 10  # bytes of a varint: 64 bits by sevens


def varint(value: int) -> bytes:
    """Seven bits a byte, lowest first, the high bit set on all but the last."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def fields(data: bytes, most: int) -> Iterator[tuple[int, Any]]:
    """Walk a message of at most `most` fields: (field number, int or bytes).

    Raises:
        IndexError, ValueError: a broken message, or one with more fields.
    """
    at, end = 0, len(data)
    while at < end:
        most -= 1
        if most < 0:
            raise ValueError("too many fields")
        key, at = _read_varint(data, at)
        if (wire := key & 7) == 0:
            value, at = _read_varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            length, at = _read_varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(wire)
        if at + length > end:
            raise IndexError(at)
        yield key >> 3, data[at : at + length]
        at += length


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 7 * _LONGEST, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number of more than 64 bits")

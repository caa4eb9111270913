"""A picture's file before Pillow decodes it: what its markers and chunks say, and a PNG without what nobody looks at.

Owns the bound on the work that one file may ask for: a JPEG sends the whole picture as many times as it has scans. And
what Pillow refuses though it is harmless: profiles and texts of a PNG that unpack to more than a megabyte.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import IO

from ..errors import ImageError

# Pixels times scans of a JPEG. A scan takes up to 1.4 ns a pixel on one core of 2024: some two to three seconds in all.
# Encoders write 10 scans (libjpeg) to 12: the largest picture that is read at all has room for 11, one of 12 million
# pixels for 166.
MAX_SCANNED = 2_000_000_000
MAX_BYTES = 1 << 30  # of a JPEG or PNG, which are looked through before they are decoded
MAX_PARTS = 1 << 17  # strips or tiles of a TIFF; each costs as much as some thousand pixels
MAX_TEXT = 1 << 20  # bytes of one text of a PNG: Pillow's own bound

# What Pillow's decoders raise on damaged bytes. `Warning`: where the program has made warnings errors.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    EOFError,
    RuntimeError,
    MemoryError,
    Warning,
    struct.error,
    zlib.error,
)

_SIGNATURE = 8  # bytes at a PNG's start
_ORIENTING = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # the texts that may say how a PNG is turned
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # after a scan's data: no stuffed byte, restart or filling


def check_scans(file: IO[bytes], name: str, pixels: int) -> None:
    """Refuse a JPEG whose scans make more work than a picture is worth.

    Raises:
        ImageError: over MAX_SCANNED or MAX_BYTES.
    """
    scans = _scans(_whole(file, name))
    if scans > 1 and scans * pixels > MAX_SCANNED:
        raise ImageError(
            f"{name}: too many passes over the picture",
            got=f"{scans} scans of {pixels} pixels",
            want=f"at most {MAX_SCANNED // pixels}",
            do="save it anew, smaller or not progressive",
        )


def _scans(data: bytes) -> int:
    """How many scans stand between a JPEG's start and its end, or where it stops making sense."""
    at, scans = 2, 0
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # filling
            at += 1
        elif marker == 0xD9:
            break
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # stand alone
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            if marker == 0xDA:
                scans += 1
                following = _NEXT_MARKER.search(data, at)
                if following is None:
                    break
                at = following.start()
    return scans


def lean_png(file: IO[bytes], name: str) -> IO[bytes]:
    """The PNG without its colour profile and its texts, except one that may say how it is turned.

    Raises:
        ImageError: over MAX_BYTES.
    """
    data = _whole(file, name)
    kept, changed = [data[:_SIGNATURE]], False
    for kind, start, stop in _chunks(data):
        if kind == b"iCCP" or (kind in _TEXTS and not _orients(kind, data[start + 8 : stop - 4])):
            changed = True
        else:
            kept.append(data[start:stop])
    return BytesIO(b"".join(kept) if changed else data)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, stop) of each chunk, its length and checksum included; the last may be cut off."""
    at = _SIGNATURE
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        stop = min(at + 12 + length, len(data))
        yield data[at + 4 : at + 8], at, stop
        at = stop


def _orients(kind: bytes, content: bytes) -> bool:
    """Whether a text is one that Pillow looks for the orientation in, and unpacks to what it takes."""
    keyword, _, rest = content.partition(b"\0")
    if keyword not in _ORIENTING or len(content) > MAX_TEXT:
        return False
    packed = rest[1:] if kind == b"zTXt" else b""
    if kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    try:
        return len(zlib.decompressobj().decompress(packed, MAX_TEXT)) < MAX_TEXT
    except zlib.error:
        return False


def check_parts(file: IO[bytes], name: str) -> None:
    """Refuse a TIFF in more strips or tiles than any program writes. What is damaged is left to the decoder.

    Raises:
        ImageError: over MAX_PARTS.
    """
    count = _parts(file)
    file.seek(0)
    if count > MAX_PARTS:
        raise ImageError(f"{name}: too many strips or tiles", got=count, want=f"at most {MAX_PARTS}", do="save it anew")


def _parts(file: IO[bytes]) -> int:
    """How many offsets of strips or tiles the first directory of a TIFF or BigTIFF names."""
    head = file.read(16)
    order, big = "<" if head[:2] == b"II" else ">", head[2:4] in (b"+\0", b"\0+")
    entry, first, length = ("HHQQ", "8xQ", "Q") if big else ("HHLL", "4xL", "H")
    try:
        (at,) = struct.unpack_from(order + first, head)
        file.seek(at)
        (entries,) = struct.unpack(order + length, file.read(8 if big else 2))
        table = file.read(min(entries, 1 << 12) * struct.calcsize(order + entry))
        found = struct.iter_unpack(order + entry, table)
        return max((values for tag, _, values, _ in found if tag in (273, 324)), default=0)
    except (struct.error, ValueError, OverflowError, OSError):
        return 0


def _whole(file: IO[bytes], name: str) -> bytes:
    data = file.read(MAX_BYTES + 1)
    file.seek(0)
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name}: a file of more than {MAX_BYTES >> 20} MB", do="make it smaller first")
    return data

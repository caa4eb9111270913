"""A Pillow image → upright, opaque on white, 8-bit RGB.

Owns what is done with orientation, transparency and deep grey. Knows nothing of files; images.py says the source of the
rules and docs/deviations.md, "Pictures", where they differ on purpose.
"""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from .picture_files import DAMAGED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from PIL import Image

# 8 bits for each of 16, rounded: 257 is odd, so there is never a tie.
_DEEP_LEVELS: NDArray[np.uint8] = ((np.arange(1 << 16, dtype=np.uint32) + 128) // 257).astype(np.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode, turn upright, put on white, 8-bit RGB; a new image whose metadata is gone."""
    from PIL import Image

    image = _with_true_transparency(image)
    image.load()
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey(image)
    if image.mode in ("La", "RGBa"):  # premultiplied; Pillow converts these only to their plain twin
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    rgb = image.convert("RGB")
    rgb.info.clear()  # else an orientation or a transparent colour would be applied again
    return rgb


def _with_true_transparency(image: Image.Image) -> Image.Image:
    """A PNG's transparent colour (tRNS) as Pillow should have it; other pictures as they are.

    Pillow scales grey of 2 and 4 bits to 8, and cuts colour of 16 bits to 8, but leaves what is compared with it as it
    stands in the file. Of deep colour the low bytes are decoded once more, since the whole value must be equal.
    """
    from PIL import Image, PngImagePlugin

    colour = image.info.get("transparency")
    if not isinstance(image, PngImagePlugin.PngImageFile) or colour is None or not image.tile:  # read before
        return image
    tile = image.tile[0]
    raw = tile.args if isinstance(tile.args, str) else tile.args[0] if tile.args else ""
    if raw in ("L;2", "L;4"):
        made = image.copy()
        made.info["transparency"] = colour * (85 if raw == "L;2" else 17)
        return made
    if raw != "RGB;16B":
        return image
    assert image.fp is not None
    place = image.fp.tell()
    image.fp.seek(0)
    with PngImagePlugin.PngImageFile(BytesIO(image.fp.read())) as low:
        image.fp.seek(place)
        low.tile = [low.tile[0]._replace(args="RGB;16L")]  # of big-endian values the second byte
        levels, rest = np.asarray(image), np.asarray(low)  # (height, width, 3) uint8
    want = np.array(colour)
    levels = np.where(((levels == want >> 8) & (rest == want & 255)).all(axis=-1)[..., None], np.uint8(255), levels)
    made = Image.fromarray(levels)
    made.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return made


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF (or XMP) orientation asks; as stored where that is absent, unknown or unreadable."""
    from PIL import ExifTags
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DAMAGED:
        return image
    turn = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


def _grey(image: Image.Image) -> Image.Image:
    """Grey of 16-bit (I;16…), 32-bit integer (I) or float (F) values, scaled to 8 bits and rounded.

    White is 65535 in a 16-bit picture. I and F do not say theirs, so the values decide: 1 for floats within 0 … 1,
    else 255, else 65535, whichever first holds them all; anything wider, or negative, is stretched from its least to
    its greatest value. NaN is black. A value marked transparent (PNG tRNS) becomes white.
    """
    from PIL import Image

    values = np.asarray(image)  # (height, width) uint16, int32 or float32
    if image.mode.startswith("I;16"):
        grey = _DEEP_LEVELS[values]
    else:
        low, high = _range(values)
        if low >= 0 and high <= 65535:
            low, high = 0.0, 1.0 if image.mode == "F" and high <= 1 else 255.0 if high <= 255 else 65535.0
        grey = np.empty(values.shape, np.uint8)
        for rows in _strips(values):
            levels = (values[rows].astype(np.float64) - low) * 255.0 / max(high - low, 1e-30)
            if not np.isfinite(levels).all():
                levels = np.nan_to_num(levels, nan=0.0)
            grey[rows] = np.rint(levels).clip(0, 255)
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _range(values: NDArray[Any]) -> tuple[float, float]:
    """The least and the greatest finite value of a picture; 0 and 1 where there is none."""
    least, greatest = np.inf, -np.inf
    for rows in _strips(values):
        part = values[rows]
        if part.dtype.kind == "f":
            part = part[np.isfinite(part)]
        if part.size:
            least, greatest = min(least, float(part.min())), max(greatest, float(part.max()))
    return (least, greatest) if least <= greatest else (0.0, 1.0)


def _strips(values: NDArray[Any]) -> Iterator[slice]:
    """Rows of a picture, as many at once as the processor keeps at hand."""
    height, width = values.shape
    step = max(1, (1 << 17) // width)
    return (slice(top, top + step) for top in range(0, height, step))

"""A picture's file or bytes → upright RGB → square pixels for the vision tower; and the boxes of pan and scan.

Owns the list of formats, the limits of size and shape, and the arithmetic from 8-bit levels to [-1, 1]; rgb.py what is
done with orientation, transparency and deep grey, picture_files.py what hostile files may ask for. Knows nothing of
prompts, tokens or MLX.

Source of the rules: Hugging Face transformers 5.23, image_processing_pil_gemma3.py, image_transforms.py (resize,
rescale, normalize) and image_utils.load_image. Where this differs on purpose: docs/deviations.md, "Pictures".

Pillow and pillow-heif are imported inside the functions, so that importing the package stays cheap. Their file
classes are called by name, not through `Image.open`: no plugin is registered, no warning filter or Pillow setting is
touched, and nothing but the listed formats is ever parsed. So every function here may run on any thread.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from importlib import import_module
from io import BytesIO
from math import ceil, floor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ..boundary.arguments import argument, described, takes
from ..errors import ImageError, OptionError
from .picture_files import DAMAGED, check_parts, check_scans, lean_png
from .rgb import to_rgb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from PIL import Image

MAX_PIXELS = 120_000_000  # phones take 108 million; decoding takes up to two seconds then. Checked on the header
MAX_SIDE = 1 << 14  # of the square for the vision tower, which has 896
MAX_ASPECT = 200  # longer side / shorter side: beyond it nothing is left of the picture in a square

# Pan and scan: the values of Gemma3ProcessorKwargs.
MIN_CROP, MAX_CROPS, MIN_RATIO = 256, 4, 1.2

FORMATS = {  # format → module and class that read it; only the first frame or page is used
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "JPEG": ("PIL.JpegImagePlugin", "JpegImageFile"),
    "WebP": ("PIL.WebPImagePlugin", "WebPImageFile"),
    "GIF": ("PIL.GifImagePlugin", "GifImageFile"),
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "HEIC": ("pillow_heif", "HeifImageFile"),
    "AVIF": ("PIL.AvifImagePlugin", "AvifImageFile"),
}
_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),  # BigTIFF
    (b"MM\0+", "TIFF"),
    (b"BM", "BMP"),
)
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIC_BRANDS = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"heif", b"mif1", b"msf1"}
)

# One entry per 8-bit level, as the reference computes it: rescaled in float64, rounded to float32, normalised in
# float32. A shorter formula is off by one bit at some levels.
_LEVELS: NDArray[np.float32] = (
    (np.arange(256, dtype=np.float64) * 0.00392156862745098).astype(np.float32) - np.float32(0.5)
) / np.float32(0.5)


def load_image(source: str | Path | bytes | Image.Image, *, name: str | None = None) -> Image.Image:
    """Read a picture: upright, opaque on white, 8-bit RGB, without metadata.

    Args:
        source: a path, the bytes of a file in one of FORMATS, or a Pillow image (which is left as it is).
        name: what errors call it; None: its path, or how long it is.

    Returns:
        A new Pillow image of mode RGB, in the picture's own size.

    Raises:
        ImageError: no such file, not a picture, damaged, too large, or too narrow.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        name = name or f"picture of mode {source.mode}"
        with _reading(name, "image", do="pass one that is open and whole"):
            _check_size(name, source.size)
            return to_rgb(source)
    name = name or _name(source)
    with _open(source, name) as file:
        with _reading(name, "file", do="try again"):
            head = file.read(64)
        if not head:
            raise ImageError(f"{name}: the file is empty", got="0 bytes", do="get the picture again")
        form = format_of(head)
        if form is None:
            raise ImageError(
                f"{name}: not a picture of a known format",
                got=f"a file that starts with {head[:12]!r}",
                want=" or ".join((", ".join(list(FORMATS)[:-1]), list(FORMATS)[-1])),
                do=_advice(head),
            )
        file.seek(0)
        read = _reader(form, name)
        if form == "PNG":
            file = lean_png(file, name)
        elif form == "TIFF":
            check_parts(file, name)
        with _reading(name, f"{form} file", do="save or download it again"), read(file) as picture:
            _check_size(name, picture.size)
            if form == "JPEG":
                place = file.tell()
                file.seek(0)
                check_scans(file, name, picture.width * picture.height)
                file.seek(place)
            return to_rgb(picture)


@takes(size="whole")
def to_pixels(image: Image.Image, size: int) -> NDArray[np.float32]:
    """Stretch to a square and scale to [-1, 1]: (size, size, 3) float32, rows first.

    The aspect ratio is not kept. The resize is Pillow's BILINEAR, antialiased, with an 8-bit result.

    Raises:
        ImageError: the image is not of mode RGB, as `load_image` makes it.
        OptionError: no image, or a size beyond MAX_SIDE.
    """
    from PIL import Image

    if not 1 <= size <= MAX_SIDE:
        raise OptionError("size", got=size, want=f"1 to {MAX_SIDE}")
    if argument("image", image, Image.Image).mode != "RGB":
        raise ImageError("picture mode", got=image.mode, want="RGB", do="pass it through load_image first")
    square = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels: NDArray[np.float32] = _LEVELS[np.asarray(square)]
    return pixels


@takes(width="whole", height="whole")
def pan_and_scan_boxes(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """The crops of a long picture, in reading order: 2 to 4 strips side by side, or none.

    Args:
        width, height: of the upright picture in pixels; the crops are cut before any resizing.

    Returns:
        (left, top, right, bottom) of each crop, clipped to the picture; [] where pan and scan does not apply.
    """
    long, short = max(width, height), min(width, height)
    if short < 1 or long >= 2**31:
        raise ImageError(
            "picture size", got=f"{described(width)} x {described(height)}", want="1 x 1 to 2**31 - 1 on a side"
        )
    if long / short < MIN_RATIO:
        return []
    count = min(long // MIN_CROP, floor(long / short + 0.5))
    count = min(MAX_CROPS, max(2, count))
    step = ceil(long / count)
    if min(step, short) < MIN_CROP:
        return []
    spans = [(start, min(start + step, long)) for start in range(0, step * count, step)]
    if width >= height:
        return [(left, 0, right, height) for left, right in spans]
    return [(0, top, width, bottom) for top, bottom in spans]


def _advice(head: bytes) -> str:
    """What to do with a file that is no picture."""
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml", b"<svg", b"<head")):
        return "this is a page, not a picture: give the picture itself"
    return "convert it to one of these"


def _name(source: object) -> str:
    """What errors call the picture. ImageError for a source of a type that cannot be one."""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"picture of {memoryview(source).nbytes} bytes"
    if isinstance(source, str | Path):
        text = str(source)
        return f"picture {text if len(text) <= 200 else text[:100] + '…'}"
    raise ImageError("picture", got=type(source).__name__, want="a path, bytes or a Pillow image")


@contextmanager
def _open(source: str | Path | bytes, name: str) -> Iterator[IO[bytes]]:
    """The picture's bytes as an open binary file. Only regular files: a pipe or device could block or never end."""
    if not isinstance(source, str | Path):
        yield BytesIO(source)
        return
    if str(source).startswith(("http://", "https://", "data:")):
        raise ImageError(
            f"{name}: an address, not a file",
            do="download the picture and pass its path or bytes, or give it to `images`",
        )
    path = Path(source)
    with suppress(RuntimeError):  # `~` of a user who is not there
        path = path.expanduser()
    try:
        if path.is_dir():
            raise ImageError(f"{name}: a folder", do="name one picture file in it")
        if path.exists() and not path.is_file():
            raise ImageError(f"{name}: a pipe or device", want="a regular file", do="pass its bytes instead")
        file = path.open("rb")
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file", do="check the path") from None
    except PermissionError:
        raise ImageError(f"{name}: permission denied", do="check who may read the file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ImageError(f"{name}: cannot be opened ({_reason(error)})", do="check the path") from None
    with file:
        yield file


def format_of(head: bytes) -> str | None:
    """The format that a file's first 64 bytes announce, whatever its name says."""
    for magic, form in _MAGIC:
        if head.startswith(magic):
            return form
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp":  # ISO-BMFF: box length, "ftyp", major brand, minor version, compatible brands
        end = min(int.from_bytes(head[:4], "big"), len(head))
        brands = {head[8:12], *(head[i : i + 4] for i in range(16, end, 4))}
        if brands & _AVIF_BRANDS:
            return "AVIF"
        if brands & _HEIC_BRANDS:
            return "HEIC"
    return None


def _reader(form: str, name: str) -> Callable[[IO[bytes]], Any]:
    """The class that reads `form`, called with a binary file; it reads the header, and decodes when asked."""
    module, attribute = FORMATS[form]
    try:
        reader: Callable[[IO[bytes]], Any] = getattr(import_module(module), attribute)
    except ImportError as error:
        package = "pillow-heif" if form == "HEIC" else "pillow"
        raise ImageError(
            f"{name}: {form} cannot be read here ({_reason(error)})", do=f"pip install --force-reinstall {package}"
        ) from None
    return reader


@contextmanager
def _reading(name: str, kind: str, *, do: str) -> Iterator[None]:
    """Turns whatever a decoder raises into one ImageError."""
    from PIL import Image

    try:
        yield
    except ImageError:
        raise
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: a damaged or incomplete {kind} ({_reason(error)})", do=do) from None


def _reason(error: BaseException) -> str:
    """A decoder's message, short; its type where it says nothing."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return text[:160] or type(error).__name__


def _check_size(name: str, size: tuple[int, int]) -> None:
    width, height = size
    shape = f"{width} x {height} pixels"
    if min(size) < 1:
        raise ImageError(f"{name}: an empty picture", got=shape, want="at least 1 x 1")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name}: too large", got=shape, want=f"at most {MAX_PIXELS} pixels", do="make it smaller first"
        )
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(
            f"{name}: too narrow",
            got=shape,
            want=f"a longer side of at most {MAX_ASPECT} times the shorter",
            do="crop it first",
        )

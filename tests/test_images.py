"""Pictures: every kind of file against the reference's pixels, the boxes of pan and scan, and hostile files."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import pairwise
from math import ceil, floor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mlx_gemma3.errors import ImageError
from mlx_gemma3.prompt import picture_files
from mlx_gemma3.prompt.images import MAX_PIXELS, load_image, pan_and_scan_boxes, to_pixels

GOLDENS = Path(__file__).parent / "goldens" / "images"
GOLDEN = json.loads((GOLDENS / "rows.json").read_text(encoding="utf-8"))
FILES = [row["file"] for row in GOLDEN["rows"]]
Encoder = Callable[..., bytes]


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def heic(image: Image.Image, **options: object) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    if not pillow_heif.libheif_info()["HEIF"]:
        pytest.skip("this build of pillow-heif has no HEIC encoder")
    file = BytesIO()
    pillow_heif.from_pillow(image).save(file, quality=-1, chroma=444, matrix_coefficients=0, **options)
    return file.getvalue()


def avif(image: Image.Image, **options: object) -> bytes:
    from PIL import features

    if not features.check("avif"):
        pytest.skip("this build of Pillow has no AVIF")
    return encode(image, "AVIF", quality=100, subsampling="4:4:4", **options)


# --- the reference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=FILES)
def test_the_references_pixels(row: dict) -> None:
    picture = load_image(GOLDENS / row["file"])
    assert picture.mode == "RGB"
    assert list(picture.size) == row["size"]
    boxes = pan_and_scan_boxes(*picture.size)
    assert len(boxes) == row["crops"]
    for part, want in zip([picture, *(picture.crop(box) for box in boxes)], row["levels"], strict=True):
        pixels = to_pixels(part, GOLDEN["side"])
        levels = np.rint((pixels + 1) * 127.5)[3::7, 3::7].reshape(-1)
        assert np.abs(levels - want).max() <= 1  # one level: another compiler's or decoder's rounding


@pytest.mark.parametrize("name", FILES)
def test_path_is_bytes_is_image(name: str) -> None:
    path = GOLDENS / name
    with Image.open(path) as opened:
        from_image = array(load_image(opened))
    for source in (str(path), path.read_bytes()):
        assert np.array_equal(array(load_image(source)), from_image)


def test_levels_are_rounded_as_in_the_reference() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = to_pixels(Image.fromarray(levels).convert("RGB"), 16)
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.float32
    for level in range(256):
        scaled = np.float32(float(level) * 0.00392156862745098)
        want = (scaled - np.float32(0.5)) / np.float32(0.5)
        assert (pixels[level // 16, level % 16] == want).all()  # bit for bit
    assert pixels.min() == -1 and pixels.max() == 1


def test_downscaling_averages() -> None:
    stripes = np.zeros((448, 448, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(to_pixels(Image.fromarray(stripes), 56)[:, 1:-1]).max() < 0.05  # grey, not aliased


def test_pixels_want_rgb() -> None:
    with pytest.raises(ImageError, match="got L, want RGB"):
        to_pixels(Image.new("L", (4, 4)), 8)


# --- modes ---------------------------------------------------------------------------------------------------------


def test_grey_of_16_bits_is_scaled() -> None:
    values = np.arange(0, 65536, 13, dtype=np.uint16)[:5040].reshape(70, 72)
    want = np.rint(values / 257).astype(np.uint8)
    little = Image.frombytes("I;16", (72, 70), values.tobytes())
    big = Image.frombytes("I;16B", (72, 70), values.astype(">u2").tobytes())
    for source in (encode(little, "PNG"), encode(little, "TIFF"), encode(big, "TIFF"), little, big):
        assert np.array_equal(array(load_image(source)), np.repeat(want[..., None], 3, axis=-1))


def test_transparent_value_of_16_bit_grey_is_white() -> None:
    grey = Image.frombytes("I;16", (2, 1), np.array([1000, 2000], np.uint16).tobytes())
    levels = array(load_image(encode(grey, "PNG", transparency=1000)))[0, :, 0]
    assert levels.tolist() == [255, 8]


@pytest.mark.parametrize(
    ("mode", "values", "want"),
    [
        ("I", [0, 200, 255], [0, 200, 255]),
        ("I", [0, 257, 65535], [0, 1, 255]),
        ("I", [-100, 0, 100], [0, 128, 255]),
        ("I", [0, 100_000, 200_000], [0, 128, 255]),
        ("F", [0.0, 0.2, 1.0], [0, 51, 255]),
        ("F", [0.0, 51.4, 255.0], [0, 51, 255]),
        ("F", [0.0, 25700.0, 65535.0], [0, 100, 255]),
        ("F", [-1.0, 0.5, 1.0], [0, 191, 255]),
        ("F", [float("nan"), 0.5, float("inf")], [0, 128, 255]),
        ("F", [-7.0, -7.0, -7.0], [0, 0, 0]),
    ],
)
def test_deep_grey(mode: str, values: list[float], want: list[int]) -> None:
    raw = np.array([values], np.int32 if mode == "I" else np.float32)
    picture = Image.frombytes(mode, (3, 1), raw.tobytes())
    assert array(load_image(encode(picture, "TIFF")))[0, :, 0].tolist() == want


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_alpha_lies_on_white(mode: str) -> None:
    clear, half, solid = (0, 0, 0, 0), (0, 0, 0, 128), (0, 0, 0, 255)
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([clear, half, solid])
    if mode == "PA":
        picture = rgba.convert("RGB").quantize(2).convert("PA")
        picture.putalpha(rgba.getchannel("A"))
    else:
        picture = (rgba.convert("LA") if mode == "La" else rgba).convert(mode)
    levels = array(load_image(picture))[0, :, 0].tolist()
    assert levels == [255, 127, 0]


def test_cmyk_jpeg_is_not_inverted() -> None:
    for ink, colour in (((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 0), (255, 255, 255)), ((0, 0, 0, 255), (0, 0, 0))):
        data = encode(Image.new("CMYK", (16, 16), ink), "JPEG", quality=95)
        assert b"Adobe" in data
        assert np.abs(array(load_image(data)).astype(int) - colour).max() <= 3


@pytest.mark.parametrize("encoder", [heic, avif])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_heic_and_avif(encoder: Encoder, mode: str) -> None:
    y, x = np.mgrid[0:64, 0:96]
    field = np.stack([x * 2, y * 3, x + y, 255 - 2 * x], axis=-1).astype(np.uint8)
    picture = Image.fromarray(field[..., : len(mode)])
    difference = array(load_image(encoder(picture))).astype(int) - array(load_image(picture))
    assert np.abs(difference).mean() < 2  # a lossy codec, near lossless


@pytest.mark.parametrize("encoder", [heic, avif])
def test_heic_and_avif_are_turned_once(encoder: Encoder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    halves = np.zeros((64, 96, 3), np.uint8)
    halves[:32] = 255  # white on top: turned a quarter clockwise, white is at the right
    picture = array(load_image(encoder(Image.fromarray(halves), exif=exif.tobytes())))
    assert picture.shape == (96, 64, 3)
    assert picture[:, 40:].min() > 200 and picture[:, :24].max() < 50


# --- metadata ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_loading_twice_changes_nothing(name: str) -> None:
    once = load_image(GOLDENS / name)
    assert np.array_equal(array(load_image(once)), array(once))


def test_an_image_handed_over_is_left_as_it_is() -> None:
    with Image.open(GOLDENS / "exif_6_rgba.png") as opened:
        load_image(opened)
        assert (opened.size, opened.mode, opened.getexif()[0x0112]) == ((60, 45), "RGBA", 6)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's own, as it opens a JPEG
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01"]
)
def test_broken_exif_is_no_reason_to_refuse(exif: bytes) -> None:
    picture = Image.fromarray(noise(20, 10))
    assert load_image(encode(picture, "JPEG", exif=exif)).size == (20, 10)


# --- pan and scan --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "boxes"),
    [
        ((768, 640), [(0, 0, 384, 640), (384, 0, 768, 640)]),  # a ratio of exactly 1.2
        ((767, 640), []),
        ((1001, 500), [(0, 0, 501, 500), (501, 0, 1001, 500)]),  # the last is clipped
        ((300, 900), [(0, 0, 300, 300), (0, 300, 300, 600), (0, 600, 300, 900)]),
        ((9000, 300), [(0, 0, 2250, 300), (2250, 0, 4500, 300), (4500, 0, 6750, 300), (6750, 0, 9000, 300)]),
        ((1000, 255), []),  # crops would be lower than 256
        ((511, 300), [(0, 0, 256, 300), (256, 0, 511, 300)]),  # two crops though 511 // 256 is one
        ((510, 300), []),
        ((640, 256), [(0, 0, 320, 256), (320, 0, 640, 256)]),  # 2.5 rounds up to 3, but there is room for 2
        ((500, 500), []),
    ],
)
def test_boxes(size: tuple[int, int], boxes: list[tuple[int, int, int, int]]) -> None:
    assert pan_and_scan_boxes(*size) == boxes


def crops_by_slicing(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """The reference's steps in its own order, on the coordinates themselves instead of pixels."""
    wide = width >= height
    ratio = width / height if wide else height / width
    if ratio < 1.2:
        return []
    count = floor(ratio + 0.5)
    count = min(floor((width if wide else height) / 256), count)
    count = min(4, max(2, count))
    across, down = (count, 1) if wide else (1, count)
    crop_width, crop_height = ceil(width / across), ceil(height / down)
    if min(crop_width, crop_height) < 256:
        return []
    columns, rows = np.arange(width), np.arange(height)
    found = []
    for top in (crop_height * i for i in range(down)):
        for left in (crop_width * i for i in range(across)):
            x, y = columns[left : left + crop_width], rows[top : top + crop_height]
            found.append((int(x[0]), int(y[0]), int(x[-1]) + 1, int(y[-1]) + 1))
    return found


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 6000), st.integers(1, 6000))
@example(768, 640)
@example(1026, 257)
@example(1537, 256)
def test_boxes_are_the_references(width: int, height: int) -> None:
    boxes = pan_and_scan_boxes(width, height)
    assert boxes == crops_by_slicing(width, height)
    assert boxes == [(top, left, bottom, right) for left, top, right, bottom in pan_and_scan_boxes(height, width)] or (
        width == height
    )
    if not boxes:
        return
    assert 2 <= len(boxes) <= 4
    assert boxes[0][:2] == (0, 0) and boxes[-1][2:] == (width, height)
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
    areas = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
    assert areas == width * height  # with the strips in order below: covered, without overlap
    along = 0 if width >= height else 1
    assert all(a[along + 2] == b[along] for a, b in pairwise(boxes))


def test_boxes_of_no_picture() -> None:
    with pytest.raises(ImageError, match="0 x 5"):
        pan_and_scan_boxes(0, 5)


# --- what cannot be read -------------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and has no pixels: whoever decodes it finds it incomplete."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def refusal(source: object) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    assert caught.value.code == "image"
    return message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes"),
        (b"just words, and nothing more\n" * 9, "known format.*PNG, JPEG, WebP, GIF, TIFF, BMP, HEIC or AVIF"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "known format"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + b"\0" * 50, "known format"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "known format"),
        (b"\x89PNG\r\n\x1a\n", "damaged or incomplete PNG file"),
        (png_header(640, 480), "damaged or incomplete PNG file"),
        (png_header(20_000, 20_000), f"got 20000 x 20000 pixels, want at most {MAX_PIXELS}"),
        (png_header(1, 100_000), "too narrow: got 1 x 100000 pixels"),
        (png_header(100_000, 1), "too narrow: got 100000 x 1 pixels"),
        (png_header(201, 1), "too narrow"),
        (png_header(200, 1), "damaged"),  # just narrow enough: refused only for its missing pixels
        (b"BM" + b"x" * 200, "damaged or incomplete BMP file"),
    ],
)
def test_hostile_bytes_are_one_clear_error(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "holiday.png"
    path.write_bytes(data)
    for source, name in ((data, f"picture of {len(data)} bytes: "), (path, f"picture {path}: ")):
        message = refusal(source)
        assert message.startswith(name)
        assert re.search(words, message), message


def test_large_pictures_below_the_limit_do_not_warn() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        refusal(png_header(13_000, 13_000))  # Image.open would warn of a bomb here, and again before decoding
    assert not seen


def test_bad_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such file" in refusal(tmp_path / "absent.png")
    assert "a folder" in refusal(tmp_path)
    assert "cannot be opened" in refusal("a\0b.png") or "no such file" in refusal("a\0b.png")
    assert "file name too long" in refusal(str(tmp_path / ("n" * 300))).lower()
    assert "download" in refusal("https://example.org/cat.png")
    assert len(refusal("data:image/png;base64," + "A" * 100_000)) < 300
    os.mkfifo(tmp_path / "pipe.png")
    assert "pipe or device" in refusal(tmp_path / "pipe.png")
    locked = tmp_path / "locked.png"
    locked.write_bytes(png_header(1, 1))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # tests may run as root, whom no mode bits stop
    assert "permission denied" in refusal(locked)


@pytest.mark.parametrize("source", [None, 7, ["a.png"], np.zeros((4, 4, 3), np.uint8)])
def test_sources_of_a_wrong_type(source: object) -> None:
    assert "want a path, bytes or a Pillow image" in refusal(source)


def test_extreme_images_handed_over() -> None:
    assert "too narrow" in refusal(Image.new("L", (1, 100_000)))
    closed = Image.open(GOLDENS / "grey.png")
    closed.close()
    assert "damaged or incomplete image" in refusal(closed)


def whole_files() -> dict[str, bytes]:
    picture = Image.fromarray(noise(40, 30))
    files = {form: encode(picture, form) for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")}
    files["progressive JPEG"] = encode(picture, "JPEG", progressive=True)
    files["packed TIFF"] = encode(picture, "TIFF", compression="tiff_lzw")
    return files


@pytest.mark.parametrize("form", whole_files())
def test_truncated_files(form: str) -> None:
    data = whole_files()[form]
    load_image(data)
    for share in (0.02, 0.1, 0.5, 0.9):
        assert "picture of" in refusal(data[: int(len(data) * share)])


@pytest.mark.parametrize("encoder", [heic, avif])
def test_truncated_heic_and_avif(encoder: Encoder) -> None:
    data = encoder(Image.fromarray(noise(64, 64)))
    for share in (0.1, 0.5, 0.9):
        assert "damaged or incomplete" in refusal(data[: int(len(data) * share)])


@pytest.mark.parametrize("name", FILES)
def test_flipped_bytes_raise_nothing_else(name: str) -> None:
    data, random_bytes = (GOLDENS / name).read_bytes(), random.Random(name)
    for _ in range(12):
        damaged = bytearray(data)
        for _ in range(random_bytes.choice((1, 4, 16))):
            damaged[random_bytes.randrange(min(len(data), 500))] = random_bytes.randrange(256)
        try:
            picture = load_image(bytes(damaged))
        except ImageError as error:
            assert "\n" not in str(error)
        else:
            assert picture.mode == "RGB"


# --- bounds on the work --------------------------------------------------------------------------------------------


def progressive(width: int, height: int, scans: int) -> bytes:
    """A grey progressive JPEG of empty scans: the first one sends the averages, the others nothing more."""
    data = encode(Image.new("L", (width, height), 128), "JPEG", progressive=True)
    starts = [match.start() for match in re.finditer(rb"\xff\xda", data)]
    last = data[starts[-1] : -2]
    return data[:-2] + last * (scans - len(starts)) + b"\xff\xd9"


def test_scans_are_bounded_by_the_pixels(tmp_path: Path) -> None:
    path = tmp_path / "slow.jpg"
    path.write_bytes(progressive(8000, 8000, 400))
    for source in (path, path.read_bytes()):
        began = time.process_time()
        assert "got 400 scans of 64000000 pixels, want at most 31" in refusal(source)
        assert time.process_time() - began < 1
    assert load_image(progressive(40, 40, 400)).size == (40, 40)
    assert load_image(encode(Image.new("RGB", (4000, 3000)), "JPEG", progressive=True)).size == (4000, 3000)


def test_scans_of_thumbnails_and_of_what_follows_do_not_count() -> None:
    inner = progressive(8, 8, 60)
    data = progressive(3000, 3000, 10)
    exif = b"\xff\xe1" + struct.pack(">H", 2 + len(inner)) + inner
    assert picture_files._scans(data[:2] + exif + data[2:]) == 10
    assert picture_files._scans(data + inner) == 10
    assert picture_files._scans(data[:-2]) == 10 and picture_files._scans(b"\xff\xd8\xff") == 0
    for length in range(0, len(inner), 7):
        assert picture_files._scans(inner[:length]) <= 60


@pytest.mark.parametrize("deep", ["I;16", "I", "F"])
def test_the_largest_pictures_take_two_seconds(deep: str) -> None:
    """The slowest of the modes, by their share of the largest picture: no second of margin on a slow machine."""
    side = 3464
    picture = Image.new(deep, (side, side), 700)
    data = encode(
        picture, "PNG" if deep == "I;16" else "TIFF", **({} if deep == "I;16" else {"compression": "tiff_lzw"})
    )
    began = time.process_time()
    assert load_image(data).size == (side, side)
    assert (time.process_time() - began) * MAX_PIXELS / side**2 < 8  # two seconds where nothing else runs


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", "<>")
def test_a_tiff_in_a_million_strips(order: str, big: bool) -> None:
    count = 1_000_000
    entry = order + ("HHQQ" if big else "HHLL")
    tags = [(256, 4, 1, 4), (257, 4, 1, count), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, count, 400)]
    start = 16 if big else 8
    head = (b"II" if order == "<" else b"MM") + struct.pack(
        order + ("HHHQ" if big else "HL"), *((43, 8, 0) if big else (42,)), start
    )
    table = struct.pack(order + ("Q" if big else "H"), len(tags)) + b"".join(struct.pack(entry, *tag) for tag in tags)
    data = (head + table + bytes(8)).ljust(400, b"\0") + struct.pack(order + "L", 400) * count
    began = time.process_time()
    assert "too many strips or tiles: got 1000000" in refusal(data)
    assert time.process_time() - began < 0.5
    for cut in (5, 9, 17, 30):
        refusal(data[:cut])
    assert load_image(encode(Image.new("L", (4, 300)), "TIFF", strip_size=4)).size == (4, 300)


def test_profiles_and_texts_of_any_size_are_passed_over() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    info = PngInfo()
    info.add_text("a", "x" * 2_000_000, zip=True)
    info.add_text("b", "y" * 3_000_000)
    info.add_itxt("c", "z" * 2_000_000, zip=True)
    picture = Image.fromarray(noise(20, 10))
    data = encode(picture, "PNG", pnginfo=info, exif=exif, icc_profile=b"p" * 3_000_000)
    assert np.array_equal(array(load_image(data)), np.rot90(array(picture), -1)), "eXIf still turns it"
    after = data[:-12] + png_chunk(b"tEXt", b"d\0" + b"w" * 70_000_000) + data[-12:]
    assert load_image(after).size == (10, 20)
    assert "damaged" in refusal(data[: len(data) // 2])


def test_a_text_that_turns_the_picture_is_read() -> None:
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    for packed in (False, True):
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp, zip=packed)
        data = encode(Image.fromarray(noise(20, 10)), "PNG", pnginfo=info)
        assert load_image(data).size == (10, 20)
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp + " " * 2_000_000, zip=True)
    assert load_image(encode(Image.fromarray(noise(20, 10)), "PNG", pnginfo=info)).size == (20, 10)


# --- one transparent colour ----------------------------------------------------------------------------------------


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, depth: int, colour: int, row: bytes, clear: tuple[int, ...]) -> bytes:
    """A PNG of one row, with a tRNS chunk."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    trns = struct.pack(f">{len(clear)}H", *clear)
    parts = [(b"IHDR", header), (b"tRNS", trns), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, body) for kind, body in parts)


@pytest.mark.parametrize(
    ("depth", "colour", "row", "clear", "want"),
    [
        (1, 0, b"\x40", (0,), [255, 255]),
        (1, 0, b"\x40", (1,), [0, 255]),
        (2, 0, b"\x60", (1,), [255, 170]),
        (4, 0, b"\x5a", (5,), [255, 170]),
        (8, 0, b"\x55\xaa", (85,), [255, 170]),
        (16, 0, b"\x12\x34\x56\x56", (0x1234,), [255, 86]),
        (8, 2, b"\x55\0\0\xaa\xaa\xaa", (85, 0, 0), [255, 170]),
        (16, 2, b"\xff\xff\0\0\0\0" + b"\xaa" * 6, (65535, 0, 0), [255, 170]),
        (16, 2, b"\xff\0\0\0\0\0" + b"\xaa" * 6, (0xFF00, 0, 0), [255, 170]),
    ],
)
def test_one_transparent_colour_is_white(
    depth: int, colour: int, row: bytes, clear: tuple[int, ...], want: list
) -> None:
    data = png_of(2, depth, colour, row, clear)
    for source in (data, Image.open(BytesIO(data))):
        levels = array(load_image(source))
        assert levels[0].tolist() == [[level] * 3 for level in want]
    assert np.array_equal(array(load_image(load_image(data))), levels)


def test_a_deep_colour_is_compared_whole() -> None:
    for clear in ((0xFF01, 0, 0), (0xFF00, 1, 0)):
        data = png_of(2, 16, 2, b"\xff\0\0\0\0\0" + b"\xaa" * 6, clear)
        assert array(load_image(data))[0].tolist() == [[255, 0, 0], [170, 170, 170]]


# --- a good neighbour ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="no list of open files on this system")
def test_no_file_stays_open(tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(png_header(30, 30))
    load_image(GOLDENS / "pages.tif")
    before = sum(1 for _ in Path("/dev/fd").iterdir())
    kept = [load_image(GOLDENS / name) for name in FILES]
    for source in (bad, tmp_path, tmp_path / "absent.png"):
        refusal(source)
    gc.collect()  # a leaked handle would warn here, and warnings are errors
    assert sum(1 for _ in Path("/dev/fd").iterdir()) == before
    assert len(kept) == len(FILES)


def test_threads_and_global_settings() -> None:
    from PIL import ImageFile

    heif = heic(Image.fromarray(noise(64, 64)))
    sources: list[Path | bytes] = [*(GOLDENS / name for name in FILES), heif]
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters), dict(Image.OPEN))
    alone = [array(load_image(source)) for source in sources]
    with ThreadPoolExecutor(8) as pool:
        together = [array(picture) for picture in pool.map(load_image, sources * 3)]
    for one, other in zip(alone * 3, together, strict=True):
        assert np.array_equal(one, other)
    after = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    assert after == before[:3]
    assert "HEIF" not in Image.OPEN  # nothing was registered for the whole program


def test_pillow_is_imported_on_first_use_only() -> None:
    program = (
        "import sys, mlx_gemma3.prompt.images as images; images.pan_and_scan_boxes(900, 300);"
        "print([m for m in sys.modules if m.split('.')[0] in ('PIL', 'pillow_heif', 'mlx')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

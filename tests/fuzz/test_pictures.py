"""Pictures of every format with some of their bytes changed, moved or cut."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path

import harness
import mutate
import numpy as np
import pytest
from PIL import Image, features


def files() -> dict[str, bytes]:
    """One small file of each format, and of the ways in which it is read."""
    pillow_heif = pytest.importorskip("pillow_heif")
    noise = np.random.default_rng(7).integers(0, 256, (24, 32, 4), dtype=np.uint8)
    colour, clear = Image.fromarray(noise[..., :3]), Image.fromarray(noise)
    deep = Image.frombytes("I;16", (16, 24), noise[:, :16, :2].tobytes())
    exif = Image.Exif()
    exif[0x0112] = 6
    made: dict[str, tuple[Image.Image, str, dict[str, object]]] = {
        "a.png": (clear, "PNG", {}),
        "palette.png": (colour.quantize(16), "PNG", {"transparency": 3, "icc_profile": b"profile" * 20}),
        "deep.png": (deep, "PNG", {"transparency": 1000}),
        "turned.png": (colour, "PNG", {"exif": exif}),
        "a.jpg": (colour, "JPEG", {"exif": exif}),
        "progressive.jpg": (colour, "JPEG", {"progressive": True}),
        "cmyk.jpg": (colour.convert("CMYK"), "JPEG", {}),
        "a.webp": (clear, "WEBP", {}),
        "lossless.webp": (clear, "WEBP", {"lossless": True}),
        "a.gif": (colour.convert("P"), "GIF", {"save_all": True, "append_images": [colour.convert("P")]}),
        "a.tif": (colour, "TIFF", {"exif": exif}),
        "packed.tif": (deep, "TIFF", {"compression": "tiff_lzw"}),
        "float.tif": (deep.convert("F"), "TIFF", {}),
        "a.bmp": (colour, "BMP", {}),
        "palette.bmp": (colour.quantize(16), "BMP", {}),
    }
    if features.check("avif"):
        made["a.avif"] = (clear, "AVIF", {})
    out = {}
    for name, (image, form, options) in made.items():
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        out[name] = buffer.getvalue()
    if pillow_heif.libheif_info()["HEIF"]:
        buffer = io.BytesIO()
        pillow_heif.from_pillow(colour).save(buffer)
        out["a.heic"] = buffer.getvalue()
    return out


def mutated(folder: Path, count: int, seed: int) -> Iterator[Path]:
    rng, whole = random.Random(seed), files()
    for number in range(count):
        name = list(whole)[number % len(whole)]
        head = rng.choice((None, 64, 300))  # the first bytes say most
        path = folder / f"{number}-{name}"
        path.write_bytes(mutate.mutate_bytes(whole[name], rng, head=head))
        yield path
        path.unlink()


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_pictures_are_read_or_refused_in_one_sentence(tmp_path: Path, count: int) -> None:
    outcome = harness.run("picture", mutated(tmp_path, count, seed=12))
    assert outcome.faults == []
    assert outcome.good and outcome.refused

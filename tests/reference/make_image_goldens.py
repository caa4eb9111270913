"""Makes tests/goldens/images: small pictures of every kind, and what the reference's image processor makes of them.

Run in an environment with the `reference` extra, from anywhere: python tests/reference/make_image_goldens.py

The pictures are written anew as well (their bytes depend on Pillow, so they are committed). Each row of rows.json is
what Gemma3ImageProcessorPil returns for the picture after `load_image`, or, where the picture has transparency, for
the upright Pillow image handed over directly: that path composites on white, as this project always does. No hashes:
a compiler that fuses multiplications may move a level of Pillow's resize by one.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from manifest import GOLDENS, write_manifest
from numpy.typing import NDArray
from PIL import Image, ImageOps

FOLDER = GOLDENS / "images"
SIZE = 56  # side of the golden squares: small, and still a strong downscale for the larger pictures


def colours(width: int, height: int) -> NDArray[np.uint8]:
    """(height, width, 3) uint8: a smooth field with an off-centre mark, different in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    field = np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x // 3 + y // 5) % 256], axis=-1)
    field[height // 8 : height // 3, width // 6 : width // 4] = (250, 20, 60)
    return field.astype(np.uint8)


def make_pictures() -> None:
    def rgb(width: int, height: int) -> Image.Image:
        return Image.fromarray(colours(width, height))

    def alpha(width: int, height: int) -> Image.Image:
        return Image.fromarray((np.add.outer(np.arange(height) * 3, np.arange(width) * 5) % 256).astype(np.uint8))

    def save(image: Image.Image, name: str, **options: object) -> None:
        image.save(FOLDER / name, **options)

    # Shapes and pan and scan.
    save(rgb(1, 1), "rgb_1x1.png")
    save(rgb(2, 3), "rgb_2x3.png")
    save(rgb(1, 150), "rgb_1x150.png")
    save(rgb(384, 320), "ratio_1.2_small.png")
    save(rgb(768, 640), "ratio_1.2.png")
    save(rgb(640, 768), "ratio_1.2_tall.png")
    save(rgb(767, 640), "ratio_below_1.2.png")
    save(rgb(1001, 400).convert("L"), "odd_1001x400.png")
    save(rgb(3000, 260).convert("L"), "panorama_3000x260.png")
    # Modes.
    small = rgb(60, 45)
    save(small.convert("1"), "one_bit.png")
    save(small.convert("L"), "grey.png")
    grey_alpha = small.convert("LA")
    grey_alpha.putalpha(alpha(60, 45))
    save(grey_alpha, "grey_alpha.png")
    with_alpha = small.copy()
    with_alpha.putalpha(alpha(60, 45))
    save(with_alpha, "rgba.png")
    save(with_alpha, "rgba_lossless.webp", lossless=True, exact=True)
    save(with_alpha, "rgba.tif", compression="tiff_lzw")
    palette = small.quantize(16)
    save(palette, "palette.png")
    save(palette, "palette_one_transparent.png", transparency=3)
    save(palette, "palette_alphas.png", transparency=bytes(range(0, 256, 16)))
    save(small.quantize(8).convert("RGB"), "rgb_one_transparent.png", transparency=(250, 20, 60))
    save(small.convert("L"), "grey_one_transparent.png", transparency=int(np.asarray(small.convert("L"))[0, 20]))
    save(small.convert("CMYK"), "cmyk.jpg", quality=90)
    save(small, "lossy.webp", quality=80)
    save(small, "rgb.bmp")
    save(small, "pages.tif", compression="tiff_deflate", save_all=True, append_images=[ImageOps.invert(small)])
    save(palette, "animated.gif", save_all=True, append_images=[ImageOps.invert(small)], duration=50)
    save(palette, "transparent.gif", transparency=5)
    # Orientations: all in a lossless format, one as a camera writes it, one beside transparency.
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(small, f"exif_{orientation}.png", exif=exif)
        if orientation == 6:
            save(small, "exif_6.jpg", exif=exif, quality=90)
            save(small, "exif_6.tif", exif=exif, compression="tiff_lzw")
            save(with_alpha, "exif_6_rgba.png", exif=exif)


def rows() -> list[dict[str, object]]:
    from transformers.image_utils import load_image
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    processor = Gemma3ImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
        pan_and_scan_min_crop_size=256,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    found = []
    for path in sorted(FOLDER.iterdir()):
        if path.suffix == ".json":
            continue
        with Image.open(path) as opened:
            opened.load()
            clear = "A" in opened.getbands() or "transparency" in opened.info
            picture = ImageOps.exif_transpose(opened) if clear else load_image(str(path))
        output = processor.preprocess(picture, do_pan_and_scan=True, return_tensors="np")
        levels = np.rint((output["pixel_values"].transpose(0, 2, 3, 1) + 1) * 127.5)  # (1 + crops, SIZE, SIZE, 3)
        found.append(
            {
                "file": path.name,
                "size": list(picture.size),
                "crops": int(output["num_crops"][0]),
                "levels": levels[:, 3::7, 3::7].astype(int).reshape(len(levels), -1).tolist(),  # (1 + crops, 8·8·3)
            }
        )
    return found


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.iterdir():
        old.unlink()
    make_pictures()
    text = ",\n ".join(json.dumps(row, separators=(",", ":")) for row in rows())
    Path(FOLDER / "rows.json").write_text(f'{{"side":{SIZE},"rows":[\n {text}\n]}}\n', encoding="utf-8")
    write_manifest(
        FOLDER,
        script="tests/reference/make_image_goldens.py",
        source="transformers Gemma3ImageProcessorPil, pan and scan on; 8-bit levels at [3::7, 3::7] of each square",
        packages=("transformers", "pillow", "numpy"),
    )


if __name__ == "__main__":
    main()

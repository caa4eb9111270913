"""Which kernels of packed products and of attention MLX's newest macOS wheel has, for tests/metal_lint.py.

    python bench/metal_table.py [--wheel FILE]

Downloads the wheel through pip (45 MB), reads the names in its metallib, and writes tests/metal_kernels.txt: one kernel
a line with its type, sizes of groups or heads, and bits.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "tests" / "metal_kernels.txt"
NAMES = rb"((?:affine|mxfp4|mxfp8|nvfp4)_(?:qmv|qmm_t|qmm_n|qvm|quantize|dequantize))"
PACKED = re.compile(NAMES + rb"_(float|float16_t|bfloat16_t)_gs_(\d+)_b_(\d)")
VECTOR = re.compile(rb"(sdpa_vector)_(float|float16_t|bfloat16_t)_(\d+)_\3(?!\d)")
MANY = re.compile(rb"(steel_attention)_(float32|float16|bfloat16)_bq\d+_bk\d+_bd(\d+)_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = options.wheel or download(Path(folder))
        with zipfile.ZipFile(wheel) as package:
            (name,) = (name for name in package.namelist() if name.endswith("mlx.metallib"))
            library = package.read(name)
    TABLE.write_text(table(wheel.name.split("-")[1], library), encoding="utf-8")
    sys.stdout.write(f"{TABLE}: {wheel.name}\n")


def download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--platform", "macosx_15_0_arm64"]
    command += ["--only-binary=:all:", "--no-deps", "--dest", str(folder), "mlx-metal"]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("mlx_metal-*.whl")
    return wheel


def table(version: str, library: bytes) -> str:
    """`mlx-metal 0.32.4`, then lines `affine_qmv bfloat16 32 1,2,3,4,5,6,8` and `sdpa_vector bfloat16 256`."""
    packed: dict[tuple[str, str, int], set[int]] = defaultdict(set)
    heads: dict[tuple[str, str], set[int]] = defaultdict(set)
    for kernel, kind, group, bits in PACKED.findall(library):
        packed[kernel.decode(), _type(kind), int(group)].add(int(bits))
    for kernel, kind, size in (*VECTOR.findall(library), *MANY.findall(library)):
        heads[kernel.decode(), _type(kind)].add(int(size))
    lines = [f"mlx-metal {version}"]
    lines += [f"{kernel} {kind} {group} {_numbers(bits)}" for (kernel, kind, group), bits in sorted(packed.items())]
    lines += [f"{kernel} {kind} {_numbers(sizes)}" for (kernel, kind), sizes in sorted(heads.items())]
    return "\n".join(lines) + "\n"


def _type(name: bytes) -> str:
    return {"float": "float32", "float16_t": "float16", "bfloat16_t": "bfloat16"}.get(name.decode(), name.decode())


def _numbers(found: set[int]) -> str:
    return ",".join(map(str, sorted(found)))


if __name__ == "__main__":
    main()

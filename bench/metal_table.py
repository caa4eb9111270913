"""Writes tests/metal/kernels.txt: which of the kernels that this package needs MLX ships for macOS.

    python bench/metal_table.py [--wheel FILE] [--check]

Downloads the newest macOS wheel of mlx-metal with pip, reads the names of all kernels out of `mlx.metallib`, and keeps
those of packed matrices, attention, norms, RoPE and sorting, for the types of activations that we compute in. With
--check it writes nothing, prints what has changed, and fails where kernels are gone.
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

PLATFORM = "macosx_14_0_arm64"  # the oldest macOS that MLX supports: what is missing there is missing for somebody
TABLE = Path(__file__).resolve().parent.parent / "tests" / "metal" / "kernels.txt"
NAME = re.compile(rb"NAME..([A-Za-z0-9_]+)\0", re.DOTALL)  # a tagged field of Apple's library format
PACKED = re.compile(
    r"(affine|mxfp4|mxfp8|nvfp4)_(quantize|dequantize|qmv_fast|qmv_wide|qmv|qvm_split_k|qvm|qmm_t_splitk|qmm_t|qmm_n)_"
    r"(float|bfloat16_t)_gs_(\d+)_b_(\d+)"
)
OTHERS = (  # what it is called in the table, and what follows its type
    (re.compile(r"(sdpa_vector|sdpa_vector_2pass_1)_(float|bfloat16_t)_(\d+_\d+)$"), "{0} {1}", "{2}"),
    (re.compile(r"(steel_attention)_(float32|bfloat16)_bq\d+_bk\d+_bd(\d+)_\w+"), "{0} {1}", "{2}"),
    (re.compile(r"(rms|rms_looped|layer_norm|layer_norm_looped)(float32|bfloat16)$"), "{0}", "{1}"),
    (re.compile(r"(rope_freqs|rope_freqs_large|rope_single_freqs)_(float32|bfloat16)$"), "{0}", "{1}"),
    (re.compile(r"(carg_block_sort)_(float32|bfloat16|int32)_uint32_bn(\d+)_tn\d+$"), "{0} {1}", "{2}"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="a wheel that is here already")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = options.wheel or download(Path(folder))
        table = tabulated(kernel_names(wheel))
    version = wheel.name.split("-")[1]
    if options.check:
        sys.exit(compared(TABLE.read_text(encoding="utf-8").splitlines(), table, version))
    head = [
        f"# mlx-metal {version}",
        f"# Kernels of the wheel for {PLATFORM}, written by bench/metal_table.py; do not edit.",
        "# Packed matrices: mode function type: bits/group. Others: name type: sizes.",
    ]
    TABLE.write_text("\n".join([*head, *table]) + "\n", encoding="utf-8")
    print(f"{TABLE}: {len(table)} lines, mlx-metal {version}")


def compared(old: list[str], new: list[str], version: str) -> int:
    """Print kernels that came and went; 1 where some went, else 0."""
    before, after = (
        {
            f"{stem} {ending}"
            for stem, _, endings in (line.partition(": ") for line in lines)
            for ending in endings.split()
        }
        for lines in ([line for line in old if not line.startswith("#")], new)
    )
    for what, names in (("gone", before - after), ("new", after - before)):
        print(f"mlx-metal {version}: {len(names)} {what}", *sorted(names, key=natural), sep="\n  ")
    return 1 if before - after else 0


def download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--platform", PLATFORM, "--dest", str(folder), "mlx-metal"], check=True)
    return next(folder.glob("mlx_metal-*.whl"))


def kernel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as files:
        library = files.read("mlx/lib/mlx.metallib")
    return {name.decode() for name in NAME.findall(library)}


def tabulated(names: set[str]) -> list[str]:
    """One line for each function and type, with all that it exists for."""
    lines: defaultdict[str, set[str]] = defaultdict(set)
    for name in names:
        if found := PACKED.match(name):
            mode, function, dtype, group, bits = found.groups()
            lines[f"{mode} {function} {dtype}"].add(f"{bits}/{group}")
        for pattern, stem, ending in OTHERS:
            if found := pattern.match(name):
                lines[stem.format(*found.groups())].add(ending.format(*found.groups()))
    return [f"{stem}: {' '.join(sorted(lines[stem], key=natural))}" for stem in sorted(lines)]


def natural(name: str) -> list[tuple[int, str]]:
    """Numbers by size, words by letters."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.findall(r"\d+|\D+", name)]


if __name__ == "__main__":
    main()

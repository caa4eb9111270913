"""What must be so before MLX is imported: the system that its wheel was made for, and float32 that is float32."""

from __future__ import annotations

import functools
import os
import re
import sys

from ..errors import DeviceError


@functools.cache
def check_system() -> None:
    """Refuse macOS 26.0 and 26.1 with MLX's wheel for macOS 26, which needs 26.2 (its libraries' minos; pip offers it).

    Raises:
        DeviceError: that wheel is installed there.
    """
    if sys.platform != "darwin":
        return
    import platform

    version = platform.mac_ver()[0]
    numbers = [int(part) for part in version.split(".") if part.isdigit()]
    if numbers[:1] == [26] and (numbers[1:2] or [0]) < [2] and _for_macos_26():
        raise DeviceError(
            "MLX",
            got=f"its package for macOS 26 on macOS {version}",
            want="macOS 26.2 or later",
            do="update macOS, or install mlx and mlx-metal for macosx_15_0_arm64",
        )


def keep_float32() -> None:
    """On M5, MLX multiplies float32 numbers as TF32, with 10 bits of their 23, unless MLX_ENABLE_TF32 is 0.

    MLX reads it at its first product. A value that the user set stays. bfloat16 is not concerned.
    """
    os.environ.setdefault("MLX_ENABLE_TF32", "0")


def tf32() -> bool:
    """Whether MLX may multiply float32 as TF32, on a chip that can: its `enable_tf32`, by C's atoi."""
    found = re.match(r"\s*[+-]?\d+", os.environ.get("MLX_ENABLE_TF32", "1"))
    return found is not None and int(found[0]) != 0


def _for_macos_26() -> bool:
    from importlib import metadata

    try:
        wheel = metadata.distribution("mlx-metal").read_text("WHEEL") or ""
    except metadata.PackageNotFoundError:
        return False
    return "-macosx_26_" in wheel

"""Sizes as people write them: 500MB, 20 GB, 1.5TiB."""

from __future__ import annotations

import re

from ..errors import OptionError

_UNITS = {"": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("kmgt", 1)
    for ending, base in (("", 1000), ("b", 1000), ("ib", 1024))
}


def read_size(name: str, text: str) -> int:
    """Bytes of a size: a number, then nothing, B, kB, MB, GB, TB (thousands) or KiB, MiB, GiB, TiB (1,024s).

    Args:
        name: the setting, as errors call it.

    Raises:
        OptionError: it is none, or less than a byte.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([a-z]*)\s*", text, re.IGNORECASE | re.ASCII)
    unit = found[2].lower() if found else "?"
    scale = 1 if unit == "b" else _UNITS.get(unit)
    nbytes = int(float(found[1]) * scale) if found and scale else 0
    if nbytes < 1:
        raise OptionError(name, got=repr(text), want="a size such as 20GB or 500MB")
    return nbytes

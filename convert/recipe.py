"""Which matrix gets how many bits: one rule for all, presets, and overrides by name.

A matrix can be packed when it is the weight of a Linear or an Embedding. Vision stays plain unless asked for: it is
small, and its errors are seen in every answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from mlx_gemma3.checkpoint.entries import Packing
from mlx_gemma3.errors import OptionError

# What mx.quantize takes: bits and group sizes by mode.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


@dataclass(frozen=True)
class Override:
    """Matrices whose name matches get this packing instead; None leaves them plain."""

    pattern: str  # a part of the name, or a shell pattern over the whole of it
    packing: Packing | None

    def matches(self, module: str) -> bool:
        if any(mark in self.pattern for mark in "*?["):
            return fnmatchcase(module, self.pattern)
        return f".{self.pattern}." in f".{module}."


@dataclass(frozen=True)
class Recipe:
    """Packings by module. The last override that matches decides; `packing` is for the rest of the decoder."""

    packing: Packing | None  # None: everything plain
    overrides: tuple[Override, ...] = ()
    search: bool = False  # see packing.py

    def choose(self, module: str, width: int) -> Packing | None:
        """The packing of a matrix of this many columns, or None to leave it plain.

        Where the group does not divide the width, the next smaller one that does is taken; none may.
        """
        wanted = None if module.startswith(("vision_tower.", "multi_modal_projector.")) else self.packing
        for override in self.overrides:
            if override.matches(module):
                wanted = override.packing
        if wanted is None:
            return None
        groups = [size for size in MODES[wanted.mode][1] if size <= wanted.group_size and width % size == 0]
        return replace(wanted, group_size=groups[-1]) if groups else None

    def wants(self, module: str) -> bool:
        """Whether the matrix was meant to be packed, whatever its width."""
        return self.choose(module, 1 << 20) is not None


def packing(bits: int, group_size: int | None = None, mode: str = "affine") -> Packing:
    """A checked packing; the group defaults to 64, or to the mode's own.

    Raises:
        OptionError: bits, group or mode that MLX does not have.
    """
    if mode not in MODES:
        raise OptionError("mode", got=repr(mode), want=", ".join(MODES))
    many_bits, groups = MODES[mode]
    group_size = group_size or (64 if mode == "affine" else groups[0])
    if bits not in many_bits:
        raise OptionError("bits", got=bits, want=f"{_listed(many_bits)} ({mode})")
    if group_size not in groups:
        raise OptionError("group size", got=group_size, want=f"{_listed(groups)} ({mode})")
    return Packing(bits, group_size, mode)


def parse_override(text: str) -> Override:
    """`pattern=bits`, `pattern=bits:group`, `pattern=mxfp4` or `pattern=none`.

    Raises:
        OptionError: another form, or a packing that MLX does not have.
    """
    pattern, equals, value = text.partition("=")
    if not (pattern and equals and value):
        raise OptionError("override", got=repr(text), want="pattern=bits[:group], pattern=mode or pattern=none")
    if value == "none":
        return Override(pattern, None)
    if value in MODES and value != "affine":
        return Override(pattern, packing(MODES[value][0][0], mode=value))
    numbers = re.fullmatch(r"(\d+)(?::(\d+))?", value)
    if numbers is None:
        raise OptionError("override", got=repr(text), want="pattern=bits[:group], pattern=mode or pattern=none")
    return Override(pattern, packing(int(numbers[1]), int(numbers[2]) if numbers[2] else None))


# Measured on the 270M in docs/quantisation.md. The keys' and values' projections are a hundredth to a twentieth of a
# model and lose the most for their size; after them the MLP's second matrix.
_KEYS_AND_VALUES = (Override("k_proj", packing(8)), Override("v_proj", packing(8)))
PRESETS: dict[str, tuple[str, Recipe]] = {
    "small": (
        "4 bits in groups of 64, searched; keys' and values' projections and the vision tower in 8",
        Recipe(packing(4), (*_KEYS_AND_VALUES, Override("vision_tower", packing(8))), search=True),
    ),
    "balanced": (
        "5 bits in groups of 64, searched; down_proj in 6, keys' and values' projections in 8; vision plain",
        Recipe(packing(5), (Override("down_proj", packing(6)), *_KEYS_AND_VALUES), search=True),
    ),
    "quality": (
        "8 bits in groups of 32; vision plain",
        Recipe(packing(8, 32)),
    ),
}


def make_recipe(
    *, bits: int | None, group_size: int | None, mode: str, preset: str | None, overrides: Sequence[str]
) -> Recipe:
    """The recipe that a caller's options mean.

    Raises:
        OptionError: options that do not go together or that MLX does not have.
    """
    if preset is not None:
        if preset not in PRESETS:
            raise OptionError("preset", got=repr(preset), want=", ".join(PRESETS))
        if bits is not None or group_size is not None or mode != "affine":
            raise OptionError("preset", got=f"{preset} and bits, group or mode", want="one or the other")
        base = PRESETS[preset][1]
    else:
        natural = 8 if mode == "mxfp8" else 4
        base = Recipe(packing(natural if bits is None else bits, group_size, mode))
    return replace(base, overrides=base.overrides + tuple(map(parse_override, overrides)))


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))

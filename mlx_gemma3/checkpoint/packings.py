"""How MLX packed the matrices of a folder: from the shapes of what is there, held against what config.json says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import CheckpointError, ConfigError
from ..model.gemma3 import Gemma3
from .safetensors import canonical_name

# MLX's packings: bits, group sizes. Affine has floating scales and biases, the others scales of one byte.
_MODES: Mapping[str, tuple[frozenset[int], frozenset[int]]] = {
    "affine": (frozenset((1, 2, 3, 4, 5, 6, 8)), frozenset((32, 64, 128))),
    "mxfp4": (frozenset((4,)), frozenset((32,))),
    "mxfp8": (frozenset((8,)), frozenset((32,))),
    "nvfp4": (frozenset((4,)), frozenset((16,))),
}
_DEFAULTS = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits, group size


def packings(
    model: Gemma3, tensors: Mapping[str, mx.array], quantization: Mapping[str, Any] | None, where: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(module path, arguments of to_quantized) for each module that has scales.

    Bits and group follow from the shapes; what config.json says of them must agree. As in MLX (nn.quantize and
    mlx-lm 0.32's use of it) a module's own entry is all that counts for it: what it leaves out is affine, and the
    mode's own group and bits, not what stands there for all.
    """
    said = dict(quantization or {})
    entries = {
        canonical_name(f"{name}.weight").removesuffix(".weight"): entry
        for name, entry in said.items()
        if isinstance(entry, Mapping | bool)
    }
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        entry, packed = entries.get(path), f"{path}.scales" in tensors
        if (entry is False and packed) or (entry and not packed):
            raise CheckpointError(
                f"{where}: {path}",
                got="scales" if packed else "no scales",
                want=f"what its entry in config.json says, {json.dumps(entry)}",
            )
        if packed and f"{path}.weight" in tensors:
            own = _whole(f"{where}: {path}", entry) if isinstance(entry, Mapping) else said
            weight, scales = tensors[f"{path}.weight"], tensors[f"{path}.scales"]
            yield path, _packing(f"{where}: {path}", module.weight.shape, weight, scales, own)


def _whole(what: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A module's entry with MLX's defaults for what it leaves out."""
    if entry.get("quantize_input"):
        raise ConfigError(f"{what}: quantize_input", got="true", want="false: activations are not packed here")
    values = {name: value for name, value in entry.items() if value is not None}
    bits, group = _DEFAULTS.get(values.get("mode", "affine"), (None, None))
    return {"mode": "affine", "bits": bits, "group_size": group} | values


def _packing(
    what: str, shape: tuple[int, ...], weight: mx.array, scales: mx.array, said: Mapping[str, Any]
) -> dict[str, Any]:
    """Bits and group of one packed matrix: weight (out, in * bits / 32) uint32, scales (out, in / group)."""
    mode = said.get("mode", "affine")
    if mode not in _MODES:
        raise ConfigError(f"{what}: quantization mode", got=repr(mode), want=", ".join(_MODES))
    rows, width = shape
    bits, bits_left, group, group_left = 0, 1, 0, 1
    if weight.ndim == scales.ndim == 2 and weight.shape[0] == scales.shape[0] == rows and scales.shape[1]:
        bits, bits_left = divmod(weight.shape[1] * 32, width)
        group, group_left = divmod(width, scales.shape[1])
    many_bits, groups = _MODES[mode]
    if bits_left or group_left or bits not in many_bits or group not in groups:
        raise CheckpointError(
            f"{what}.weight",
            got=f"shape {weight.shape} with scales {scales.shape}",
            want=f"{mode} packing of {shape}",
        )
    for name, kind, want in (
        ("weight", weight.dtype, "uint32"),
        ("scales", scales.dtype, "a floating type" if mode == "affine" else "uint8"),
    ):
        fits = mx.issubdtype(kind, mx.floating) if want == "a floating type" else dtype_name(kind) == want
        if not fits:
            raise CheckpointError(f"{what}.{name}", got=dtype_name(kind), want=f"{want} for {mode} packing")
    for name, found in (("bits", bits), ("group_size", group)):
        if said.get(name, found) != found:
            raise CheckpointError(
                f"{what}: {name}", got=f"{said[name]} in config.json", want=f"{found}, which its shapes say"
            )
    return {"bits": bits, "group_size": group, "mode": mode}


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")

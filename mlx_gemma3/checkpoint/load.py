"""A checkpoint: its config, generation settings and tokenizer, and the model with its weights in place.

Owns what is strict about loading: every tensor of the model is there once, in its shape, and nothing else; a module is
quantised exactly when it has scales. Files and names belong to tensors.py and gguf.py, finding them to source.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..config import Config
from ..errors import CheckpointError, ConfigError, OptionError
from ..gguf_header import GGUFHeader
from ..model.gemma3 import Gemma3
from ..prompt.tokenizer import Tokenizer
from ..visible import listed
from . import gguf, gguf_config
from .source import Source, resolve
from .tensors import EMBEDDING, canonical_name, is_vision, read_folder

# MLX's packings: bits, group sizes. Affine has floating scales and biases, the others scales of one byte.
_MODES: Mapping[str, tuple[frozenset[int], frozenset[int]]] = {
    "affine": (frozenset((1, 2, 3, 4, 5, 6, 8)), frozenset((32, 64, 128))),
    "mxfp4": (frozenset((4,)), frozenset((32,))),
    "mxfp8": (frozenset((8,)), frozenset((32,))),
    "nvfp4": (frozenset((4,)), frozenset((16,))),
}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: everything but the weights, which `load_model` reads."""

    name: str  # as the user said it
    path: Path  # a folder, or a .gguf file
    config: Config  # eos_token_ids includes those of the generation settings; vision is None when text_only
    generation: Mapping[str, Any]  # generation_config.json, its known settings checked; nothing that is null
    instruct: bool  # tuned for chat: has a template, and is not named pt or base
    text_only: bool = False
    gguf: tuple[GGUFHeader, GGUFHeader | None] | None = field(default=None, repr=False, compare=False)

    def tokenizer(self) -> Tokenizer:
        """Read the vocabulary. Raises TokenizerError without a usable one."""
        return Tokenizer.from_folder(self.path) if self.path.is_dir() else Tokenizer.from_file(self.path)


def open_checkpoint(source: Source, *, text_only: bool = False) -> Checkpoint:
    """Read the settings of a resolved source, and no weights.

    Raises:
        ConfigError: not Gemma 3, or settings that this package does not compute.
        CheckpointError: a GGUF file that is damaged.
    """
    names = [source.name.rpartition("/")[2], source.path.name]
    if source.path.is_dir():
        config = Config.from_file(source.path / "config.json")
        generation = _read_generation(source.path / "generation_config.json")
        headers, template = None, _has_template(source.path)
    else:
        header = GGUFHeader.read(source.path)
        headers = (header, None if text_only else gguf_config.find_projector(header))
        config = gguf_config.read_config(*headers)
        generation = _gguf_generation(header)
        template = bool(header.settings.get("tokenizer.chat_template"))
        names.append(str(header.settings.get("general.name", "")))
    words = {word for name in names for word in re.split(r"[^a-z0-9]+", name.lower())}
    eos = dict.fromkeys((*config.eos_token_ids, *generation.get("eos_token_id", ())))
    config = replace(config, eos_token_ids=tuple(eos), vision=None if text_only else config.vision)
    return Checkpoint(
        name=source.name,
        path=source.path,
        config=config,
        generation=generation,
        instruct=template and not words & {"pt", "base"},
        text_only=text_only,
        gguf=headers,
    )


def load_model(
    source: str | Path | Checkpoint, *, dtype: str = "auto", text_only: bool = False, late_embedding: bool = False
) -> Gemma3:
    """The model with its weights: lazy arrays where the file is safetensors, read when first evaluated.

    Args:
        source: a folder, .gguf file, alias or Hub name, or a checkpoint opened before.
        dtype: of the activations and of all floats: "float32" rounds nothing, "bfloat16", or "auto": bfloat16 on a
            GPU, float32 on the CPU, whose bfloat16 is both slow and inexact.
        text_only: leave out the vision tower; its bytes are never read.
        late_embedding: on the CPU leave an embedding of 16 bits as it is, for a model that will be fused: it is half
            of what a small model reads, and not needed in float32 before the second token.

    Raises:
        SourceError, ConfigError: no such source, or not Gemma 3.
        CheckpointError: tensors missing, extra, of a wrong shape, or files that are cut off.
        OptionError: another dtype.
    """
    target = _dtype(dtype)
    if not isinstance(source, Checkpoint):
        source = open_checkpoint(resolve(source, text_only=text_only, quiet=True), text_only=text_only)
    text_only = text_only or source.text_only
    config = replace(source.config, vision=None) if text_only else source.config
    if source.gguf is None:
        tensors = read_folder(source.path, config, text_only=text_only)
    else:
        header, projector = source.gguf
        tensors = gguf.read_tensors(header, None if text_only else projector, config, target)
    model = fitted_model(config, tensors, where=source.path)
    late = late_embedding and target == mx.float32 and mx.default_device().type == mx.DeviceType.cpu
    model.load_weights(
        [
            (name, x.astype(target) if mx.issubdtype(x.dtype, mx.floating) and not (late and name == EMBEDDING) else x)
            for name, x in tensors.items()
        ]
    )
    model.eval()
    model.freeze()
    return model


def _dtype(name: str) -> mx.Dtype:
    if name == "auto":
        return mx.bfloat16 if mx.default_device().type == mx.DeviceType.gpu else mx.float32
    if name not in ("float32", "bfloat16"):
        do = "Gemma 3 overflows in float16" if name == "float16" else ""
        raise OptionError("dtype", got=repr(name), want="'auto', 'float32' or 'bfloat16'", do=do)
    return mx.float32 if name == "float32" else mx.bfloat16


def fitted_model(config: Config, tensors: Mapping[str, mx.array], *, where: Path) -> Gemma3:
    """A model without its weights whose parameters are exactly these tensors: packed modules where they have scales.

    Nothing is evaluated.

    Raises:
        CheckpointError: tensors missing or unknown, or of a wrong shape or type.
    """
    model = Gemma3(config)
    packings = dict(_packings(model, tensors, model.config.quantization, where))
    if packings:
        nn.quantize(model, class_predicate=lambda path, _: packings.get(path, False))
    wanted: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    missing, extra = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if missing or extra:
        raise CheckpointError(
            f"{where}: tensors",
            got="; ".join(
                f"{len(names)} {what} ({listed(names)})"
                for what, names in (("missing", missing), ("unknown", extra))
                if names
            ),
            want=f"the {len(wanted)} of this config",
            do=_hint(missing, extra, wanted),
        )
    for name, want in wanted.items():
        got = tensors[name]
        if got.shape != want.shape:
            raise CheckpointError(f"{where}: {name}", got=f"shape {got.shape}", want=want.shape)
        if mx.issubdtype(want.dtype, mx.floating) != mx.issubdtype(got.dtype, mx.floating):
            raise CheckpointError(f"{where}: {name}", got=_named(got.dtype), want=_named(want.dtype))
    return model


def _hint(missing: set[str], extra: set[str], wanted: Mapping[str, mx.array]) -> str:
    if not extra and missing == {name for name in wanted if is_vision(name)}:
        return "it holds no vision tower: load it as text only"
    if not missing and all(is_vision(name) for name in extra):
        return "config.json has no vision_config: load it as text only"
    return ""


def _packings(
    model: Gemma3, tensors: Mapping[str, mx.array], quantization: Mapping[str, Any] | None, where: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(module path, arguments of to_quantized) for each module that has scales.

    Bits and group follow from the shapes; what config.json says of them, for all or for one module, must agree.
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
            own = {**said, **(entry if isinstance(entry, Mapping) else {})}
            weight, scales = tensors[f"{path}.weight"], tensors[f"{path}.scales"]
            yield path, _packing(f"{where}: {path}", module.weight.shape, weight, scales, own)


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
        fits = mx.issubdtype(kind, mx.floating) if want == "a floating type" else _named(kind) == want
        if not fits:
            raise CheckpointError(f"{what}.{name}", got=_named(kind), want=f"{want} for {mode} packing")
    for name, found in (("bits", bits), ("group_size", group)):
        if said.get(name, found) != found:
            raise CheckpointError(
                f"{what}: {name}", got=f"{said[name]} in config.json", want=f"{found}, which its shapes say"
            )
    return {"bits": bits, "group_size": group, "mode": mode}


def _named(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(_read_object(path).get("chat_template"))


def _read_generation(path: Path) -> dict[str, Any]:
    """generation_config.json, or nothing when there is none. eos_token_id becomes a tuple."""
    if not path.is_file():
        return {}
    values = {name: value for name, value in _read_object(path).items() if value is not None}
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if name in values and not _is_number(values[name]):
            raise ConfigError(name, got=repr(values[name]), want=f"a number ({path.name})")
    if "top_k" in values and not _is_id(values["top_k"]):
        raise ConfigError("top_k", got=repr(values["top_k"]), want=f"a whole number >= 0 ({path.name})")
    if not isinstance(values.get("do_sample", False), bool):
        raise ConfigError("do_sample", got=repr(values["do_sample"]), want=f"true or false ({path.name})")
    if (eos := values.get("eos_token_id")) is not None:
        ids = tuple(eos) if isinstance(eos, list) else (eos,)
        if not all(_is_id(token) for token in ids):
            raise ConfigError("eos_token_id", got=repr(eos), want=f"an id or a list of ids ({path.name})")
        values["eos_token_id"] = ids
    return values


def _gguf_generation(header: GGUFHeader) -> dict[str, Any]:
    """The sampling settings that newer converters copy out of generation_config.json."""
    names = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    values = {name: header.settings.get(f"general.sampling.{key}") for key, name in names.items()}
    found = {name: value for name, value in values.items() if _is_number(value)}
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in found.items()}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}", got=error, want="a readable JSON file") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}", got=type(values).__name__, want="a JSON object")
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

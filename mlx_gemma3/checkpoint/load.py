"""A checkpoint: its config, generation settings and tokenizer, and the model with its weights in place.

Owns what is strict about loading: every tensor of the model is there once, in its shape, and nothing else; a module is
quantised exactly when it has scales (packings.py). Files and names belong to safetensors.py and gguf.py, finding them
to source.py, what is decided by looking into them to tuned.py and head.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..boundary.arguments import takes
from ..boundary.gguf_header import GGUFHeader
from ..boundary.reading import read_json
from ..config import Config
from ..errors import CheckpointError, ConfigError, OptionError
from ..model.adapter import attach
from ..model.gemma3 import Gemma3
from ..model.shard import WHOLE, Shard, check_machines
from ..prompt.chat_template import ChatTemplate
from ..prompt.tokenizer import Tokenizer
from ..visible import listed
from . import gguf, gguf_config
from .adapter import read_adapter
from .entries import Entry
from .head import gguf_has_own_head, has_own_head
from .packings import dtype_name, packings
from .safetensors import EMBEDDING, is_vision, read_folder
from .source import Source, resolve
from .tuned import folder_template, gguf_templates, judge

NO_DENSE = (
    "this embedding model holds no dense matrices: its vectors are the pooled hidden states, and no vectors of "
    "EmbeddingGemma with its matrices can be compared with them"
)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: everything but the weights, which `load_model` reads."""

    name: str  # as the user said it
    path: Path  # a folder, or a .gguf file
    config: Config  # eos_token_ids with those of the generation settings; tied as head.py says; no vision if text_only
    generation: Mapping[str, Any]  # generation_config.json, its known settings checked; nothing that is null
    instruct: bool  # tuned for chat: see tuned.py
    text_only: bool = False
    notes: tuple[str, ...] = ()  # sentences for whoever loads it
    gguf: tuple[GGUFHeader, GGUFHeader | None] | None = field(default=None, repr=False, compare=False)
    no_pictures: str = ""  # what to do where a vision part is missing
    # its own chat templates; None where turns are written as Gemma 3 writes them
    template: ChatTemplate | None = field(default=None, repr=False, compare=False)

    def tokenizer(self) -> Tokenizer:
        """Read the vocabulary. Raises TokenizerError without a usable one."""
        return Tokenizer.from_folder(self.path) if self.path.is_dir() else Tokenizer.from_file(self.path)


def open_checkpoint(source: Source, *, text_only: bool = False) -> Checkpoint:
    """Read the settings of a resolved source; of the weights only a head and embedding that might be the same.

    Raises:
        ConfigError: not Gemma 3, or settings that this package does not compute.
        CheckpointError: a GGUF file that is damaged.
    """
    names = [source.path.absolute().name]
    if source.path.is_dir():
        config = Config.from_file(source.path / "config.json")
        if config.text.bidirectional:
            from .sentence import read_embedder  # embedders alone

            config = replace(config, embedder=read_embedder(source.path, config.text))
        tied = config.embedder is not None or (config.tie_word_embeddings and not has_own_head(source.path))
        generation = _read_generation(source.path / "generation_config.json")
        headers, missing, template = None, "", folder_template(source.path)
    else:
        header, vision_part, missing = gguf_config.read_headers(source.path, text_only=text_only)
        headers = (header, vision_part)
        config = gguf_config.read_config(*headers)
        tied = not gguf_has_own_head(header)
        generation = _gguf_generation(header)
        template = gguf_templates(header)
        names.append(str(header.settings.get("general.name", "")))
    instruct, notes = judge(source.name, template, names) if config.embedder is None else (False, [])
    if config.embedder is not None and not config.embedder.dense:
        notes.append(NO_DENSE)
    eos = dict.fromkeys((*config.eos_token_ids, *generation.get("eos_token_id", ())))
    vision = None if text_only else config.vision
    config = replace(config, eos_token_ids=tuple(eos), tie_word_embeddings=tied, vision=vision)
    return Checkpoint(
        name=source.name,
        path=source.path,
        config=config,
        generation=generation,
        instruct=instruct,
        text_only=text_only,
        notes=tuple(notes),
        gguf=headers,
        no_pictures=missing,
        template=template if config.embedder is None and template is not None and template.is_own else None,
    )


@takes(dtype="text", text_only="switch", late_embedding="switch", adapter="path")
def load_model(
    source: str | Path | Checkpoint,
    *,
    dtype: str = "auto",
    text_only: bool = False,
    late_embedding: bool = False,
    adapter: str | Path | None = None,
    shard: Shard = WHOLE,
) -> Gemma3:
    """The model with its weights: lazy arrays where the file is safetensors, read when first evaluated.

    Args:
        source: a folder, .gguf file, alias or Hub name, or a checkpoint opened before.
        dtype: of the activations and of all floats: "float32" rounds nothing, "bfloat16", or "auto": bfloat16 on a
            GPU, float32 on the CPU, whose bfloat16 is both slow and inexact.
        text_only: leave out the vision tower; its bytes are never read.
        late_embedding: on the CPU leave an embedding of 16 bits as it is, for a model that will be fused: it is half
            of what a small model reads, and not needed in float32 before the second token.
        adapter: a folder of PEFT's, mlx-lm's or mlx-vlm's: its matrices are AdaptedLinear then.
        shard: the part that this machine holds of the model; of safetensors nothing else is read.

    Raises:
        SourceError, ConfigError: no such source, or not Gemma 3; no adapter, or one that is not computed here.
        CheckpointError: tensors missing, extra, of a wrong shape, or files that are cut off.
        OptionError: another dtype, or a number of machines that the model does not divide among.
    """
    target = _dtype(dtype)
    if not isinstance(source, Checkpoint):
        source = open_checkpoint(resolve(source, text_only=text_only, quiet=True), text_only=text_only)
    check_machines(source.config, shard.size)
    text_only = text_only or source.text_only
    config = replace(source.config, vision=None) if text_only else source.config
    if source.gguf is None:
        tensors = read_folder(source.path, config, text_only=text_only, shard=shard)
    else:
        header, projector = source.gguf
        projector = None if text_only else projector
        check_entries(config, gguf.GGUFStore(header, projector, config).entries, source.path)
        tensors = gguf.read_tensors(header, projector if shard.rank == 0 else None, config, target, shard)
    model = fitted_model(config, tensors, where=source.path, shard=shard)
    late = late_embedding and target == mx.float32 and mx.default_device().type == mx.DeviceType.cpu
    model.load_weights(
        [
            (name, x.astype(target) if mx.issubdtype(x.dtype, mx.floating) and not (late and name == EMBEDDING) else x)
            for name, x in tensors.items()
        ]
    )
    model.eval()
    model.freeze()
    if adapter is not None:
        attach(model, read_adapter(adapter, config, model=source.name, text_only=text_only).matrices)
    return model


def _dtype(name: str) -> mx.Dtype:
    if name == "auto":
        return mx.bfloat16 if mx.default_device().type == mx.DeviceType.gpu else mx.float32
    if name not in ("float32", "bfloat16"):
        do = "Gemma 3 overflows in float16" if name == "float16" else ""
        raise OptionError("dtype", got=repr(name), want="'auto', 'float32' or 'bfloat16'", do=do)
    return mx.float32 if name == "float32" else mx.bfloat16


def fitted_model(config: Config, tensors: Mapping[str, mx.array], *, where: Path, shard: Shard = WHOLE) -> Gemma3:
    """A model without its weights whose parameters are exactly these tensors: packed modules where they have scales.

    Nothing is evaluated.

    Raises:
        CheckpointError: tensors missing or unknown, or of a wrong shape or type.
    """
    model = Gemma3(config, shard)
    packed = dict(packings(model, tensors, model.config.quantization, where))
    if packed:
        nn.quantize(model, class_predicate=lambda path, _: packed.get(path, False))
    wanted: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    check_fit(wanted, tensors, where)
    for name, want in wanted.items():
        got = tensors[name]
        if mx.issubdtype(want.dtype, mx.floating) != mx.issubdtype(got.dtype, mx.floating):
            raise CheckpointError(f"{where}: {name}", got=dtype_name(got.dtype), want=dtype_name(want.dtype))
    return model


def check_entries(config: Config, entries: Sequence[Entry], where: Path) -> None:
    """Hold what a file's header lists against the model of this config, before anything is read.

    Raises:
        CheckpointError: parameters missing or unknown, or of a wrong shape.
    """
    wanted: dict[str, mx.array] = dict(tree_flatten(Gemma3(config).parameters()))
    check_fit(wanted, {entry.name: entry for entry in entries}, where)


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def check_fit(wanted: Mapping[str, mx.array], found: Mapping[str, _Shaped], where: Path) -> None:
    """Names and shapes of all that the model has, and nothing else.

    Raises:
        CheckpointError: some are missing or unknown, or one has another shape.
    """
    missing, extra = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if (missing or extra) and (wrong := _without_tower(missing, extra, wanted)):
        raise CheckpointError(f"{where}", got=wrong, do="load its words alone with --text-only (text_only=True)")
    if missing or extra:
        raise CheckpointError(
            f"{where}: tensors",
            got="; ".join(
                f"{len(names)} {what} ({listed(names)})"
                for what, names in (("missing", missing), ("unknown", extra))
                if names
            ),
            want=f"the {len(wanted)} of this config",
        )
    for name, want in wanted.items():
        if found[name].shape != want.shape:
            raise CheckpointError(f"{where}: {name}", got=f"shape {found[name].shape}", want=want.shape)


def _without_tower(missing: Set[str], extra: Set[str], wanted: Iterable[str]) -> str:
    """What is wrong when all that is wrong is the vision tower, on one side alone; else nothing."""
    if not extra and missing == {name for name in wanted if is_vision(name)}:
        return "a vision_config, but it holds no vision tower"
    if not missing and all(is_vision(name) for name in extra):
        return "a vision tower among the weights, but no vision_config in config.json"
    return ""


_SAMPLING = {  # least, most, in words
    "temperature": (0, 1e30, "a number from 0 on"),
    "top_p": (1e-30, 1, "a number above 0, at most 1"),
    "min_p": (0, 1, "a number from 0 to 1"),
    "repetition_penalty": (1e-30, 1e30, "a number above 0"),
    "top_k": (0, 2**31 - 1, "a whole number >= 0"),
}


def _sampling(values: Mapping[str, Any], where: str) -> dict[str, int | float]:
    """The sampling settings among some values. Raises ConfigError: another type, or out of range."""
    found = {name: values[name] for name in _SAMPLING if values.get(name) is not None}
    for name, value in found.items():
        low, high, want = _SAMPLING[name]
        if not _is_number(value) or not low <= value <= high or (name == "top_k" and not isinstance(value, int)):
            raise ConfigError(name, got=repr(value), want=f"{want} ({where})")
    return {name: value if name == "top_k" else float(value) for name, value in found.items()}


def _read_generation(path: Path) -> dict[str, Any]:
    """generation_config.json, or nothing when there is none. eos_token_id becomes a tuple."""
    if not path.exists():
        return {}
    values = {name: value for name, value in _read_object(path).items() if value is not None}
    values |= _sampling(values, path.name)
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
    values = {name: header.get(f"general.sampling.{key}", "number") for key, name in names.items()}
    return _sampling(values, header.path.name)


def _read_object(path: Path) -> dict[str, Any]:
    values = read_json(path, ConfigError)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}", got=type(values).__name__, want="a JSON object")
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

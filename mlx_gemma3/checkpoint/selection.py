"""Which files of a place make a model: the same choice for a folder here, a repository, and its cached copy.

Knows names and the index of shards; opens no weights, knows nothing of the network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from ..boundary.gguf_header import part_names
from ..boundary.reading import parse_json
from ..errors import CheckpointError, ConfigError, Gemma3Error, SourceError, SourceNotFound
from ..prompt.vocabulary import VOCABULARIES
from ..visible import listed
from .safetensors import INDEX, canonical_name, is_vision, read_index

CONFIG_FILES = (
    "config.json generation_config.json preprocessor_config.json processor_config.json added_tokens.json "
    "tokenizer_config.json special_tokens_map.json chat_template.json chat_template.jinja"
).split()
# Of an embedding model as sentence-transformers writes it (sentence.py), and of its modules' folders.
MODULES, PROMPT_FILE, LENGTH_FILE = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
SENTENCE_FILES = (MODULES, PROMPT_FILE, LENGTH_FILE)
MORE_TEMPLATES = re.compile(r"additional_chat_templates/[^/]+\.jinja")
MODULE_FILE = re.compile(r"\d+_\w+/(config\.json|model\.safetensors)", re.ASCII)
_LORA = "a LoRA adapter"
_BESIDE = "load its base model with --adapter PATH (adapters=…), or melt it in: mlx-gemma3 convert BASE --adapter PATH"
_SAVE = "load it with transformers and save it again: save_pretrained() writes model.safetensors"
# Weights that are no model by themselves, or of a format that is not read: what they are, their names, what to do.
_OTHER_KINDS = (
    (
        _LORA,
        re.compile(r"adapter_config\.json|adapter_model.*\.(safetensors|bin)|(\d+_)?adapters\.(safetensors|npz)"),
        _BESIDE,
    ),
    ("no weights but pickled ones of PyTorch", re.compile(r"pytorch_model.*\.bin(\.index\.json)?|model.*\.bin"), _SAVE),
    (
        "no weights but those of a training program",
        re.compile(r"consolidated.*\.(safetensors|pth|pt)|.*\.(pth|pt|ckpt)"),
        "take the model in Hugging Face's layout, which the program that wrote it can export",
    ),
)


@dataclass(frozen=True)
class Plan:
    """The wanted files of a repository or folder, in the order to fetch: what comes last proves the rest is there."""

    stages: tuple[tuple[str, ...], ...]
    file: str = ""  # the .gguf; empty where the folder itself is the answer

    def missing(self, folder: Path) -> list[str]:
        return [name for stage in self.stages for name in stage if not (folder / name).is_file()]


def choose(
    names: Collection[str],
    place: str,
    wanted: str,
    text_only: bool,
    index: Callable[[], str],
    adapter: Callable[[], str] = lambda: "",
    kind: Callable[[str], str] | None = None,
) -> Plan:
    """Choose among the files of a place.

    Safetensors before GGUF, of those the ones that `tensors.shards` reads; `index` gives the text of the index,
    `adapter` that of an adapter_config.json, where it is at hand. `kind` tells what a .gguf is (gguf_config.kind_of);
    None goes by the names.

    Raises:
        SourceNotFound: `wanted`, a .gguf by name, is not there.
        SourceError: no safetensors, and more than one .gguf.
        ConfigError: no config.json. CheckpointError: no weights, those of an adapter or of a format that is not read,
            or shards of the index missing.
    """
    top = {name for name in names if "/" not in name}
    weights = sorted(name for name in top if name.startswith("model") and name.endswith(".safetensors"))
    kinds = {name: (kind or _kind_by_name)(name) for name in names if is_gguf(name)}
    towers = sorted(name for name, what in kinds.items() if what == "vision")
    ggufs = sorted({first_part(name) for name, what in kinds.items() if what == "model"} or kinds)
    if wanted and wanted not in names:
        raise SourceNotFound(f"{place}/{wanted}", got="no such file", want=listed(ggufs) or "a .gguf")
    if not wanted and not weights and INDEX not in top and ggufs:
        if len(ggufs) > 1:
            raise SourceError(
                place,
                got=f"{len(ggufs)} .gguf files: {listed(ggufs)}",
                want="one",
                do=f"name it, as in {place}/{ggufs[0]}, or download it and pass its path",
            )
        wanted = ggufs[0]
    if wanted:
        wanted = first_part(wanted)
        folder = wanted.rpartition("/")[0]
        parts = [f"{folder}/{name}" if folder else name for name in part_names(wanted.rpartition("/")[2]) or ()]
        if absent := [name for name in parts if name not in names]:
            raise CheckpointError(place, got=f"no {listed(absent)}", want=f"all {len(parts)} parts of the model")
        beside = [name for name in towers if name.rpartition("/")[0] == folder]
        beside = beside or [name for name in towers if name.rpartition("/")[0] == folder.rpartition("/")[0]]
        beside.sort(key=lambda name: [kind not in name.lower() for kind in ("bf16", "f32", "f16")])  # as gguf.py
        return Plan((tuple(beside[: not text_only]), tuple(parts or [wanted])), wanted)
    if not weights and INDEX not in top and (refusal := _other_weights(place, top, adapter)) is not None:
        raise refusal
    if "config.json" not in top:
        raise ConfigError(place, got="no config.json", want="a model's folder: config.json and model*.safetensors")
    small = [name for name in (*CONFIG_FILES, INDEX) if name in top]
    small += sorted(name for name in names if MORE_TEMPLATES.fullmatch(name))
    if MODULES in top:  # an embedding model's: a folder for each module, its matrix among them
        small += [name for name in SENTENCE_FILES if name in top]
        small += sorted(name for name in names if MODULE_FILE.fullmatch(name))
    small += [name for name in VOCABULARIES if name in top]  # the first decides, the second is for other programs
    if INDEX in top:
        weights = _shards(index(), place, text_only)
        if "model.safetensors" in top and not set(weights) <= set(names):  # joined later, the index forgotten
            weights = ["model.safetensors"]
    elif "model.safetensors" in top:
        weights = ["model.safetensors"]
    if not weights:
        raise CheckpointError(place, got="no weights", want="model*.safetensors or one .gguf")
    if absent := [name for name in weights if name not in names]:
        raise CheckpointError(f"{place}: shards that {INDEX} names", got=f"no {listed(absent)}", do="fetch them")
    return Plan((tuple(small), tuple(weights)))


def _shards(index: str, place: str, text_only: bool) -> list[str]:
    """The files that the text of an index names, without those that text_only never opens."""
    files = read_index(index, f"{place}: {INDEX}")
    return sorted(
        file
        for file, names in files.items()
        if not (text_only and all(is_vision(canonical_name(name)) for name in names))
    )


def _other_weights(
    place: str, names: Collection[str], adapter: Callable[[], str] = lambda: ""
) -> CheckpointError | None:
    """What to say of a place whose weights are of a kind that is not read; None where there are none of these."""
    for kind, pattern, do in _OTHER_KINDS:
        if found := [name for name in names if pattern.fullmatch(name)]:
            if kind == _LORA and (base := _base_of(adapter())):
                kind = f"{kind} of {base}"
            return CheckpointError(
                place, got=f"{kind} ({listed(found)})", want="config.json and model*.safetensors, or one .gguf", do=do
            )
    return None


def _base_of(text: str) -> str:
    """The model that an adapter_config.json of PEFT or mlx-lm names; nothing where it names none."""
    try:
        values = parse_json(text, "adapter_config.json", CheckpointError)
    except CheckpointError:
        return ""
    base = (values.get("base_model_name_or_path") or values.get("model")) if isinstance(values, dict) else None
    return base if isinstance(base, str) else ""


def other_file(path: str, name: str) -> Gemma3Error:
    """What to say of a single file that was given as the model and is no .gguf."""
    if (refusal := _other_weights(path, (name,))) is not None:
        return refusal
    do = "give the folder that it is in" if name.endswith(".safetensors") else ""
    return SourceError(path, got="a file", want="a folder or a .gguf file", do=do)


def is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def first_part(name: str) -> str:
    """The name of the first file of a split GGUF; any other name as it is."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{(part_names(file) or [file])[0]}"


def _kind_by_name(name: str) -> str:
    """What a .gguf is that cannot be looked into: llama.cpp calls the file of the vision tower mmproj…"""
    file = name.rpartition("/")[2].lower()
    return next((what for word, what in (("mmproj", "vision"), ("imatrix", "imatrix")) if word in file), "model")

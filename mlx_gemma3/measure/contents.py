"""What is in a checkpoint, from its headers, in plain types; no weight is read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ..checkpoint.entries import Entry, part_of, read_note
from ..checkpoint.load import Checkpoint, open_checkpoint
from ..checkpoint.memory import estimate, loaded_bytes
from ..checkpoint.published import size_of
from ..checkpoint.source import resolve
from ..checkpoint.tuned import find_template, gguf_template
from ..checkpoint.weights import open_store
from ..embedder_config import EmbedderConfig
from ..errors import TokenizerError
from ..model.cache import KV_BITS
from ..prompt.vocabulary import VOCABULARIES
from .machine import machine as this_machine

CONTEXTS = (4096, 32768, 131072)


def contents(source: str, *, text_only: bool, quiet: bool, machine: bool = False) -> dict[str, Any]:
    """Everything about a checkpoint; sizes in bytes.

    Args:
        quiet: no progress of a download.
        machine: this machine too, with this checkpoint's attention.
    """
    checkpoint = open_checkpoint(resolve(source, text_only=text_only, quiet=quiet), text_only=text_only)
    about = _describe(checkpoint, open_store(checkpoint).entries)
    return about | ({"machine": this_machine(checkpoint.config)} if machine else {})


def _describe(checkpoint: Checkpoint, entries: Sequence[Entry]) -> dict[str, Any]:
    config = checkpoint.config
    text, vision = config.text, config.vision
    global_layers = [layer for layer in range(text.num_hidden_layers) if text.is_global(layer)]
    count, size = _totals(entries)
    return {
        "name": checkpoint.name,
        "path": str(checkpoint.path),
        "note": _note(checkpoint),
        "format": "safetensors" if checkpoint.gguf is None else "gguf",
        "size": size_of(config),
        "chat": checkpoint.instruct,
        "notes": list(checkpoint.notes),
        "context": text.max_position_embeddings,
        "layers": {
            "count": text.num_hidden_layers,
            "global": global_layers,
            "local": text.num_hidden_layers - len(global_layers),
            "window": text.sliding_window,
        },
        "embedding": None if config.embedder is None else _embedding(config.embedder),
        "pictures": None if vision is None else {"pixels": vision.image_size, "tokens": config.mm_tokens_per_image},
        "parameters": count,
        "bytes": size,
        "bits_per_weight": round(8 * size / count, 3),
        "parts": list(_parts(entries)),
        "matrices": _matrices(entries),
        "tokenizer": _tokenizer(checkpoint),
        "chat_template": _template(checkpoint),
        "chat_template_of": _template_of(checkpoint),
        "generation": dict(checkpoint.generation),
        "memory": _memory(checkpoint, entries),
    }


def _embedding(embedder: EmbedderConfig) -> dict[str, Any]:
    """An embedding model's vectors, in plain types."""
    return {
        "dimensions": embedder.dimensions,
        "tokens": embedder.max_length,
        "dense": [[one.inputs, one.outputs] for one in embedder.dense],
        "prompts": dict(embedder.prompts),
        "default_prompt": embedder.default_prompt,
    }


def _note(checkpoint: Checkpoint) -> str | None:
    """What the checkpoint says of itself: the first words of its card, or a GGUF's own description."""
    if checkpoint.gguf is None:
        return read_note(checkpoint.path).text or None
    return str(checkpoint.gguf[0].settings.get("general.description") or "") or None


def _totals(entries: Iterable[Entry]) -> tuple[int, int]:
    """Numbers, and bytes in the file."""
    pairs = [(math.prod(entry.shape), entry.nbytes) for entry in entries]
    return sum(count for count, _ in pairs), sum(size for _, size in pairs)


def stored_as(entry: Entry) -> str:
    """How the file keeps it: "BF16", "4 bits, groups of 64", "Q4_K"."""
    return str(entry.packing) if entry.packing is not None and entry.kind == "U32" else entry.kind


def _parts(entries: Sequence[Entry]) -> Iterable[dict[str, Any]]:
    """A row for each kind of module, in the order of the model, its ways of storing by how much they hold."""
    order = ("embed_tokens", "attention", "mlp", "norms", "dense", "lm_head", "vision_tower", "projector")
    for part in order:
        inside = [entry for entry in entries if part_of(entry.name) == part]
        if not inside:
            continue
        ways: Counter[str] = Counter()
        for entry in inside:
            ways[stored_as(entry)] += math.prod(entry.shape)
        count, size = _totals(inside)
        yield {"part": part, "parameters": count, "bytes": size, "stored": dict(ways.most_common())}


def _matrices(entries: Sequence[Entry]) -> dict[str, Any]:
    """How most matrices are stored, and which are stored otherwise: names by way, layers put together."""
    ways = {
        entry.name.removesuffix(".weight"): stored_as(entry)
        for entry in entries
        if len(entry.shape) == 2 and entry.name.endswith(".weight")
    }
    usual = Counter(ways.values()).most_common(1)[0][0]
    parts: dict[str, set[str]] = {}
    for name, way in ways.items():
        parts.setdefault(part_of(name + "."), set()).add(way)
    others: dict[str, list[str]] = {}
    for name, way in ways.items():
        if way != usual:
            part = part_of(name + ".")
            others.setdefault(way, []).append(part if part == "vision_tower" and len(parts[part]) == 1 else name)
    return {"usual": usual, "others": {way: _together(names) for way, names in others.items()}}


def _together(names: Iterable[str]) -> list[str]:
    """Names that differ in their layer only as one: "language_model.layers.0-5,12.mlp.down_proj"."""
    layers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        found = re.fullmatch(r"(.*\.layers\.)(\d+)(\..*)", name)
        layers.setdefault((found[1], found[3]) if found else (name, ""), []).append(int(found[2]) if found else 0)
    return [before + _ranges(numbers) + after if after else before for (before, after), numbers in layers.items()]


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 → "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The vocabulary's file and how many ids have a piece; None without a usable one."""
    try:
        size = checkpoint.tokenizer().vocab_size
    except TokenizerError:
        return None
    path = checkpoint.path
    file = path.name if path.is_file() else next(name for name in VOCABULARIES if (path / name).is_file())
    return {"file": file, "vocabulary": size}


def _template(checkpoint: Checkpoint) -> str | None:
    """The file that holds the chat template, or None."""
    if checkpoint.gguf is not None:
        return checkpoint.path.name if gguf_template(checkpoint.gguf[0]) is not None else None
    found = find_template(checkpoint.path)
    return found[0] if found is not None else None


def _template_of(checkpoint: Checkpoint) -> str | None:
    """Who wrote the turns' form: the checkpoint, or Gemma 3; None of a checkpoint that only completes."""
    if checkpoint.template is not None:
        return "own"
    return "gemma3" if checkpoint.instruct else None


def _memory(checkpoint: Checkpoint, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Bytes on a Mac (bfloat16) at a few contexts, by the bits of the key-value cache."""
    config = checkpoint.config
    weights = loaded_bytes(entries)
    rows = []
    for context in sorted({min(context, config.text.max_position_embeddings) for context in CONTEXTS}):
        for bits in KV_BITS:
            need = estimate(config, weights, context=context, kv_bits=bits)
            rows.append({"context": context, "kv_bits": bits, "weights": weights, "kv": need.kv, "total": need.total})
    return rows

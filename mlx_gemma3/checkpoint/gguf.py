"""GGUF files: a text model, and the vision part (mmproj) that llama.cpp keeps in a second file.

Owns the tensor names, what llama.cpp's converter did to some tensors, and reading them by rows. Knows nothing of bits
and blocks (gguf_blocks.py), nor of the settings (gguf_config.py).

Sources: llama.cpp's converter (conversion/gemma.py, gguf-py/gguf/tensor_mapping.py), its graphs (src/models/gemma3.cpp,
tools/mtmd/models/siglip.cpp) and pull request 13290 (the two namings of the vision MLP).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..boundary.gguf_header import GGUFHeader, GGUFTensor
from ..config import Config
from ..errors import CheckpointError
from ..model.shard import WHOLE, Shard
from .entries import Entry, Packing
from .gguf_blocks import BlockType, block_type, empty_rows, read_rows
from .safetensors import PATCH_WEIGHT, channels_last

_TEXT_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_VISION_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
    "attn_output": "self_attn.out_proj",
    "layer_norm1": "layer_norm1",
    "layer_norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_WHOLE = {
    "token_embd": "language_model.embed_tokens",
    "output_norm": "language_model.norm",
    "output": "lm_head",
    # an embedding model's matrices, as llama.cpp's converter and Ollama's call them
    "dense_2": "dense.0",
    "dense_3": "dense.1",
    "dense.0": "dense.0",
    "dense.1": "dense.1",
    "v.patch_embd": "vision_tower.embeddings.patch_embedding",
    "v.position_embd": "vision_tower.embeddings.position_embedding",
    "v.post_ln": "vision_tower.post_layernorm",
    "mm.soft_emb_norm": "multi_modal_projector.mm_soft_emb_norm",
    # as Ollama's converter calls them, in one file with the text
    "v.patch_embedding": "vision_tower.embeddings.patch_embedding",
    "v.position_embedding": "vision_tower.embeddings.position_embedding",
    "v.post_layernorm": "vision_tower.post_layernorm",
    "mm.mm_soft_emb_norm": "multi_modal_projector.mm_soft_emb_norm",
}
_ID_ROWS = ("language_model.embed_tokens.weight", "lm_head.weight")  # a row for each id
_PROJECTION = "multi_modal_projector.mm_input_projection_weight"
# What the converter stores as 1 + w: the Gemma norms, not SigLIP's.
_SHIFTED = re.compile(r"language_model\..*norm\.weight|multi_modal_projector\.mm_soft_emb_norm\.weight")


def read_tensors(
    header: GGUFHeader, projector: GGUFHeader | None, config: Config, dtype: mx.Dtype, shard: Shard = WHOLE
) -> dict[str, mx.array]:
    """Every tensor by canonical name, packed where the file is, with all floats in dtype; evaluated, one after another.

    float32 rounds nothing: types that MLX cannot pack without loss are floats then, otherwise 8 bits (GGUFStore).

    Args:
        shard: the part of each tensor that is kept.

    Raises:
        CheckpointError: as GGUFStore, or a file that is cut off while it is read.
    """
    store = GGUFStore(header, projector, config, exact=dtype == mx.float32, measure=False)
    tensors: dict[str, mx.array] = {}
    for entry in store.entries:
        parts = store.read(entry)
        for name, array in parts.items():
            part = shard.own(name, array, config.text)
            parts[name] = part.astype(dtype) if mx.issubdtype(part.dtype, mx.floating) else part
        mx.eval(parts)  # what has another dtype in the file goes before the next tensor comes
        tensors |= parts
    return tensors


class Requantised(NamedTuple):
    """What a matrix lost that MLX can pack only anew."""

    kind: str  # its ggml type
    relative_rms: float  # sqrt(sum of squared errors / sum of squares)
    largest: float  # error of one number, in the units of the weights


@dataclass(frozen=True)
class _Place:
    path: Path
    tensor: GGUFTensor
    kind: BlockType


class GGUFStore:
    """A text file and, where there is one, its vision part. See contents.Store.

    Packed matrices come with float32 scales and biases; numbers of types that MLX has no packing for as float32.

    Args:
        exact: nothing is rounded: matrices of Q2_K, Q3_K and Q6_K, which can only be packed anew (gguf_blocks.py), are
            float32 instead.
        measure: fill `requantised` while reading; costs as much as reading those matrices again.

    Raises:
        CheckpointError: cut off, a tensor of a type that the gguf package does not dequantise, or given twice.
    """

    def __init__(
        self,
        header: GGUFHeader,
        projector: GGUFHeader | None,
        config: Config,
        *,
        exact: bool = False,
        measure: bool = True,
    ) -> None:
        self._config, self._measure = config, measure
        self._places: dict[str, _Place] = {}
        self._sums: dict[str, tuple[float, float, float]] = {}
        entries = []
        for part in (header, projector) if projector is not None else (header,):
            kinds = _check_kinds(part)
            names = _canonical_names(part, config)
            for tensor in part.tensors:
                name, kind = names[tensor.name], kinds[tensor.kind]
                if name == "lm_head.weight" and config.tie_word_embeddings:  # a copy of the embedding: head.py
                    continue
                if name in self._places:
                    raise CheckpointError(f"{part.path}: {tensor.name}", got="two of them", want="each tensor once")
                self._places[name] = _Place(tensor.path, tensor, kind)
                packing = kind.packing if _is_matrix(name, tensor.shape) and (kind.exact or not exact) else None
                nbytes = math.prod(tensor.shape) // kind.values * kind.nbytes
                entries.append(Entry(name, self._shape(name, tensor.shape), kind.name, packing, nbytes))
        self.entries: Sequence[Entry] = tuple(entries)

    @property
    def requantised(self) -> dict[str, Requantised]:
        """By name, what `read` has packed anew so far."""
        return {
            name: Requantised(self._places[name].kind.name, math.sqrt(errors / squares) if squares else 0.0, largest)
            for name, (squares, errors, largest) in self._sums.items()
        }

    def read(self, entry: Entry, start: int = 0, stop: int | None = None) -> dict[str, mx.array]:
        """See `Store.read`."""
        if entry.packing is None:
            return {entry.name: self._floats(entry, start, stop)}
        parts = self._rows(entry, range(*slice(start, stop).indices(entry.shape[0])), packed=True)
        if self._measure and not self._places[entry.name].kind.exact:
            self._add_errors(entry.name, entry.packing, parts, self._floats(entry, start, stop))
        path = entry.name.removesuffix(".weight")
        return dict(zip((entry.name, f"{path}.scales", f"{path}.biases"), parts, strict=True))

    def _floats(self, entry: Entry, start: int, stop: int | None) -> mx.array:
        """The numbers themselves: float32, or float16 and bfloat16 where they are stored so."""
        name, tensor = entry.name, self._places[entry.name].tensor
        if _is_matrix(name, tensor.shape):
            return self._rows(entry, range(*slice(start, stop).indices(entry.shape[0])), packed=False)[0]
        place = self._places[name]
        values = empty_rows(place.kind, 1, math.prod(tensor.shape), packed=False)
        read_rows(place.path, tensor.offset, place.kind, [np.asarray(values[0])], packed=False)
        array = _numbers(place.kind, values[0]).reshape(tensor.shape)
        if _SHIFTED.fullmatch(name):
            array = array.astype(mx.float32) - 1.0
        elif name == PATCH_WEIGHT:
            array = channels_last(array)
        elif array.shape != entry.shape:
            array = array.T
        array = mx.contiguous(array[start:stop])
        mx.eval(array)
        return array

    def _rows(self, entry: Entry, rows: range, *, packed: bool) -> list[mx.array]:
        """Rows of a matrix. Ids that the converter dropped get the row of <pad>, so none ever outranks it.

        Image tokens' own rows are never seen: the pictures' rows replace them.
        """
        place, width = self._places[entry.name], entry.shape[1]
        row_bytes, own = width // place.kind.values * place.kind.nbytes, place.tensor.shape[0]
        arrays = empty_rows(place.kind, len(rows), width, packed=packed)
        views = [np.asarray(array) for array in arrays]
        there = max(0, min(rows.stop, own) - rows.start)
        for first, source, count in (
            (0, rows.start, there),
            (there, self._config.pad_token_id, min(1, len(rows) - there)),
        ):
            out = [view[first : first + count] for view in views]
            read_rows(place.path, place.tensor.offset + source * row_bytes, place.kind, out, packed=packed)
        for view in views:
            view[there + 1 :] = view[there : there + 1]
        return arrays if packed else [_numbers(place.kind, arrays[0])]

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A tensor's shape in the model."""
        if name == PATCH_WEIGHT and len(shape) == 4 and shape[1] == 3:
            return (shape[0], *shape[2:], 3)
        vision = self._config.vision
        if name == _PROJECTION and vision is not None and shape[0] != vision.hidden_size:
            return shape[::-1]
        if name in _ID_ROWS:
            return (max(shape[0], self._config.text.vocab_size), *shape[1:])
        return shape

    def _add_errors(self, name: str, packing: Packing, parts: list[mx.array], floats: mx.array) -> None:
        weight, scales, biases = parts
        values = mx.dequantize(weight, scales, biases, group_size=packing.group_size, bits=packing.bits)
        errors = np.abs(np.asarray(values - floats))
        squares, squared, largest = self._sums.get(name, (0.0, 0.0, 0.0))
        self._sums[name] = (
            squares + float(np.square(np.asarray(floats)).sum(dtype=np.float64)),
            squared + float(np.square(errors).sum(dtype=np.float64)),
            max(largest, float(errors.max(initial=0))),
        )


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it belongs to a Linear or an Embedding: what can be packed, and is read by rows."""
    return len(shape) == 2 and name.endswith(".weight")


def _numbers(kind: BlockType, array: mx.array) -> mx.array:
    return array.view(mx.bfloat16) if kind.name == "BF16" else array


def _canonical_names(header: GGUFHeader, config: Config) -> dict[str, str]:
    """GGUF name → canonical name; an unknown one stays as it is, for the strict check to list."""
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    vision = dict(_VISION_PARTS)
    if config.vision is not None:
        # Before llama.cpp's pull request 13290 "down" was the first matrix. Equal sizes are read the new way.
        first, second = config.vision.intermediate_size, config.vision.hidden_size
        if first != second and shapes.get("v.blk.0.ffn_down.weight") == (first, second):
            vision["ffn_down"], vision["ffn_up"] = vision["ffn_up"], vision["ffn_down"]
    names = {}
    for name in shapes:
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"(v\.)?blk\.(\d+)\.([\w.]+)", stem)
        if name in ("mm.input_projection.weight", "mm.mm_input_projection.weight"):
            names[name] = _PROJECTION
        elif stem in _WHOLE:
            names[name] = f"{_WHOLE[stem]}.{kind}"
        elif block and (part := (vision if block[1] else _TEXT_PARTS).get(block[3])):
            tower = "vision_tower.encoder" if block[1] else "language_model"
            names[name] = f"{tower}.layers.{block[2]}.{part}.{kind}"
        else:
            names[name] = name
    return names


def _check_kinds(header: GGUFHeader) -> dict[int, BlockType]:
    """The types by number, once every tensor is known to be readable and inside the file."""
    kinds: dict[int, BlockType] = {}
    spans: dict[Path, list[tuple[int, int, str]]] = {path: [(0, base, "the header")] for path, base in header.files}
    for tensor in header.tensors:
        if tensor.kind not in kinds:
            try:
                kinds[tensor.kind] = block_type(tensor.kind)
            except ValueError as error:
                raise CheckpointError(
                    f"{tensor.path}: {tensor.name}",
                    got=f"ggml type {error}",
                    want="a type that the gguf package dequantises",
                ) from None
        kind = kinds[tensor.kind]
        if not tensor.shape or tensor.shape[-1] % kind.values:
            raise CheckpointError(
                f"{tensor.path}: {tensor.name}",
                got=f"shape {tensor.shape}",
                want=f"rows of a multiple of {kind.values}",
            )
        nbytes = math.prod(tensor.shape) // kind.values * kind.nbytes
        spans[tensor.path].append((tensor.offset, tensor.offset + nbytes, tensor.name))
    for path, places in spans.items():
        size, end = path.stat().st_size, max(stop for _, stop, _ in places)
        if size < end:
            raise CheckpointError(f"{path}", got=f"{size} bytes", want=end, do="it is cut off: fetch it again")
        for before, after in pairwise(sorted(places)):
            if after[0] < before[1]:
                raise CheckpointError(f"{path}: {after[2]}", got=f"the bytes of {before[2]}", want="its own")
    return kinds

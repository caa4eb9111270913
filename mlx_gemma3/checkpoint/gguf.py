"""GGUF files: a text model, and the vision part (mmproj) that llama.cpp keeps in a second file.

Owns the settings that become a Config, the tensor names, and dequantising every tensor to floats. Knows nothing of
the vocabulary (prompt/tokenizer.py reads it from the same file).

Sources: llama.cpp's converter (conversion/gemma.py, gguf-py/gguf/tensor_mapping.py), its graphs (src/models/gemma3.cpp,
tools/mtmd/models/siglip.cpp) and pull request 13290 (the two namings of the vision MLP).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..config import Config
from ..errors import CheckpointError, ConfigError
from ..gguf_header import GGUFHeader, GGUFTensor
from .tensors import PATCH_WEIGHT, channels_last

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
}
_WHOLE = {
    "token_embd": "language_model.embed_tokens",
    "output_norm": "language_model.norm",
    "output": "lm_head",
    "v.patch_embd": "vision_tower.embeddings.patch_embedding",
    "v.position_embd": "vision_tower.embeddings.position_embedding",
    "v.post_ln": "vision_tower.post_layernorm",
    "mm.soft_emb_norm": "multi_modal_projector.mm_soft_emb_norm",
}
_PROJECTION = "multi_modal_projector.mm_input_projection_weight"
# What the converter stores as 1 + w: the Gemma norms, not SigLIP's.
_SHIFTED = re.compile(r"language_model\..*norm\.weight|multi_modal_projector\.mm_soft_emb_norm\.weight")

# Layers of 4B, 12B and 27B, whose global layers the reference runs with positions / 8. Files by llama.cpp's converter
# say so; those by early versions of Ollama leave it out, and llama.cpp then runs them unscaled.
_SCALED_LAYERS = (34, 48, 62)
_LAYERS_27B = 62
_VOCAB_WITH_IMAGES = 262208
_PIECE = 1 << 17  # values dequantised at once: the temporaries of one piece stay in the processor's cache


def read_config(header: GGUFHeader, projector: GGUFHeader | None = None) -> Config:
    """The settings of a text file and, where there is one, its vision part.

    What GGUF does not say is what llama.cpp takes for granted: every sixth layer global, local theta 10,000, and
    query_pre_attn_scalar = head_dim but for 27B, where it is hidden / heads.

    Raises:
        ConfigError: another architecture, a setting missing or out of range.
    """
    settings = _Settings(header, "gemma3")
    architecture = header.settings.get("general.architecture")
    if architecture != "gemma3":
        do = "this program runs Gemma 3 only" if architecture != "clip" else "give the text model beside it"
        raise ConfigError(f"{header.path}: general.architecture", got=repr(architecture), want="'gemma3'", do=do)
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{header.path}", got="no token_embd.weight", want="a Gemma 3 text model")
    layers, width, heads = (settings[key] for key in ("block_count", "embedding_length", "attention.head_count"))
    head_dim = settings.get("attention.key_length", 256)
    context = settings.get("context_length", 131072)
    window = settings.get("attention.sliding_window", 0)
    if not window and settings.get("final_logit_softcapping", 0.0):
        raise ConfigError(f"{header.path}: final_logit_softcapping", got="set", want="none, as in Gemma 3")
    text = {
        "model_type": "gemma3_text",
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": width,
        "intermediate_size": settings["feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": settings.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "query_pre_attn_scalar": width / heads if layers == _LAYERS_27B else head_dim,
        "sliding_window": window or context,
        "sliding_window_pattern": 6 if window else 1,
        "rope_theta": settings.get("rope.freq_base", settings.get("rope.global.freq_base", 1e6)),
        "rope_local_base_freq": settings.get("rope.freq_base_swa", settings.get("rope.local.freq_base", 1e4)),
        "rope_scaling": _rope_scaling(settings, layers),
        "rms_norm_eps": settings.get("attention.layer_norm_rms_epsilon", 1e-6),
        "max_position_embeddings": context,
    }
    vocabulary = _Settings(header, "tokenizer.ggml")
    eos = [vocabulary.get(key, None) for key in ("eos_token_id", "eot_token_id")]
    top = {
        "bos_token_id": vocabulary.get("bos_token_id", 2),
        "pad_token_id": vocabulary.get("padding_token_id", 0),
        "eos_token_id": list(dict.fromkeys(token for token in (*eos, 1, 106) if token is not None)),
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    if projector is None:
        return Config.from_dict({**text, **top})
    return Config.from_dict({**_image_settings(header, projector, text), **top})


def _rope_scaling(settings: _Settings, layers: int) -> dict[str, Any] | None:
    kind, factor = settings.get("rope.scaling.type", None), settings.get("rope.scaling.factor", None)
    if kind is None and factor is None:
        return {"rope_type": "linear", "factor": 8.0} if layers in _SCALED_LAYERS else None
    if kind == "none" or factor is None:
        return None
    return {"rope_type": kind or "linear", "factor": factor}


def _image_settings(header: GGUFHeader, projector: GGUFHeader, text: dict[str, Any]) -> dict[str, Any]:
    vision = _Settings(projector, "clip.vision")
    image, patch = vision["image_size"], vision["patch_size"]
    tokens = header.settings.get("tokenizer.ggml.tokens") or []
    ids = {
        key: tokens.index(piece) if piece in tokens else published
        for key, piece, published in (
            ("boi_token_index", "<start_of_image>", 255999),
            ("eoi_token_index", "<end_of_image>", 256000),
            ("image_token_index", "<image_soft_token>", 262144),
        )
    }
    if ids["image_token_index"] >= text["vocab_size"]:  # the converter drops the rows that the vocabulary lacks
        text = {**text, "vocab_size": _VOCAB_WITH_IMAGES}
    side = image // patch // vision.get("projector.scale_factor", 4)
    return {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": vision["embedding_length"],
            "intermediate_size": vision["feed_forward_length"],
            "num_hidden_layers": vision["block_count"],
            "num_attention_heads": vision["attention.head_count"],
            "image_size": image,
            "patch_size": patch,
            "layer_norm_eps": vision.get("attention.layer_norm_epsilon", 1e-6),
        },
        "mm_tokens_per_image": side * side,
        **ids,
    }


class _Settings:
    """One file's settings under a prefix; float32 values as the decimal numbers they were written as."""

    def __init__(self, header: GGUFHeader, prefix: str) -> None:
        self.header, self.prefix = header, prefix

    def __getitem__(self, key: str) -> Any:
        if (value := self.get(key, None)) is None:
            raise ConfigError(f"{self.header.path}: {self.prefix}.{key}", got="nothing", want="a value")
        return value

    def get(self, key: str, default: Any) -> Any:
        value = self.header.settings.get(f"{self.prefix}.{key}", default)
        return float(str(np.float32(value))) if isinstance(value, float) else value


def find_projector(header: GGUFHeader) -> GGUFHeader | None:
    """The vision part of a text file: a .gguf called …mmproj… in the same folder, made for a decoder of this width.

    Of several, the one that rounds least: bf16 (as published), then f32, f16, the others.
    """

    def by_precision(path: Path) -> tuple[int, str]:
        name = path.name.lower()
        return next((place for place, kind in enumerate(("bf16", "f32", "f16")) if kind in name), 3), name

    found = [path for path in header.path.parent.glob("*.gguf") if "mmproj" in path.name.lower()]
    for path in sorted(found, key=by_precision):
        candidate = GGUFHeader.read(path)
        kind = candidate.settings.get("clip.projector_type") or candidate.settings.get("clip.vision.projector_type")
        shapes = {tensor.name: tensor.shape for tensor in candidate.tensors}
        width = header.settings.get("gemma3.embedding_length")
        if kind == "gemma3" and width in shapes.get("mm.input_projection.weight", ()):
            return candidate
    return None


def read_tensors(
    header: GGUFHeader, projector: GGUFHeader | None, config: Config, dtype: mx.Dtype
) -> dict[str, mx.array]:
    """Every tensor by canonical name, dequantised in float32 and rounded to dtype; evaluated, one after another.

    Raises:
        CheckpointError: cut off, or a tensor of a type that the gguf package does not dequantise.
    """
    tensors: dict[str, mx.array] = {}
    for part in (header, projector) if projector is not None else (header,):
        names = _canonical_names(part, config)
        for tensor, array in _dequantised(part):
            name = names[tensor.name]
            if _SHIFTED.fullmatch(name):
                array = array.astype(mx.float32) - 1.0
            elif name == PATCH_WEIGHT:
                array = channels_last(array)
            elif name == _PROJECTION and config.vision is not None:
                array = array if array.shape[0] == config.vision.hidden_size else array.T
            elif name in ("language_model.embed_tokens.weight", "lm_head.weight"):
                array = _with_image_rows(array, config)
            tensors[name] = array = array.astype(dtype)
            mx.eval(array)  # the float32 values go before the next tensor's come
    return tensors


def _with_image_rows(weight: mx.array, config: Config) -> mx.array:
    """(rows, D) → (V, D): the ids that the converter dropped get the row of <pad>, so none ever outranks it.

    Image tokens' own rows are never seen: the pictures' rows replace them.
    """
    lacking = config.text.vocab_size - weight.shape[0]
    if lacking <= 0:
        return weight
    pad = weight[config.pad_token_id : config.pad_token_id + 1]
    return mx.concatenate([weight, mx.repeat(pad, lacking, axis=0)])


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
        block = re.fullmatch(r"(v\.)?blk\.(\d+)\.(\w+)", stem)
        if name == "mm.input_projection.weight":
            names[name] = _PROJECTION
        elif stem in _WHOLE:
            names[name] = f"{_WHOLE[stem]}.{kind}"
        elif block and (part := (vision if block[1] else _TEXT_PARTS).get(block[3])):
            tower = "vision_tower.encoder" if block[1] else "language_model"
            names[name] = f"{tower}.layers.{block[2]}.{part}.{kind}"
        else:
            names[name] = name
    return names


def _dequantised(header: GGUFHeader) -> Iterator[tuple[GGUFTensor, mx.array]]:
    """Each tensor of one file as floats, in file order; one tensor is in memory at a time.

    Pieces of a tensor are dequantised side by side: NumPy lets go of the interpreter lock in each step.
    """
    sizes = _check_sizes(header)
    data = np.memmap(header.path, mode="r", dtype=np.uint8)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for tensor in header.tensors:
            block, block_bytes = sizes[tensor.kind]
            count = math.prod(tensor.shape) // block
            raw = data[tensor.offset : tensor.offset + count * block_bytes]
            yield tensor, _floats(raw, tensor, block, block_bytes, pool)


def _floats(raw: np.ndarray, tensor: GGUFTensor, block: int, block_bytes: int, pool: ThreadPoolExecutor) -> mx.array:
    from gguf.constants import GGMLQuantizationType as Kind
    from gguf.quants import dequantize

    kind = Kind(tensor.kind)
    if kind == Kind.BF16:
        return mx.array(raw.view("<u2").reshape(tensor.shape)).view(mx.bfloat16)
    if kind in (Kind.F32, Kind.F16):
        return mx.array(raw.view("<f4" if kind == Kind.F32 else "<f2").reshape(tensor.shape))
    values = np.empty(math.prod(tensor.shape), dtype=np.float32)
    count, step = len(raw) // block_bytes, max(1, _PIECE // block)

    def fill(start: int) -> None:
        stop = min(start + step, count)
        # One long row: the package walks rows in Python, and a block knows nothing of the row that it is in.
        piece = dequantize(raw[start * block_bytes : stop * block_bytes].reshape(1, -1), kind)
        values[start * block : stop * block] = piece.reshape(-1)

    for _ in pool.map(fill, range(0, count, step)):
        pass
    return mx.array(values.reshape(tensor.shape))


def _check_sizes(header: GGUFHeader) -> Mapping[int, tuple[int, int]]:
    """(values, bytes) of a block by type, once every tensor is known to be readable and inside the file."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    sizes: dict[int, tuple[int, int]] = {}
    end = header.header_bytes
    for tensor in header.tensors:
        if tensor.kind not in sizes:
            try:
                kind = GGMLQuantizationType(tensor.kind)
                sizes[tensor.kind] = GGML_QUANT_SIZES[kind]
                dequantize(np.zeros((1, sizes[tensor.kind][1]), dtype=np.uint8), kind)
            except (ValueError, KeyError, NotImplementedError):
                known = {entry.value: entry.name for entry in GGMLQuantizationType}
                raise CheckpointError(
                    f"{header.path}: {tensor.name}",
                    got=f"ggml type {known.get(tensor.kind, tensor.kind)}",
                    want="a type that the gguf package dequantises",
                ) from None
        block, block_bytes = sizes[tensor.kind]
        if not tensor.shape or tensor.shape[-1] % block:
            raise CheckpointError(
                f"{header.path}: {tensor.name}", got=f"shape {tensor.shape}", want=f"rows of a multiple of {block}"
            )
        end = max(end, tensor.offset + math.prod(tensor.shape) // block * block_bytes)
    if (size := header.path.stat().st_size) < end:
        raise CheckpointError(f"{header.path}", got=f"{size} bytes", want=end, do="it is cut off: fetch it again")
    return sizes

"""Tiny GGUF files, written as llama.cpp's converter writes them: a text part, and a vision part (mmproj).

    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", config, tensors, kind="Q8_0")
    tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", config, tensors)

`config` and `tensors` are those of tiny.py. The name tables stand here a second time on purpose: those of the loader
are what the tests check.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import tiny_tokenizer
from tiny import Tensors

from mlx_gemma3.checkpoint.gguf import GGUFStore
from mlx_gemma3.checkpoint.load import fitted_model, open_checkpoint
from mlx_gemma3.checkpoint.source import Source
from mlx_gemma3.config import Config
from mlx_gemma3.model.gemma3 import Gemma3
from mlx_gemma3.prompt.vocabulary import CONTROL_NAMES

SHIFTED = re.compile(r"language_model\..*norm\.weight|mm_soft_emb_norm")  # stored as 1 + w

_TEXT = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_VISION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_WHOLE = {
    "language_model.embed_tokens.weight": "token_embd.weight",
    "language_model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "vision_tower.embeddings.position_embedding.weight": "v.position_embd.weight",
    "multi_modal_projector.mm_input_projection_weight": "mm.input_projection.weight",
    "multi_modal_projector.mm_soft_emb_norm.weight": "mm.soft_emb_norm.weight",
} | {
    f"vision_tower.{ours}.{kind}": f"v.{theirs}.{kind}"
    for ours, theirs in (("embeddings.patch_embedding", "patch_embd"), ("post_layernorm", "post_ln"))
    for kind in ("weight", "bias")
}


def gguf_name(name: str) -> str:
    """llama.cpp's name (since May 2025) for a canonical one."""
    if name in _WHOLE:
        return _WHOLE[name]
    if name.startswith("dense"):  # an embedding model's, named by the test
        return name
    vision = name.startswith("vision_tower.")
    layer, rest = name.partition("layers.")[2].split(".", 1)
    part, _, kind = rest.rpartition(".")
    return f"{'v.' if vision else ''}blk.{layer}.{(_VISION if vision else _TEXT)[part]}.{kind}"


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    kind: str = "F32",
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the text part as llama.cpp's converter does: Gemma's norms as 1 + w, matrices in one ggml type.

    Args:
        settings: more settings by full name, or other values; None leaves one out.
    """
    text = config.get("text_config", config)
    scaling = text["rope_scaling"]
    values: dict[str, Any] = {
        "gemma3.context_length": text["max_position_embeddings"],
        "gemma3.embedding_length": text["hidden_size"],
        "gemma3.block_count": text["num_hidden_layers"],
        "gemma3.feed_forward_length": text["intermediate_size"],
        "gemma3.attention.head_count": text["num_attention_heads"],
        "gemma3.attention.head_count_kv": text["num_key_value_heads"],
        "gemma3.attention.key_length": text["head_dim"],
        "gemma3.attention.layer_norm_rms_epsilon": text["rms_norm_eps"],
        "gemma3.attention.sliding_window": text["sliding_window"],
        "gemma3.rope.freq_base": text["rope_theta"],
        "gemma3.rope.scaling.type": "linear" if scaling else None,
        "gemma3.rope.scaling.factor": scaling["factor"] if scaling else None,
        "tokenizer.ggml.tokens": gguf_tokens(config),
        "tokenizer.ggml.eos_token_id": 1,
    }
    part = {name: array for name, array in tensors.items() if not name.startswith(("vision_", "multi_modal_"))}
    return write_gguf_file(path, "gemma3", values | dict(settings or {}), part, kind)


def gguf_tokens(config: Mapping[str, Any]) -> list[str]:
    """Names for the vocabulary's ids; only the image tokens matter to the loader."""
    tokens = [f"<unused{index}>" for index in range(config.get("text_config", config)["vocab_size"])]
    for key, piece in (("boi", "<start_of_image>"), ("eoi", "<end_of_image>"), ("image", "<image_soft_token>")):
        if (index := config.get(f"{key}_token_index")) is not None:
            tokens[index] = piece
    return tokens


def write_mmproj(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    kind: str = "F32",
    swapped: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the vision part as llama.cpp keeps it. `swapped`: fc1 is ffn_down, as before May 2025."""
    vision = config["vision_config"]
    grid = vision["image_size"] // vision["patch_size"]
    values: dict[str, Any] = {
        "clip.projector_type": "gemma3",
        "clip.has_vision_encoder": True,
        "clip.vision.image_size": vision["image_size"],
        "clip.vision.patch_size": vision["patch_size"],
        "clip.vision.embedding_length": vision["hidden_size"],
        "clip.vision.feed_forward_length": vision["intermediate_size"],
        "clip.vision.block_count": vision["num_hidden_layers"],
        "clip.vision.attention.head_count": vision["num_attention_heads"],
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.projector.scale_factor": grid // int(config["mm_tokens_per_image"] ** 0.5),
    }
    part = {name: array for name, array in tensors.items() if name.startswith(("vision_", "multi_modal_"))}
    swap = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"} if swapped else None
    return write_gguf_file(path, "clip", values | dict(settings or {}), part, kind, swap)


def write_gguf_file(
    path: Path,
    architecture: str,
    settings: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kind: str,
    swap: Mapping[str, str] | None = None,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in settings.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, array in tensors.items():
        ours = gguf_name(name)
        for part, other in (swap or {}).items():
            if f".{part}." in ours:
                ours = ours.replace(part, other)
                break
        if SHIFTED.search(name):
            array = array + np.float32(1)
        quantised = gguf_type(kind, name, array)
        raw = array if quantised.name == "F32" else gguf_blocks(quantised, name, array)
        writer.add_tensor(ours, np.ascontiguousarray(raw), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_type(kind: str, name: str, array: np.ndarray) -> Any:
    """The ggml type of one tensor: vectors, convolutions and rows that no block divides stay F32."""
    wanted = gguf.GGMLQuantizationType[kind]
    block = gguf.constants.GGML_QUANT_SIZES[wanted][0]
    plain = array.ndim != 2 or array.shape[-1] % block or "position_embedding" in name
    return gguf.GGMLQuantizationType.F32 if plain else wanted


def gguf_blocks(kind: Any, name: str, array: np.ndarray) -> np.ndarray:
    """A matrix in one ggml type, (rows, bytes). K-quants, which the package only reads, are random blocks instead."""
    try:
        blocks: np.ndarray = gguf.quants.quantize(array, kind)
    except NotImplementedError:
        values = gguf.constants.GGML_QUANT_SIZES[kind][0]
        random = np.random.default_rng(zlib.crc32(name.encode()))
        scale = 2 / np.sqrt(array.shape[1]) * random.choice((-1, 1), array.size // values)
        return random_blocks(kind.name, scale, random).reshape(len(array), -1)
    return blocks


# Where a block's float16 scales are, and how many times the first the numbers' size is (their largest over two).
_SCALES = {
    "Q4_0": ((0,), 4), "Q4_1": ((0, 2), 4), "Q5_0": ((0,), 8), "Q5_1": ((0, 2), 8), "Q8_0": ((0,), 64),
    "Q2_K": ((80, 82), 23), "Q3_K": ((108,), 64), "Q4_K": ((0, 2), 472), "Q5_K": ((0, 2), 976), "Q6_K": ((208,), 2048),
}  # fmt: skip
# The second scale, as many times the first, that puts the numbers' middle near zero: -dmin * m or + m.
_MIDDLES = {"Q4_1": -7.5, "Q5_1": -15.5, "Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}


def random_blocks(kind: str, size: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Blocks of random bytes whose scales are finite: numbers of about these sizes (n) → (n, bytes) uint8."""
    offsets, factor = _SCALES[kind]
    blocks = random.integers(0, 256, (len(size), gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]), np.uint8)
    first = np.asarray(size, np.float32) / factor
    for at, scale in zip(offsets, (first, first * _MIDDLES.get(kind, 0)), strict=False):
        blocks[:, at : at + 2] = scale.astype(np.float16)[:, None].view(np.uint8)
    return blocks


def gguf_floats(tensors: Mapping[str, np.ndarray], kind: str) -> Tensors:
    """The floats that `write_gguf` and `write_mmproj` store for these tensors in that type."""
    floats = {}
    for name, array in tensors.items():
        quantised = gguf_type(kind, name, array)
        plain = quantised.name == "F32"
        floats[name] = array if plain else gguf.quants.dequantize(gguf_blocks(quantised, name, array), quantised)
    return floats


def open_store(path: Path, **options: Any) -> GGUFStore:
    checkpoint = open_checkpoint(Source("x", path))
    assert checkpoint.gguf is not None
    return GGUFStore(*checkpoint.gguf, checkpoint.config, **options)


def plain_model(store: GGUFStore, config: Config) -> Gemma3:
    """The model of a file with every matrix unpacked to float32."""
    tensors = {}
    for entry in store.entries:
        weight, *rest = store.read(entry).values()
        if entry.packing:
            weight = mx.dequantize(weight, *rest, group_size=entry.packing.group_size, bits=entry.packing.bits)
        tensors[entry.name] = weight.astype(mx.float32)
    model = fitted_model(config, tensors, where=Path())
    model.load_weights(list(tensors.items()))
    return model


def vocabulary_settings(pieces: Sequence[str]) -> dict[str, Any]:
    """The settings of a SentencePiece vocabulary, as llama.cpp's converter writes them."""
    kinds = [
        6 if re.fullmatch(r"<0x..>", piece)
        else 3 if piece in CONTROL_NAMES
        else 4 if piece in tiny_tokenizer.PLACES.values() or piece.startswith("<unused")
        else 1
        for piece in pieces
    ]  # fmt: skip
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.tokens": list(pieces),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [float(-place) for place in range(len(pieces))],
        "tokenizer.ggml.bos_token_id": 2,
    }


def split(path: Path, folder: Path, count: int, *, empty_first: bool = False) -> list[Path]:
    """The file in `count` parts as llama-gguf-split writes it; `empty_first`: and one before them without tensors."""
    folder.mkdir(parents=True)
    reader = gguf.GGUFReader(path)
    tensors = list(reader.tensors)
    groups = [tensors[len(tensors) * n // count : len(tensors) * (n + 1) // count] for n in range(count)]
    groups = [[], *groups] if empty_first else groups
    paths = []
    for number, group in enumerate(groups):
        paths.append(folder / f"{path.stem}-{number + 1:05}-of-{len(groups):05}.gguf")
        writer = gguf.GGUFWriter(paths[-1], "gemma3")
        if number:
            del writer.kv_data[0]["general.architecture"]
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", len(groups))
        writer.add_int32("split.tensors.count", len(tensors))
        for field in reader.fields.values() if not number else ():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                kinds = field.types
                writer.add_key_value(field.name, field.contents(), kinds[0], sub_type=kinds[-1] if kinds[1:] else None)
        for tensor in group:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        _close(writer)
    return paths


_OLLAMA = {
    "self_attn.out_proj": "attn_output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
}


def write_ollama(text: Path, path: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    """Both parts in one file, the vision part under the names and settings of Ollama's converter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    reader, vision = gguf.GGUFReader(text), config["vision_config"]
    writer = gguf.GGUFWriter(path, "gemma3")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kinds = field.types
            writer.add_key_value(field.name, field.contents(), kinds[0], sub_type=kinds[-1] if kinds[1:] else None)
    for key, value in (
        ("vision.block_count", vision["num_hidden_layers"]),
        ("vision.embedding_length", vision["hidden_size"]),
        ("vision.feed_forward_length", vision["intermediate_size"]),
        ("vision.image_size", vision["image_size"]),
        ("vision.patch_size", vision["patch_size"]),
        ("vision.num_channels", 3),
        ("vision.attention.head_count", vision["num_attention_heads"]),
        ("mm.tokens_per_image", config["mm_tokens_per_image"]),
    ):
        writer.add_uint32(f"gemma3.{key}", value)
    writer.add_float32("gemma3.vision.attention.layer_norm_epsilon", 1e-6)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, array in tensors.items():
        if name.startswith(("vision_", "multi_modal_")):
            stored = array + np.float32(1) if SHIFTED.search(name) else array
            kind = gguf_type("F16", name, array)
            raw = stored if kind.name == "F32" else gguf_blocks(kind, name, stored)
            writer.add_tensor(_ollama_name(name), np.ascontiguousarray(raw), raw_dtype=kind)
    _close(writer)
    return path


def _ollama_name(name: str) -> str:
    if name.startswith("multi_modal_projector."):
        return name.replace("multi_modal_projector", "mm").replace("projection_weight", "projection.weight")
    name = name.replace("vision_tower.embeddings", "v").replace("vision_tower", "v").replace("encoder.layers", "blk")
    for ours, theirs in _OLLAMA.items():
        name = name.replace(ours, theirs)
    return name


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

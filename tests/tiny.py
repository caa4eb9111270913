"""Tiny random Gemma 3 checkpoints on disk, for every test that needs one, in each naming style.

    tensors = tiny.random_tensors(tiny.image_config())        # canonical names, the Hub's shapes, float32
    folder = tiny.write_folder(tmp_path, tiny.image_config(), tensors, style="mlx-vlm", packing={"bits": 4, …})

`text_config` and `image_config` are plain config.json objects; keyword arguments change their (text) settings.
tiny_gguf.py writes the same tensors as GGUF.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

Tensors = dict[str, np.ndarray]

# Published names by style; what a style leaves out has the canonical name. "text" is the Hub's 270M and 1B, "hub" its
# 4B to 27B and what mlx-lm writes for them, "mlx-vlm" also stores the patch convolution channels last.
STYLES: dict[str, dict[str, str]] = {
    "canonical": {},
    "text": {"language_model.": "model."},
    "hub": {
        "language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "vision_tower.": "vision_tower.vision_model.",
    },
    "transformers-4": {
        "language_model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "transformers-5": {
        "language_model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}
STYLES["mlx-vlm"] = STYLES["hub"]
PATCH_WEIGHT = "vision_tower.embeddings.patch_embedding.weight"
GENERATION = {"bos_token_id": 2, "do_sample": True, "eos_token_id": [1, 106], "pad_token_id": 0, "top_k": 64}


def text_config(**changes: Any) -> dict[str, Any]:
    """config.json of a text-only checkpoint: 8 layers, the sixth global, window 16."""
    return {
        "model_type": "gemma3_text",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 1024,
        "eos_token_id": [1, 106],
    } | changes


def image_config(**changes: Any) -> dict[str, Any]:
    """config.json with a vision tower: pictures of 56 by 56, 4 rows each; ids 500 to 502 are the image tokens.

    The tower's MLP width 80 divides by no group size, as SigLIP's 4304 does not.
    """
    return {
        "model_type": "gemma3",
        "boi_token_index": 500,
        "eoi_token_index": 501,
        "image_token_index": 502,
        "mm_tokens_per_image": 4,
        "eos_token_id": [1, 106],
        "text_config": text_config(rope_scaling={"rope_type": "linear", "factor": 8.0}) | changes,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


def random_tensors(config: Mapping[str, Any], *, seed: int = 0) -> Tensors:
    """Every tensor of a checkpoint by canonical name, in the Hub's shapes, float32."""
    random = np.random.default_rng(seed)
    return {name: _random(random, name, shape) for name, shape in tensor_shapes(config).items()}


def _random(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Norm weights around 0, SigLIP's around 1; matrices that keep the size of what they multiply."""
    values = random.standard_normal(shape)
    if len(shape) == 1:
        values = 0.2 * values + (1 if "layer_norm" in name or "post_layernorm.weight" in name else 0)
    else:
        values /= np.sqrt(shape[0] if "projection_weight" in name else np.prod(shape[1:]))
    return values.astype(np.float32)


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    text = config.get("text_config", config)
    width, inner, head = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"language_model.embed_tokens.weight": (text["vocab_size"], width)}
    for layer in range(text["num_hidden_layers"]):
        parts = {
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "self_attn.q_norm": (head,),
            "self_attn.k_norm": (head,),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
            "pre_feedforward_layernorm": (width,),
            "post_feedforward_layernorm": (width,),
        }
        shapes |= {f"language_model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    shapes["language_model.norm.weight"] = (width,)
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (text["vocab_size"], width)
    if "vision_config" in config:
        shapes |= _vision_shapes(config["vision_config"], width)
    return shapes


def _vision_shapes(vision: Mapping[str, Any], width: int) -> dict[str, tuple[int, ...]]:
    size, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    parts: dict[str, tuple[int, ...]] = {"embeddings.patch_embedding": (size, 3, patch, patch)}
    for layer in range(vision["num_hidden_layers"]):
        at = f"encoder.layers.{layer}"
        parts |= {f"{at}.self_attn.{name}_proj": (size, size) for name in ("q", "k", "v", "out")}
        parts |= {f"{at}.mlp.fc1": (inner, size), f"{at}.mlp.fc2": (size, inner)}
        parts |= {f"{at}.layer_norm1": (size,), f"{at}.layer_norm2": (size,)}
    parts["post_layernorm"] = (size,)
    shapes: dict[str, tuple[int, ...]] = {
        "vision_tower.embeddings.position_embedding.weight": ((vision["image_size"] // patch) ** 2, size)
    }
    for part, shape in parts.items():
        shapes |= {f"vision_tower.{part}.weight": shape, f"vision_tower.{part}.bias": shape[:1]}
    shapes["multi_modal_projector.mm_input_projection_weight"] = (size, width)
    shapes["multi_modal_projector.mm_soft_emb_norm.weight"] = (size,)
    return shapes


def published_name(name: str, style: str) -> str:
    for prefix, published in STYLES[style].items():
        if name.startswith(prefix):
            return published + name.removeprefix(prefix)
    return name


def pack(tensors: Mapping[str, np.ndarray], packing: Mapping[str, Any]) -> tuple[dict[str, mx.array], Tensors]:
    """Quantise matrices as MLX does.

    Args:
        packing: bits, group_size and perhaps mode for all, and under a module's canonical path its own, or False.

    Returns:
        The packed tensors, with scales and biases, and the floats that they stand for.
    """
    common = {key: packing[key] for key in ("bits", "group_size", "mode") if key in packing}
    packed: dict[str, mx.array] = {}
    floats: Tensors = {}
    for name, values in tensors.items():
        path, array, floats[name] = name.removesuffix(".weight"), mx.array(values), values
        own = packing.get(path, common)
        fits = values.ndim == 2 and path != name and own and values.shape[1] % own["group_size"] == 0
        if not fits:
            packed[name] = array
            continue
        weight, scales, *biases = mx.quantize(array, **own)
        bias = biases[0] if biases else None
        floats[name] = np.array(mx.dequantize(weight, scales, bias, **own).astype(mx.float32))
        packed |= {f"{path}.weight": weight, f"{path}.scales": scales}
        if bias is not None:
            packed[f"{path}.biases"] = bias
    return packed, floats


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray | mx.array],
    *,
    style: str = "hub",
    shards: int = 1,
    packing: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = GENERATION,
) -> Path:
    """Write config.json, generation_config.json and safetensors (with an index when there are several shards).

    Args:
        packing: what `pack` was given for these (packed) tensors; goes into config.json under the style's names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(config)
    if packing is not None:
        config["quantization"] = {
            published_name(f"{key}.weight", style).removesuffix(".weight"): value for key, value in packing.items()
        }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    arrays = {}
    for name, values in tensors.items():
        array = mx.array(values)
        if style == "mlx-vlm" and name == PATCH_WEIGHT:
            array = array.transpose(0, 2, 3, 1)
        arrays[published_name(name, style)] = mx.contiguous(array)
    save_shards(folder, arrays, shards)
    return folder


def save_shards(folder: Path, arrays: Mapping[str, mx.array], shards: int) -> None:
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), dict(arrays), metadata={"format": "mlx"})
        return
    names, weight_map = list(arrays), dict[str, str]()
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        mx.save_safetensors(str(folder / file), {name: arrays[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

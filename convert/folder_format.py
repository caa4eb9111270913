"""What a written folder looks like: published tensor names, and a config.json that every MLX program reads alike.

Text-only checkpoints are named as the Hub's 270M and 1B (`model.…`), those with vision as its 4B to 27B
(`language_model.model.…`, `vision_tower.vision_model.…`). Settings are written in full and in the older spelling
(`rope_theta`, `rope_scaling`, `sliding_window_pattern`): mlx-lm 0.32 and mlx-vlm 0.7 silently ignore the newer one,
and transformers reads both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_gemma3.checkpoint.entries import Packing
from mlx_gemma3.checkpoint.safetensors import PATCH_WEIGHT
from mlx_gemma3.config import GLOBAL, SHIELD, Config

from .writer import Planned

SHIELD_CLASS = "ShieldGemma2ForImageClassification"
CLASS_KEYS = ("yes_token_index", "no_token_index")


def published_name(name: str, config: Config) -> str:
    """The Hub's name for a canonical one."""
    if config.vision is None:
        return "model." + name.removeprefix("language_model.") if name.startswith("language_model.") else name
    for ours, theirs in (
        ("language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("vision_tower.", "vision_tower.vision_model."),
    ):
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            break
    return name if config.classes is None else f"model.{name}"  # a whole Gemma 3 inside the classifier


def config_json(config: Config, *, dtype: str, packings: Mapping[str, Packing]) -> dict[str, Any]:
    """config.json as an object.

    Args:
        dtype: of the plain tensors, as transformers spells it.
        packings: by canonical module name; the most frequent one is written for all, the others by name.
    """
    text = config.text
    settings: dict[str, Any] = {
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": text.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "model_type": "gemma3_text",
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "query_pre_attn_scalar": _whole(text.query_pre_attn_scalar),
        "rms_norm_eps": text.rms_norm_eps,
        "rope_local_base_freq": _whole(text.rope_local_theta),
        "rope_scaling": None if text.rope_scale == 1 else {"factor": text.rope_scale, "rope_type": "linear"},
        "rope_theta": _whole(text.rope_theta),
        "sliding_window": (text.sliding_window - 1) * 2 if text.bidirectional else text.sliding_window,
        **({"use_bidirectional_attention": True} if text.bidirectional else {}),
        "vocab_size": text.vocab_size,
        **_layer_pattern(config),
    }
    top: dict[str, Any] = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
    }
    if config.vision is None:
        model = "Gemma3TextModel" if text.bidirectional else "Gemma3ForCausalLM"
        out = {"architectures": [model], **settings, **top}
    else:
        vision = config.vision
        out = {
            "architectures": ["Gemma3ForConditionalGeneration" if config.classes is None else SHIELD_CLASS],
            "boi_token_index": config.boi_token_id,
            "eoi_token_index": config.eoi_token_id,
            "image_token_index": config.image_token_id,
            "mm_tokens_per_image": config.mm_tokens_per_image,
            "model_type": "gemma3" if config.classes is None else SHIELD,
            **({} if config.classes is None else dict(zip(CLASS_KEYS, config.classes, strict=True))),
            **top,
            # mlx-lm and mlx-vlm look for these two beside text_config, and for the tokens of a picture inside it.
            "hidden_size": text.hidden_size,
            "vocab_size": text.vocab_size,
            "text_config": settings | {"mm_tokens_per_image": config.mm_tokens_per_image},
            "vision_config": {
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": vision.hidden_size,
                "image_size": vision.image_size,
                "intermediate_size": vision.intermediate_size,
                "layer_norm_eps": vision.layer_norm_eps,
                "model_type": "siglip_vision_model",
                "num_attention_heads": vision.num_attention_heads,
                "num_channels": 3,
                "num_hidden_layers": vision.num_hidden_layers,
                "patch_size": vision.patch_size,
                "vision_use_head": False,
            },
        }
    if packings:
        out["quantization"] = out["quantization_config"] = quantization(config, packings)
    return out


def quantization(config: Config, packings: Mapping[str, Packing]) -> dict[str, Any]:
    """MLX's `quantization` object: the most frequent packing, then each module that differs, by published name."""
    counts: dict[Packing, int] = {}
    for packing in packings.values():
        counts[packing] = counts.get(packing, 0) + 1
    common = max(counts, key=counts.__getitem__)
    others = {
        published_name(f"{module}.weight", config).removesuffix(".weight"): _object(packing)
        for module, packing in packings.items()
        if packing != common
    }
    return _object(common) | others


def _object(packing: Packing) -> dict[str, Any]:
    return {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}


def _layer_pattern(config: Config) -> dict[str, Any]:
    """`sliding_window_pattern` where it says the layers, else `layer_types`, which older programs ignore."""
    layers = config.text.layer_types
    for pattern in range(1, len(layers) + 2):
        if all((kind == GLOBAL) == ((index + 1) % pattern == 0) for index, kind in enumerate(layers)):
            return {"sliding_window_pattern": pattern}
    return {"layer_types": list(layers)}


def _whole(value: float) -> float | int:
    """256 and not 256.0: transformers checks the type."""
    return int(value) if value == int(value) else value


def published_shape(tensor: Planned) -> tuple[int, ...]:
    """The patch convolution is published channels first."""
    if PATCH_WEIGHT.rpartition("vision_tower.")[2] in tensor.name and len(tensor.shape) == 4:
        hidden, height, width, channels = tensor.shape
        return hidden, channels, height, width
    return tensor.shape

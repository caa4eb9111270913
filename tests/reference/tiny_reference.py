"""Tiny random Gemma 3 models in the reference implementation: transformers, eager attention, float32.

Owns the sizes, the weights and the plain way to run a case (the whole sequence anew for every token, no cache, so
that nothing but the model decides). Knows nothing of the cases and of the files; make_model_goldens.py does.
Needs the extra `reference`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PretrainedConfig,
    PreTrainedModel,
)

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

# As the Hub's text-only repositories write it. Heads * head_dim is not hidden_size, sqrt(40) is no bfloat16 number,
# query_pre_attn_scalar is not head_dim, and a pattern of 3 leaves layer 6 alone in a trailing local group.
TEXT_CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 40,
    "initializer_range": 0.02,
    "intermediate_size": 72,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 7,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 20,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 8,
    "sliding_window_pattern": 3,
    "torch_dtype": "float32",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 272,
}

# Sparse, as the Hub's 4B was in 2025-03: no pattern (6), thetas, eps or activation. Layer 5 is global, 6 and 7 trail.
IMAGE_CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 265,
    "eoi_token_index": 266,
    "eos_token_id": [1, 106],
    "image_token_index": 270,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 4,
    "model_type": "gemma3",
    "text_config": {
        "head_dim": 16,
        "hidden_size": 48,
        "intermediate_size": 72,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 8,
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": 24,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 8,
        "vocab_size": 288,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "hidden_size": 36,
        "image_size": 56,
        "intermediate_size": 52,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": 14,
        "vision_use_head": False,
    },
}


def build_text(seed: int) -> Gemma3ForCausalLM:
    """The text-only model, float32 weights."""
    model = Gemma3ForCausalLM(_eager(Gemma3TextConfig(**copy.deepcopy(TEXT_CONFIG))))
    _fill(model, seed, rounded=False)
    return model


def build_image(seed: int) -> Gemma3ForConditionalGeneration:
    """The model with a vision tower. Every weight is a bfloat16 number, so a bfloat16 file holds it without loss."""
    model = Gemma3ForConditionalGeneration(_eager(Gemma3Config(**copy.deepcopy(IMAGE_CONFIG))))
    _fill(model, seed, rounded=True)
    return model


def _eager(config: PretrainedConfig) -> PretrainedConfig:
    config._attn_implementation = "eager"
    config.dtype = "float32"  # that of the file is the Hub's business; a model built in bfloat16 rounds its buffers
    for part in ("text_config", "vision_config"):
        if hasattr(config, part):
            _eager(getattr(config, part))
    return config


def _fill(model: PreTrainedModel, seed: int, *, rounded: bool) -> None:
    """Give every parameter random values, in the order of their names, sized so that each mistake shows.

    Norm weights lie 0.25 to 0.75 away from 0 (1 + w is far from w and from 1), and logits spread by about 3.
    """
    rng = np.random.default_rng(seed)
    parameters = dict(sorted(model.named_parameters()))
    model.float().eval()
    for name, parameter in parameters.items():
        shape = tuple(parameter.shape)
        values = rng.standard_normal(shape)
        if name.endswith("embed_tokens.weight"):
            values *= 2.7 / math.sqrt(shape[1])
        elif name.endswith("norm.weight") or "layer_norm" in name or "layernorm" in name:
            values = np.sign(values) * rng.uniform(0.25, 0.75, shape)
            if "vision_tower" in name and name.endswith("weight"):
                values += 1.0
            elif "post_" in name:
                values += 1.5  # else the token's own row outweighs the layers and the text repeats itself
        elif name.endswith("bias"):
            values *= 0.4
        elif name.endswith("position_embedding.weight"):
            values *= 0.6
        elif name.endswith("mm_input_projection_weight"):
            values *= 2.0 / math.sqrt(shape[0])  # (in, out)
        else:
            values *= 1.5 / math.sqrt(math.prod(shape[1:]))  # (out, in…)
        tensor = torch.from_numpy(values.astype(np.float32))
        parameter.data.copy_(tensor.bfloat16().float() if rounded else tensor)


def pixels_of(levels: NDArray[np.uint8]) -> Floats:
    """Levels (N, H, W, 3) as the reference's processor scales them: float32 in [-1, 1], (N, 3, H, W)."""
    unit = (levels.astype(np.float64) * 0.00392156862745098).astype(np.float32)
    return np.ascontiguousarray(((unit - np.float32(0.5)) / np.float32(0.5)).transpose(0, 3, 1, 2))


@torch.no_grad()
def logits_of(
    model: PreTrainedModel,
    rows: Sequence[Ints],
    *,
    levels: NDArray[np.uint8] | None = None,
    image_id: int | None = None,
) -> Floats:
    """Logits (B, L, V) of rows of token ids, left padded to one length.

    Args:
        rows: B arrays of ids.
        levels: the pictures (N, H, W, 3) of all rows in order, or None.
        image_id: the id of an image's soft tokens, for a model with a vision tower; None for text-only.
    """
    length = max(len(row) for row in rows)
    ids = np.stack([np.pad(row, (length - len(row), 0)) for row in rows]).astype(np.int64)
    mask = np.stack([np.pad(np.ones(len(row), np.int64), (length - len(row), 0)) for row in rows])
    inputs = {"input_ids": torch.from_numpy(ids)}
    if mask.min() == 0:
        inputs["attention_mask"] = torch.from_numpy(mask)
    if image_id is not None:
        inputs["token_type_ids"] = torch.from_numpy((ids == image_id).astype(np.int64))
        if levels is not None and len(levels):
            inputs["pixel_values"] = torch.from_numpy(pixels_of(levels)).to(model.dtype)
    out: Floats = model(**inputs, use_cache=False).logits.float().numpy()
    return out


@torch.no_grad()
def vision_of(model: Gemma3ForConditionalGeneration, levels: NDArray[np.uint8]) -> tuple[Floats, Floats]:
    """The tower's last hidden state (N, patches, hidden) and the projector's rows (N, T, text hidden)."""
    state = model.model.vision_tower(pixel_values=torch.from_numpy(pixels_of(levels))).last_hidden_state
    rows = model.model.multi_modal_projector(state)
    return state.numpy(), rows.numpy()


def greedy(
    model: PreTrainedModel, rows: Sequence[Ints], steps: int, **pictures: Any
) -> tuple[list[Ints], list[float], Floats]:
    """Continue each row by its most likely token, `steps` times, the whole sequence anew for each.

    Returns:
        the rows of new tokens (steps), the smallest distance between first and second logit of each row, and the
        logits (B, L + steps - 1, V) of prompt and continuation.
    """
    rows, margins = list(rows), [math.inf] * len(rows)
    for _ in range(steps):
        logits = logits_of(model, rows, **pictures)
        for n, last in enumerate(logits[:, -1]):
            second, first = np.sort(last)[-2:]
            margins[n] = min(margins[n], float(first - second))
            rows[n] = np.append(rows[n], np.int32(last.argmax())).astype(np.int32)
    return [row[-steps:] for row in rows], margins, logits

"""config.json as the Hub and the MLX programs write it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlx.utils import tree_flatten

from mlx_gemma3 import Config
from mlx_gemma3.errors import ConfigError
from mlx_gemma3.model.gemma3 import Gemma3

# What the published config.json files say, as far as it decides shapes and counts (the sizes of the technical report).
HUB_4B: dict[str, Any] = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "image_token_index": 262144,
    "eos_token_id": [1, 106],
    "mm_tokens_per_image": 256,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
TEXT_1B: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
}


def with_text(**changes: Any) -> dict[str, Any]:
    return HUB_4B | {"text_config": HUB_4B["text_config"] | changes}


SIZES = {
    "270m": TEXT_1B | {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18},
    "1b": TEXT_1B,
    "4b": HUB_4B,
    "12b": with_text(
        hidden_size=3840,
        intermediate_size=15360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
    ),
    "27b": with_text(
        hidden_size=5376,
        intermediate_size=21504,
        num_hidden_layers=62,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=168,
    ),
}


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_have_every_parameter_and_the_total_count(size: str) -> None:
    """Built without weights: MLX's arrays are lazy, so nothing is allocated."""
    config = Config.from_dict(SIZES[size])
    shapes = {name: array.shape for name, array in tree_flatten(Gemma3(config).parameters())}
    text = config.text
    d, f = text.hidden_size, text.intermediate_size
    q, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    want: dict[str, tuple[int, ...]] = {
        "language_model.embed_tokens.weight": (text.vocab_size, d),
        "language_model.norm.weight": (d,),
    }
    for i in range(text.num_hidden_layers):
        layer = f"language_model.layers.{i}"
        want |= {f"{layer}.self_attn.{name}_proj.weight": shape for name, shape in
                 {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}.items()}  # fmt: skip
        want |= {f"{layer}.self_attn.{name}_norm.weight": (text.head_dim,) for name in "qk"}
        want |= {f"{layer}.mlp.{name}_proj.weight": shape for name, shape in
                 {"gate": (f, d), "up": (f, d), "down": (d, f)}.items()}  # fmt: skip
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            want[f"{layer}.{norm}_layernorm.weight"] = (d,)
    if config.vision is not None:
        want |= _vision_shapes(d)
    assert shapes == want
    # Counted once by hand from the published shapes; the 4B, 12B and 27B share SigLIP's 417 M.
    total = sum(_size(shape) for shape in shapes.values())
    assert total == {
        "270m": 268_098_176,
        "1b": 999_885_952,
        "4b": 4_300_079_472,
        "12b": 12_187_325_040,
        "27b": 27_432_406_640,
    }[size]  # fmt: skip


def _vision_shapes(d: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "vision_tower.embeddings.patch_embedding.weight": (1152, 14, 14, 3),
        "vision_tower.embeddings.patch_embedding.bias": (1152,),
        "vision_tower.embeddings.position_embedding.weight": (4096, 1152),
        "vision_tower.post_layernorm.weight": (1152,),
        "vision_tower.post_layernorm.bias": (1152,),
        "multi_modal_projector.mm_input_projection_weight": (1152, d),
        "multi_modal_projector.mm_soft_emb_norm.weight": (1152,),
    }
    for i in range(27):
        layer = f"vision_tower.encoder.layers.{i}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            shapes |= {f"{layer}.{name}.weight": (1152, 1152), f"{layer}.{name}.bias": (1152,)}
        shapes |= {f"{layer}.mlp.fc1.weight": (4304, 1152), f"{layer}.mlp.fc1.bias": (4304,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (1152, 4304), f"{layer}.mlp.fc2.bias": (1152,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{name}.weight": (1152,), f"{layer}.{name}.bias": (1152,)}
    return shapes


def _size(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def test_sparse_hub_config_takes_the_class_defaults() -> None:
    text = Config.from_dict(HUB_4B).text
    assert (text.vocab_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (262208, 8, 4, 256)
    assert (text.query_pre_attn_scalar, text.max_position_embeddings, text.rms_norm_eps) == (256, 131072, 1e-6)
    assert (text.rope_theta, text.rope_scale, text.rope_local_theta) == (1e6, 8, 1e4)
    globals_ = [layer for layer in range(34) if text.is_global(layer)]
    assert globals_ == [5, 11, 17, 23, 29]  # the trailing partial group 30 to 33 is local


def test_old_and_new_spelling_are_the_same_model() -> None:
    types = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(34)]
    rope = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    new = with_text(rope_scaling=None, rope_parameters=rope, layer_types=types, _sliding_window_pattern=6)
    assert Config.from_dict(new) == Config.from_dict(HUB_4B)


def test_flat_text_config_is_the_nested_one() -> None:
    flat = Config.from_dict(TEXT_1B)
    nested = Config.from_dict({"model_type": "gemma3", "text_config": TEXT_1B, "eos_token_id": [1, 106]})
    assert flat == nested and flat.vision is None


@pytest.mark.parametrize(
    ("value", "ids"), [([1, 106], (1, 106)), (1, (1,)), (None, (1, 106)), ([1, 106, 107], (1, 106, 107))]
)
def test_eos_ids(value: Any, ids: tuple[int, ...]) -> None:
    assert Config.from_dict(HUB_4B | {"eos_token_id": value}).eos_token_ids == ids


def test_bookkeeping_of_other_tools_is_let_pass() -> None:
    extra = {"unsloth_fixed": True, "_name_or_path": "x", "use_cache": True, "_attn_implementation_autoset": True}
    assert Config.from_dict(HUB_4B | extra) == Config.from_dict(HUB_4B)


def test_what_mlx_vlm_adds_is_understood() -> None:
    added = with_text(rope_global_base_freq=1e6, rope_traditional=False) | {"hidden_size": 2048, "vocab_size": 257152}
    assert Config.from_dict(added) == Config.from_dict(HUB_4B)
    assert Config.from_dict(with_text(rope_global_base_freq=5e5)).text.rope_theta == 5e5
    assert Config.from_dict(TEXT_1B | {"vision_config": {}}) == Config.from_dict(TEXT_1B)
    with pytest.raises(ConfigError, match="hidden_size"):
        Config.from_dict(HUB_4B | {"vision_config": {}})


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (TEXT_1B | {"rope_traditional": True}, "rope_traditional"),
        ({"model_type": "llama", "hidden_size": 64}, "model_type"),
        ({"model_type": "gemma3"}, "text_config"),
        (TEXT_1B | {"model_type": "gemma2"}, "model_type"),
        (TEXT_1B | {"hidden_activation": "silu"}, "hidden_activation"),
        (TEXT_1B | {"attention_bias": True}, "attention_bias"),
        (TEXT_1B | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (TEXT_1B | {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (TEXT_1B | {"use_bidirectional_attention": "yes"}, "use_bidirectional_attention"),
        (TEXT_1B | {"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_scaling.rope_type"),
        (TEXT_1B | {"rope_scaling": {"rope_type": "linear"}}, "factor"),
        (TEXT_1B | {"rope_scaling": {"rope_type": "linear", "factor": 8, "beta": 1}}, "rope_scaling.beta"),
        (TEXT_1B | {"layer_types": ["chunked_attention"] * 26}, "layer_types"),
        (TEXT_1B | {"layer_types": ["full_attention"] * 25}, "layer_types"),
        (TEXT_1B | {"sliding_window": 0}, "sliding_window"),
        (TEXT_1B | {"sliding_window": None}, "sliding_window"),
        (TEXT_1B | {"num_key_value_heads": 3}, "num_key_value_heads"),
        (TEXT_1B | {"head_dim": "256"}, "head_dim"),
        (TEXT_1B | {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        (TEXT_1B | {"num_experts": 8}, "num_experts"),
        (TEXT_1B | {"attention_sink_size": 4}, "attention_sink_size"),
        (with_text(model_type="gemma2"), "text_config.model_type"),
        (with_text(query_rescale_scalar=2.0), "text_config.query_rescale_scalar"),
        (HUB_4B | {"mm_tokens_per_image": 255}, "mm_tokens_per_image"),
        (HUB_4B | {"image_token_index": 262208}, "image_token_index"),
        (HUB_4B | {"vision_config": {"model_type": "clip_vision_model"}}, "vision_config.model_type"),
        (HUB_4B | {"vision_config": HUB_4B["vision_config"] | {"vision_use_head": True}}, "vision_use_head"),
        (HUB_4B | {"vision_config": HUB_4B["vision_config"] | {"hidden_act": "gelu"}}, "hidden_act"),
        (HUB_4B | {"eos_token_id": "end"}, "eos_token_id"),
        (HUB_4B | {"quantization_config": {"quant_method": "bitsandbytes", "bits": 4}}, "quantization_config"),
    ],
)
def test_what_we_would_compute_wrongly_is_refused_by_name(values: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(values)
    message = str(caught.value)
    assert message.startswith(name) and "\n" not in message and caught.value.code == "config"


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"'])
def test_broken_file_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Config.from_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_from_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(HUB_4B))
    assert Config.from_file(path) == Config.from_dict(HUB_4B)
    with pytest.raises(ConfigError, match="no such file"):
        Config.from_file(tmp_path / "other.json")


@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"use_bidirectional_attention": None, "attention_bias": None, "attn_logit_softcapping": None},
        {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"},
        {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": None},
        {"attention_dropout": 0.0, "hidden_dropout_prob": 0.1, "embd_pdrop": 0.0},
        {"embedding_lr": 1e-5, "layerwise_lr_decay": 0.9, "neftune_noise_alpha": 5, "z_loss_scale": 0.1},
        {"properties": {"a": 1}, "exact_match": True, "contact": "her", "fact": 3, "postscalar": 1},
        {"num_experts": 0, "mlp_bias": False, "window_layers": [], "rope_extra": None, "attnImplementation": "sdpa"},
        {"vocab_size_padded": True, "original_vocab_size": 512, "output_attentions": True},
        {"rope_scaling": {"rope_type": "default", "original_max_position_embeddings": 8192}},
        {"quantization": {}, "quantization_config": None},
    ],
)
def test_what_changes_nothing_is_passed_over(values: dict[str, Any]) -> None:
    plain = Config.from_dict(TEXT_1B | {"rope_scaling": None, "hidden_activation": "gelu_pytorch_tanh"})
    own = {"rope_scaling": None, "hidden_activation": "gelu_pytorch_tanh"} | values
    assert Config.from_dict(TEXT_1B | own) == plain


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_parameters"),
        ({"rope_parameters": 7}, "rope_parameters"),
        ({"rope_parameters": {"full_attention": 7}}, "rope_parameters.full_attention"),
        ({"hidden_act": "silu", "hidden_activation": None}, "hidden_act"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"attention_bias": "false"}, "attention_bias"),
        ({"use_bidirectional_attention": 0}, "use_bidirectional_attention"),
        ({"kv_sharing_window": 3}, "kv_sharing_window"),
        ({"ropeFactor": 3}, "ropeFactor"),
        ({"extra_token_id": 3}, "extra_token_id"),
        ({"pad_token_id": 10**7}, "pad_token_id"),
        ({"pad_token_id": -1}, "pad_token_id"),
        ({"eos_token_id": [-1]}, "eos_token_id"),
        ({"quantization": 4}, "quantization"),
        ({"quantization": {"bits": "4", "group_size": 64}}, "quantization.bits"),
        ({"quantization": {"bits": 4, "group_size": 64, "model.norm": 3}}, "quantization.model.norm"),
        ({"quantization": {"bits": 4, "group_size": 64, "model.a": {"bits": [4]}}}, "quantization.model.a.bits"),
        ({"sliding_window": 10**9}, "sliding_window"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": 2**31}, "hidden_size"),
        ({"vocab_size": 2**63}, "vocab_size"),
        ({"rms_norm_eps": 1e300}, "rms_norm_eps"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"head_dim": 10**6}, "head_dim"),
    ],
)
def test_values_that_say_something_else_or_that_no_model_has(values: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(TEXT_1B | values)
    assert str(caught.value).startswith(f"{name}:") and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"layer_norm_eps": 0}, "layer_norm_eps"),
        ({"image_size": 10**6}, "image_size"),
        ({"image_size": 8192, "patch_size": 1}, "patch_size"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers"),
    ],
)
def test_towers_that_no_model_has(values: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"vision_config.{name}"):
        Config.from_dict(HUB_4B | {"vision_config": HUB_4B["vision_config"] | values})

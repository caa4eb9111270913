"""What GGUF headers say: settings make the right config, the vision file that fits is found, bad ones are one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_gguf
from places import TEMPLATE

from mlx_gemma3.boundary.gguf_header import GGUFHeader
from mlx_gemma3.checkpoint import gguf_config
from mlx_gemma3.checkpoint.load import open_checkpoint
from mlx_gemma3.checkpoint.source import Source
from mlx_gemma3.config import GLOBAL, Config
from mlx_gemma3.errors import ConfigError, Gemma3Error

TEXT, IMAGE = tiny.text_config(), tiny.image_config()


def error_of(call: Callable[[], Any], kind: type[Gemma3Error]) -> str:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def config_of(folder: Path, settings: dict[str, Any], config: dict[str, Any] = TEXT) -> Config:
    """The config that a text file with these settings has."""
    tensors = {"language_model.embed_tokens.weight": np.zeros((512, 64), np.float32)}
    return gguf_config.read_config(
        GGUFHeader.read(tiny_gguf.write_gguf(folder / "model.gguf", config, tensors, settings=settings))
    )


def test_27b_scores_are_scaled_by_hidden_over_heads(tmp_path: Path) -> None:
    assert config_of(tmp_path, {}).text.query_pre_attn_scalar == 32
    assert config_of(tmp_path, {"gemma3.block_count": 62}).text.query_pre_attn_scalar == 64 / 4


@pytest.mark.parametrize(
    ("layers", "kind", "factor", "scale"),
    [
        (26, None, None, 1.0),
        (34, None, None, 8.0),
        (48, None, None, 8.0),
        (62, None, None, 8.0),
        (34, "linear", 4.0, 4.0),
        (34, "none", None, 1.0),
        (26, "linear", 8.0, 8.0),
        (26, None, 8.0, 8.0),
    ],
)
def test_rope_scaling(layers: int, kind: str | None, factor: float | None, scale: float, tmp_path: Path) -> None:
    settings = {"block_count": layers, "rope.scaling.type": kind, "rope.scaling.factor": factor}
    config = config_of(tmp_path, {f"gemma3.{key}": value for key, value in settings.items()})
    assert config.text.rope_scale == scale


def test_settings(tmp_path: Path) -> None:
    config = config_of(tmp_path, {})
    assert config == Config.from_dict(TEXT)
    assert config.text.rms_norm_eps == 1e-6  # not the float32 next to it
    assert config.eos_token_ids == (1, 106)
    changed = config_of(
        tmp_path,
        {
            "gemma3.rope.freq_base_swa": 20000.0,
            "tokenizer.ggml.eos_token_id": 106,
            "tokenizer.ggml.eot_token_id": 105,
            "tokenizer.ggml.bos_token_id": 4,
        },
    )
    assert (changed.text.rope_local_theta, changed.bos_token_id, changed.eos_token_ids) == (20000, 4, (106, 105, 1))
    assert set(config_of(tmp_path, {"gemma3.attention.sliding_window": None}).text.layer_types) == {GLOBAL}
    assert config_of(tmp_path, {"gemma3.rope.local.freq_base": 5000.0}).text.rope_local_theta == 5000


def test_refused_settings(tmp_path: Path) -> None:
    def refused(settings: dict[str, Any]) -> str:
        return error_of(lambda: config_of(tmp_path, settings), ConfigError)

    assert "gemma3.block_count: got nothing" in refused({"gemma3.block_count": None})
    assert "rope_type: got 'yarn'" in refused({"gemma3.rope.scaling.type": "yarn", "gemma3.rope.scaling.factor": 2.0})
    assert "num_key_value_heads: got 3" in refused({"gemma3.attention.head_count_kv": 3})


@pytest.mark.parametrize(
    ("architecture", "kind", "words"),
    [
        ("llama", None, "got 'llama', want 'gemma3' or 'gemma-embedding'; this program runs Gemma 3 only"),
        ("clip", None, "the vision part of a model (mmproj), want a Gemma 3 text model; give the text model beside it"),
        ("gemma3", "adapter", "a LoRA adapter, want a Gemma 3 text model; merge it into its base model"),
        ("gemma3", "imatrix", "statistics for quantising"),
        ("gemma3", "mmproj", "the vision part"),
    ],
)
def test_what_is_no_model_says_what_it_is(architecture: str, kind: str | None, words: str, tmp_path: Path) -> None:
    tensors = {"language_model.embed_tokens.weight": np.zeros((8, 32), np.float32)}
    path = tiny_gguf.write_gguf_file(tmp_path / "model.gguf", architecture, {"general.type": kind}, tensors, "F32")
    with pytest.raises(Gemma3Error) as caught:
        open_checkpoint(Source("x", path))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"gemma3.block_count": [3, 4]}, "gemma3.block_count"),
        ({"gemma3.block_count": "8"}, "gemma3.block_count"),
        ({"gemma3.embedding_length": 64.5}, "gemma3.embedding_length"),
        ({"gemma3.rope.scaling.type": [1]}, "gemma3.rope.scaling.type"),
        ({"gemma3.attention.head_count_kv": [1, 2]}, "gemma3.attention.head_count_kv"),
        ({"tokenizer.ggml.eos_token_id": ["a"]}, "tokenizer.ggml.eos_token_id"),
        ({"general.alignment": 3}, "general.alignment"),
        ({"general.alignment": [32]}, "general.alignment"),
        ({"gemma3.attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"gemma3.attention.scale": 0.9}, "attention.scale"),
        ({"gemma3.block_count": 10**9}, "num_hidden_layers"),
        ({"gemma3.attention.sliding_window": 10**9}, "sliding_window"),
    ],
)
def test_a_setting_of_another_type_or_range_is_named(settings: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(Gemma3Error) as caught:
        config_of(tmp_path, settings)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [(2, [0, 1] * 4), ([True, True, False, True] * 2, [0, 0, 1, 0] * 2), (None, [0, 0, 0, 0, 0, 1, 0, 0])],
)
def test_the_pattern_of_local_layers_is_read(pattern: Any, layers: list[int], tmp_path: Path) -> None:
    config = config_of(tmp_path, {"gemma3.attention.sliding_window_pattern": pattern})
    assert [kind == GLOBAL for kind in config.text.layer_types] == list(map(bool, layers))


def test_the_vision_file_that_fits_and_rounds_least(tmp_path: Path) -> None:
    tensors = tiny.random_tensors(IMAGE)
    header = GGUFHeader.read(tiny_gguf.write_gguf(tmp_path / "model.gguf", IMAGE, tensors))
    assert gguf_config.find_projector(header) == (None, "")
    wider = tiny.image_config(hidden_size=96)
    tiny_gguf.write_mmproj(tmp_path / "mmproj-other-BF16.gguf", wider, tiny.random_tensors(wider))
    tiny_gguf.write_mmproj(tmp_path / "mmproj-llava.gguf", IMAGE, tensors, settings={"clip.projector_type": "mlp"})
    assert gguf_config.find_projector(header) == (None, "mmproj-other-BF16.gguf is the vision part of another model")
    for name in ("mmproj-Q8_0.gguf", "gemma-3-4b-it-mmproj-F16.gguf", "mmproj-F32.gguf", "mmproj-BF16.gguf"):
        tiny_gguf.write_mmproj(tmp_path / name, IMAGE, tensors)
        found, _ = gguf_config.find_projector(header)
        assert found is not None and found.path.name == name
    deep = GGUFHeader.read(tiny_gguf.write_gguf(tmp_path / "Q8_0" / "model.gguf", IMAGE, tensors))
    above, _ = gguf_config.find_projector(deep)  # one folder up
    assert above is not None and above.path.name == "mmproj-BF16.gguf"


def test_instruct_and_generation(tmp_path: Path) -> None:
    def opened(name: str, settings: dict[str, Any], said: str = "x") -> Any:
        path = tiny_gguf.write_gguf(tmp_path / name, TEXT, tiny.random_tensors(TEXT), settings=settings)
        return open_checkpoint(Source(said, path))

    template = {"tokenizer.chat_template": json.loads(TEMPLATE.read_text())["chat_template"]}
    for name in ("gemma-3-1b-it.gguf", "gemma-3-1b-pt-Q4_0.gguf", "gemma-3-base.gguf"):
        checkpoint = opened(name, template | {"general.name": "Knowledge Base Bot"})
        assert checkpoint.instruct and not checkpoint.notes, name
    other = opened("model.gguf", {"tokenizer.chat_template": "{{ bos_token }}"})
    assert other.instruct and "not used" in other.notes[0]
    for settings in ({}, {"general.name": "Gemma 3 270m"}, {"tokenizer.chat_template": " "}):
        assert (opened("model.gguf", settings).instruct, opened("model.gguf", settings).notes) == (False, ()), settings
    for said, settings in (("x", {"general.name": "Gemma 3 1b It"}), ("owner/gemma-3-1b-it-gguf", {})):
        named = opened("model.gguf", settings, said)
        assert named.instruct and "by its name" in named.notes[0]
    assert opened("model.gguf", template).generation == {}
    sampling = {"general.sampling.temp": 0.7, "general.sampling.top_k": 64, "general.sampling.top_p": 0.95}
    assert opened("model.gguf", sampling).generation == {"temperature": 0.7, "top_k": 64, "top_p": 0.95}

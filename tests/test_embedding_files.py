"""What an embedding model is read from: MLX folders, GGUF, modules, prompts; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_embedding
import tiny_gguf
from test_embedding import near
from tiny_embedding import CASES

import mlx_gemma3 as g3
from mlx_gemma3.checkpoint.load import load_model, open_checkpoint
from mlx_gemma3.checkpoint.source import resolve
from mlx_gemma3.embedder_config import PROMPTS
from mlx_gemma3.errors import CheckpointError, ConfigError, OptionError, TokenizerError


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A folder of its own, to be changed."""
    return tiny_embedding.write(tmp_path / "e", "plain")


@pytest.mark.parametrize("bits", [None, 8])
def test_matrices_that_lie_with_the_other_weights(plain: Path, tmp_path: Path, bits: int | None) -> None:
    """As MLX programs write them: model.…, dense.0, dense.1; no modules.json, no folders."""
    tensors = dict(tiny_embedding.tensors("plain"))
    for number, part in enumerate(tiny_embedding.dense("plain")):
        tensors[f"dense.{number}.weight"] = part["weight"]
    packing = None if bits is None else {"bits": bits, "group_size": 32}
    packed, floats = tiny.pack(tensors, packing) if packing else (tensors, tensors)
    out = tiny.write_folder(
        tmp_path / "mlx", tiny_embedding.config("plain"), packed, style="text", packing=packing, generation=None
    )
    tiny_embedding.write_tokenizer(out)
    values = {name.removeprefix("language_model."): mx.array(array) for name, array in floats.items()}
    for number in range(2):
        weight = values.pop(f"dense.{number}.weight")
        mx.save_safetensors(str(plain / f"{number + 2}_Dense" / "model.safetensors"), {"linear.weight": weight})
    mx.save_safetensors(str(plain / "model.safetensors"), values)
    with g3.load(out) as ours, g3.load(plain) as same:
        near(ours.embed(["the user", "a"], kind="query"), np.array(same.embed(["the user", "a"], kind="query")))
        assert ours.embed("a", kind="STS") != ours.embed("a")  # EmbeddingGemma's own prompts


def write_gguf(path: Path, *, dense: str = "dense_{}", ollama: bool = False, **settings: Any) -> Path:
    """As llama.cpp's converter writes it with its option for the matrices; or as Ollama's."""
    config = tiny_embedding.config("plain")
    prefix = "gemma3" if ollama else "gemma-embedding"
    values = {
        f"{prefix}.context_length": 256,
        f"{prefix}.embedding_length": config["hidden_size"],
        f"{prefix}.block_count": config["num_hidden_layers"],
        f"{prefix}.feed_forward_length": config["intermediate_size"],
        f"{prefix}.attention.head_count": config["num_attention_heads"],
        f"{prefix}.attention.head_count_kv": 1,
        f"{prefix}.attention.key_length": config["head_dim"],
        f"{prefix}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{prefix}.attention.sliding_window": 12,
        f"{prefix}.attention.sliding_window_pattern": 3,
        f"{prefix}.rope.freq_base": 1e6,
        f"{prefix}.pooling_type": 1,
        **tiny_gguf.vocabulary_settings(tiny_embedding.vocabulary().pieces),
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_eos_token": True,
        **settings,
    }
    tensors = dict(tiny_embedding.tensors("plain"))
    if dense:
        for number, part in enumerate(tiny_embedding.dense("plain")):
            tensors[dense.format(number + (0 if ollama else 2)) + ".weight"] = part["weight"]
    return tiny_gguf.write_gguf_file(path, prefix, values, tensors, "F32")


GGUF_CONFIG = {"head_dim": 24, "query_pre_attn_scalar": 24}  # GGUF has no other scale


@pytest.fixture
def like_gguf(plain: Path) -> Path:
    """The folder of the same weights, with what GGUF cannot say as it takes it for granted."""
    (plain / "config.json").write_text(json.dumps(tiny_embedding.config("plain") | GGUF_CONFIG))
    (plain / "sentence_bert_config.json").write_text('{"max_seq_length": 256}')
    return plain


@pytest.mark.parametrize("ollama", [False, True])
def test_gguf(like_gguf: Path, tmp_path: Path, ollama: bool) -> None:
    path = write_gguf(tmp_path / "e.gguf", dense="dense.{}" if ollama else "dense_{}", ollama=ollama)
    texts = [text for _, text in CASES.values()]
    with g3.load(path) as engine, g3.load(like_gguf) as same:
        near(engine.embed(texts, kind="document"), np.array(same.embed(texts, kind="document")))
        assert engine.about["notes"] == []


def test_gguf_without_its_matrices_is_pooled_only_and_says_so(like_gguf: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "e.gguf", dense="")
    modules = json.loads((like_gguf / "modules.json").read_text())
    (like_gguf / "modules.json").write_text(json.dumps([one for one in modules if "Dense" not in one["type"]]))
    with g3.load(path) as engine, g3.load(like_gguf) as same:
        near(engine.embed("the user"), np.array(same.embed("the user")))
        assert "no dense matrices" in engine.about["notes"][0]


def test_gguf_that_pools_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pooling_type"):
        open_checkpoint(resolve(write_gguf(tmp_path / "e.gguf", **{"gemma-embedding.pooling_type": 2})))


def test_gguf_whose_texts_end_without_eos(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "e.gguf", **{"tokenizer.ggml.add_eos_token": False})
    embedder = open_checkpoint(resolve(path)).config.embedder
    assert embedder is not None and (embedder.prefix, embedder.suffix) == ((2,), ())


@pytest.mark.parametrize(
    ("file", "values", "what"),
    [
        ("modules.json", [], "nothing, want Transformer"),
        ("modules.json", [{"type": "x.Transformer", "path": ""}, {"type": "x.WeightedLayerPooling"}], "WeightedLayer"),
        ("modules.json", [{"type": "x.Transformer"}, {"type": "x.Pooling", "path": "../1_Pooling"}], "folder beside"),
        ("modules.json", {"a": 1}, "a list of modules"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "want mean"),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "max"]}, "want mean"),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": 1}, "include_prompt"),
        ("2_Dense/config.json", {"in_features": 64}, "out_features"),
        ("2_Dense/config.json", {"in_features": 60, "out_features": 128, "bias": False}, "in_features: got 60"),
        ("2_Dense/config.json", {"in_features": 64, "out_features": 128, "activation_function": "x.ELU"}, "ELU"),
        ("2_Dense/config.json", {"in_features": 64, "out_features": 128, "use_residual": True}, "residual"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case"),
        ("sentence_bert_config.json", {"max_seq_length": 2}, "max_seq_length: got 2"),
        ("sentence_bert_config.json", {"max_seq_length": "x"}, "max_seq_length"),
        ("config_sentence_transformers.json", {"prompts": {"a": 1}}, "prompts"),
        ("config_sentence_transformers.json", {"default_prompt_name": "nope"}, "default_prompt_name"),
    ],
)
def test_what_is_not_computed_here_is_refused(plain: Path, file: str, values: Any, what: str) -> None:
    (plain / file).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=what) as refused:
        open_checkpoint(resolve(plain))
    assert "\n" not in str(refused.value)


def test_missing_and_wrong_matrices_are_refused(plain: Path) -> None:
    weights = plain / "3_Dense" / "model.safetensors"
    mx.save_safetensors(str(weights), {"linear.weight": mx.zeros((64, 64))})
    with pytest.raises(CheckpointError, match=r"dense\.1\.weight"):
        load_model(plain)
    weights.unlink()
    with pytest.raises(CheckpointError, match="3_Dense"):
        load_model(plain)
    shutil.rmtree(plain / "3_Dense")
    with pytest.raises(ConfigError, match="in_features"):
        load_model(plain)


def test_what_stands_around_a_text_is_the_tokenizers(plain: Path) -> None:
    path = plain / "tokenizer.json"
    values = json.loads(path.read_text())

    def around(processor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        path.write_text(json.dumps(values | {"post_processor": processor}))
        embedder = open_checkpoint(resolve(plain)).config.embedder
        assert embedder is not None
        return embedder.prefix, embedder.suffix

    template = values["post_processor"]
    assert around(template) == ((2,), (1,))
    assert around({"type": "Sequence", "processors": [template]}) == ((2,), (1,))
    assert around(template | {"single": template["single"][:2]}) == ((2,), ())
    assert around(None) == ((), ())
    for wrong in ({"type": "ByteLevel"}, template | {"single": []}, template | {"special_tokens": {}}):
        with pytest.raises(TokenizerError, match="post_processor"):
            around(wrong)


def test_prompts(plain: Path) -> None:
    path = plain / "config_sentence_transformers.json"

    def prompts(values: dict[str, Any]) -> Any:
        path.write_text(json.dumps(values))
        embedder = open_checkpoint(resolve(plain)).config.embedder
        assert embedder is not None
        return embedder.prompts

    assert prompts({}) == PROMPTS and prompts({"prompts": {"query": "q: "}}) == {"query": "q: "}
    own = {"query": PROMPTS["query"], "document": "mine: "}
    assert prompts({"prompts": own})["document"] == "mine: " and "fact checking" in prompts({"prompts": own})
    prompts({"prompts": {"passage": "p: "}})
    with g3.load(plain) as engine:
        near(engine.embed("a", kind="document"), np.array(engine.embed("p: a")))
        with pytest.raises(OptionError, match="passage"):
            engine.embed("a", kind="query")

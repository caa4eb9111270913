"""A head of its own is kept, a copy of the embedding is not: in folders, packed or not, and in GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_gguf
from mlx.utils import tree_flatten

import mlx_gemma3 as g3
from mlx_gemma3.checkpoint.load import open_checkpoint
from mlx_gemma3.checkpoint.safetensors import read_header
from mlx_gemma3.checkpoint.source import Source

TOKENS = [[2, 5, 9, 30, 77, 105]]
EMBEDDING, HEAD = "language_model.embed_tokens.weight", "lm_head.weight"
PACKING = {"bits": 4, "group_size": 32}


def with_head(config: Any, *, trained: bool) -> tiny.Tensors:
    """A checkpoint's tensors and a head: the embedding's copy, or one that differs in its last number alone."""
    tensors = tiny.random_tensors(config)
    tensors[HEAD] = tensors[EMBEDDING].copy()
    if trained:
        tensors[HEAD][-1, -1] += 3
    return tensors


def is_tied(path: Path) -> bool:
    return open_checkpoint(Source("x", path)).config.tie_word_embeddings


def logits(path: Path) -> np.ndarray:
    return np.array(g3.load_model(path, dtype="float32")(TOKENS))


@pytest.mark.parametrize("said", [{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("style", ["hub", "transformers-5", "mlx-vlm"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_head_that_differs_is_used(said: dict[str, bool], style: str, shards: int, tmp_path: Path) -> None:
    config = tiny.image_config() | said
    tensors = with_head(config, trained=True)
    folder = tiny.write_folder(tmp_path / "trained", config, tensors, style=style, shards=shards)
    model = g3.load_model(folder, dtype="float32")
    assert not is_tied(folder)
    np.testing.assert_array_equal(np.array(model.lm_head.weight), tensors[HEAD])
    untied = tiny.write_folder(tmp_path / "untied", config | {"tie_word_embeddings": False}, tensors)
    np.testing.assert_array_equal(np.array(model(TOKENS)), logits(untied))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_a_copy_is_left_unread_whatever_its_type(kind: str, tmp_path: Path) -> None:
    config = tiny.text_config()
    half = {name: mx.array(x).astype(mx.bfloat16) for name, x in with_head(config, trained=False).items()}
    if kind == "float16":  # it holds fewer powers of two, so both hold what fits
        half[EMBEDDING] = half[HEAD] = mx.round(half[EMBEDDING] * 64) / 64
    folder = tiny.write_folder(tmp_path, config, half | {HEAD: half[HEAD].astype(getattr(mx, kind))}, style="text")
    assert is_tied(folder) and not hasattr(g3.load_model(folder), "lm_head")
    changed = np.array(half[HEAD].astype(mx.float32))
    changed[300, 7] *= 2
    trained = half | {HEAD: mx.array(changed).astype(getattr(mx, kind))}
    assert not is_tied(tiny.write_folder(tmp_path, config, trained, style="text"))


def test_packed_heads(tmp_path: Path) -> None:
    """As mlx-vlm writes a copy, as distilled quantisation writes a head, and one in other bits than the embedding."""
    config = tiny.image_config()

    def written(trained: bool, packing: dict[str, Any]) -> Path:
        packed, _ = tiny.pack(with_head(config, trained=trained), packing)
        name = f"{trained}-{len(packing)}"
        return tiny.write_folder(tmp_path / name, config, packed, style="mlx-vlm", packing=packing)

    copy, trained = written(False, PACKING), written(True, PACKING)
    assert "language_model.lm_head.scales" in read_header(copy / "model.safetensors")
    assert is_tied(copy) and not hasattr(g3.load_model(copy), "lm_head")
    assert not is_tied(trained) and g3.load_model(trained).lm_head.bits == 4
    other = written(False, PACKING | {"lm_head": {"bits": 8, "group_size": 32}})
    assert not is_tied(other) and g3.load_model(other).lm_head.bits == 8


def test_scales_without_a_matrix_are_no_head(tmp_path: Path) -> None:
    config = tiny.text_config()
    plain = tiny.write_folder(tmp_path / "plain", config, tiny.random_tensors(config), style="text")
    g3.convert(plain, tmp_path / "packed", bits=4, group_size=32)
    assert (tmp_path / "packed" / "head-scales.safetensors").exists() and is_tied(tmp_path / "packed")


@pytest.mark.parametrize("how", [{"dequantize": True, "dtype": "float32"}, {"bits": 8, "group_size": 32}])
def test_convert_keeps_a_trained_head(how: dict[str, Any], tmp_path: Path) -> None:
    config = tiny.image_config()
    folder = tiny.write_folder(tmp_path / "trained", config, with_head(config, trained=True))
    g3.convert(folder, tmp_path / "out", **how)
    assert not g3.Config.from_file(tmp_path / "out" / "config.json").tie_word_embeddings
    names = dict(tree_flatten(g3.load_model(tmp_path / "out").parameters()))
    assert HEAD in names and not (tmp_path / "out" / "head-scales.safetensors").exists()
    assert np.abs(logits(tmp_path / "out") - logits(folder)).max() < (1e-5 if "dtype" in how else 0.3)
    tied = tiny.write_folder(tmp_path / "tied", config, with_head(config, trained=False))
    assert np.abs(logits(tmp_path / "out") - logits(tied)).max() > 1


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_gguf(kind: str, tmp_path: Path) -> None:
    config = tiny.text_config()
    copy = tiny_gguf.write_gguf(tmp_path / "copy.gguf", config, with_head(config, trained=False), kind=kind)
    trained = tiny_gguf.write_gguf(tmp_path / "trained.gguf", config, with_head(config, trained=True), kind=kind)
    assert is_tied(copy) and not hasattr(g3.load_model(copy), "lm_head")
    assert not is_tied(trained)
    assert np.abs(logits(trained) - logits(copy)).max() > 1
    g3.convert(copy, tmp_path / "converted")
    assert is_tied(tmp_path / "converted")
    g3.convert(trained, tmp_path / "converted", overwrite=True)
    assert np.abs(logits(tmp_path / "converted") - logits(trained)).max() < 1e-5

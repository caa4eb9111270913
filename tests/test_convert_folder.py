"""What a converted folder says of itself and holds for other programs; what a GGUF's numbers become."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_gguf
from memory_held import start_measuring
from mlx.utils import tree_flatten

import mlx_gemma3 as g3
from mlx_gemma3.checkpoint.entries import Note, read_note
from mlx_gemma3.convert import converter
from mlx_gemma3.convert.converter import HEAD_FILE
from mlx_gemma3.errors import PromptError, TokenizerError


@pytest.mark.parametrize("folder", ["text_folder", "chat_folder"])
@pytest.mark.parametrize("options", [{"bits": 4, "group_size": 32}, {"preset": "balanced"}, {"mode": "mxfp4"}])
def test_a_packed_tied_head_has_scales_of_its_own(
    folder: str, options: dict, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """mlx-vlm reads what the index names; mlx-lm the files model*.safetensors, where no part of a head may be."""
    out = tmp_path / "out"
    overrides = ["embed_tokens=8:32"] if "bits" in options else []
    report = g3.convert(request.getfixturevalue(folder), out, **options, overrides=overrides)
    before = "language_model." if folder == "chat_folder" else ""
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    weights = {}
    for file in sorted(out.glob("*.safetensors")):
        held = mx.load(str(file))
        assert {name for name, where in index.items() if where == file.name} == held.keys()
        weights |= held
        assert ("lm_head" in " ".join(held)) == (file.name == HEAD_FILE)
    parts = ["scales"] if "mode" in options else ["scales", "biases"]
    for part in parts:
        assert mx.array_equal(weights[f"{before}lm_head.{part}"], weights[f"{before}model.embed_tokens.{part}"])
    head = [name for name in weights if "lm_head" in name]
    assert len(head) == len(parts) and report.head_copy_bytes == sum(weights[name].nbytes for name in head)
    said = json.loads((out / "config.json").read_text())["quantization"]
    assert said.get(f"{before}lm_head") == said.get(f"{before}model.embed_tokens")
    assert (f"{before}lm_head" in said) == bool(overrides)  # else the embedding is packed as most are


def test_plain_and_untied_heads_need_nothing(text_folder: Path, tmp_path: Path) -> None:
    g3.convert(text_folder, tmp_path / "plain", dequantize=True)
    values = tiny.text_config() | {"tie_word_embeddings": False}
    tensors = tiny.random_tensors(values)
    tensors["lm_head.weight"] = tensors["language_model.embed_tokens.weight"][::-1].copy()
    untied = tiny.write_folder(tmp_path / "untied", values, tensors)
    g3.convert(untied, tmp_path / "packed", bits=8, group_size=32)
    for out in (tmp_path / "plain", tmp_path / "packed"):
        assert not (out / HEAD_FILE).exists()
    model = g3.load_model(tmp_path / "packed", dtype="float32")
    assert not mx.array_equal(model.lm_head.weight, model.language_model.embed_tokens.weight)


def test_the_sources_own_note_and_licence_are_kept(text_folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(text_folder, tmp_path / "source")
    g3.convert(source, tmp_path / "silent", bits=4)
    silent = (tmp_path / "silent" / "README.md").read_text()
    assert "license: gemma" in silent and "Gemma Terms of Use" in silent
    assert read_note(tmp_path / "silent") == Note("Gemma 3 for MLX.", "gemma")
    card = "---\nlicense: apache-2.0\n---\n\n# A name\n\n![plot](x.png)\n\nTrained on drawn\npictures.\n\nMore.\n"
    (source / "README.md").write_text(card)
    assert read_note(source) == Note("Trained on drawn pictures.", "apache-2.0")
    g3.convert(source, tmp_path / "noted", bits=4)
    noted = (tmp_path / "noted" / "README.md").read_text()
    assert "license: apache-2.0" in noted and "Gemma Terms" not in noted and "bits a weight" in noted
    assert read_note(tmp_path / "noted") == read_note(source)
    assert read_note(tmp_path / "nothing") == Note()


def test_what_cannot_be_done_is_said_before_the_long_part(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were written")

    monkeypatch.setattr(converter, "_write_weights", never)
    with pytest.raises(PromptError, match="at least 16"):
        g3.convert(text_folder, tmp_path / "out", bits=4, compare="too short")
    source = shutil.copytree(text_folder, tmp_path / "source")
    (source / "tokenizer.model").write_bytes(b"not a vocabulary")
    with pytest.raises(TokenizerError):
        g3.convert(source, tmp_path / "out", bits=4)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("kind", ["BF16", "F16", "F32"])
def test_a_plain_gguf_is_packed_when_told_and_else_kept(kind: str, tmp_path: Path) -> None:
    values = tiny.text_config()
    source = tiny_gguf.write_gguf(tmp_path / "model.gguf", values, tiny.random_tensors(values), kind=kind)
    kept = g3.convert(source, tmp_path / "kept")
    assert not kept.left_plain and not kept.worst
    before, after = (dict(tree_flatten(g3.load_model(path, dtype="float32").parameters())) for path in
                     (source, tmp_path / "kept"))  # fmt: skip
    assert before.keys() == after.keys() and all(mx.array_equal(before[name], after[name]) for name in before)
    packed = g3.convert(source, tmp_path / "packed", bits=4, group_size=32)
    assert packed.kinds["mlp"].stored == {"4 bits, groups of 32": 24}
    scales = mx.load(str(tmp_path / "packed" / "model.safetensors"))["model.layers.0.mlp.up_proj.scales"]
    assert scales.dtype == mx.bfloat16


@pytest.mark.parametrize(
    ("kind", "rounded", "want"),
    [
        ("Q4_0", True, mx.bfloat16),
        ("Q4_0", False, mx.float32),
        ("Q5_0", True, mx.bfloat16),
        ("Q8_0", True, mx.float32),
        ("Q4_1", False, mx.float32),
        ("F16", True, mx.bfloat16),
        ("F16", False, mx.float16),
    ],
)
def test_floats_of_a_gguf_take_the_smallest_type_that_holds_them(
    kind: str, rounded: bool, want: mx.Dtype, tmp_path: Path
) -> None:
    """Made from a bfloat16 checkpoint F16 and the scales of Q4_0 and Q5_0 fit into bfloat16 (see plan.py)."""
    values = tiny.text_config()
    tensors = tiny.random_tensors(values)
    if rounded:
        tensors = {name: np.array(mx.array(x).astype(mx.bfloat16).astype(mx.float32)) for name, x in tensors.items()}
    source = tiny_gguf.write_gguf(tmp_path / "model.gguf", values, tensors, kind=kind)
    report = g3.convert(source, tmp_path / "out")
    assert not any(row.loss.errors for row in report.kinds.values())
    held = mx.load(str(tmp_path / "out" / "model.safetensors"))
    parts = ("proj.weight",) if kind == "F16" else (".scales", ".biases")
    assert {array.dtype for name, array in held.items() if name.endswith(parts)} == {want}


@pytest.mark.parametrize("options", [{"bits": 4}, {"preset": "balanced"}, {"mode": "mxfp8"}, {"dequantize": True}])
def test_memory_is_that_of_some_pieces_however_large_the_model(
    options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound that converter.py states: 32 pieces in float32; here 4 MiB, while the embedding takes 10 of 18."""
    values = tiny.text_config(vocab_size=8192, hidden_size=640, intermediate_size=640, num_hidden_layers=2)
    tensors = {name: x.astype(np.float16) for name, x in tiny.random_tensors(values).items()}
    source = tiny.write_folder(tmp_path / "source", values, tensors)
    monkeypatch.setattr(converter, "PIECE", 1 << 15)
    bound = 32 * 4 * converter.PIECE
    before = start_measuring()
    report = g3.convert(source, tmp_path / "out", **options)
    assert 2 * report.parameters > 3 * bound
    assert mx.get_peak_memory() - before < bound

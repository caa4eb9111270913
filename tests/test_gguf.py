"""GGUF files: packed text and vision parts equal the floats they store, by rows too; bad files are one line.

The headers are in test_gguf_config.py, the blocks in test_gguf_blocks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
import tiny_gguf
from mlx.utils import tree_flatten

from mlx_gemma3.boundary.gguf_header import GGUFHeader
from mlx_gemma3.checkpoint import gguf_blocks
from mlx_gemma3.checkpoint.entries import Packing
from mlx_gemma3.checkpoint.load import load_model
from mlx_gemma3.config import Config
from mlx_gemma3.errors import CheckpointError, Gemma3Error
from mlx_gemma3.model.gemma3 import Gemma3

TEXT, IMAGE = tiny.text_config(), tiny.image_config()
WIDE = tiny.text_config(  # every matrix has rows of 256: K-quants fit
    hidden_size=256, intermediate_size=256, head_dim=64, query_pre_attn_scalar=64, num_hidden_layers=2
)
EXACT = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5}  # bits
GROUPS_OF_16 = ("Q2_K", "Q3_K", "Q6_K")


def floats_of(model: Gemma3) -> dict[str, np.ndarray]:
    """The parameters as float32 numbers, packed ones unpacked."""
    found = dict(tree_flatten(model.parameters()))
    for path, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):  # in float32, whatever the scales' dtype
            scales, biases = (found.pop(f"{path}.{part}").astype(mx.float32) for part in ("scales", "biases"))
            found[f"{path}.weight"] = mx.dequantize(
                module.weight, scales, biases, group_size=module.group_size, bits=module.bits
            )
    return {name: np.array(value.astype(mx.float32)) for name, value in found.items()}


def same_parameters(model: Gemma3, tensors: tiny.Tensors) -> None:
    """Exactly, but for Gemma's norms: they are stored as 1 + w in float32, which rounds w to 2**-24 of that."""
    found = floats_of(model)
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        want = values.transpose(0, 2, 3, 1) if name == tiny.PATCH_WEIGHT else values
        np.testing.assert_allclose(
            found[name], want, rtol=0, atol=2e-7 if tiny_gguf.SHIFTED.search(name) else 0, err_msg=name
        )


def error_of(call: Callable[[], Any], kind: type[Gemma3Error]) -> str:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "TQ2_0", *EXACT, *GROUPS_OF_16])
def test_text_file_equals_its_floats(kind: str, tmp_path: Path) -> None:
    tensors = tiny.random_tensors(WIDE)
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", WIDE, tensors, kind=kind)
    model = load_model(path, dtype="float32")
    same_parameters(model, tiny_gguf.gguf_floats(tensors, kind))
    assert model.config == Config.from_dict(WIDE)
    packed = [module for _, module in model.named_modules() if "scales" in module]
    assert {(module.bits, module.group_size) for module in packed} == ({(EXACT[kind], 32)} if kind in EXACT else set())
    assert len(packed) == (1 + 2 * 7 if kind in EXACT else 0)


@pytest.mark.parametrize("kind", EXACT)
def test_logits_of_the_packed_model_are_those_of_its_floats(kind: str, tmp_path: Path) -> None:
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", WIDE, tiny.random_tensors(WIDE), kind=kind)
    model, store = load_model(path, dtype="float32"), tiny_gguf.open_store(path)
    tokens = np.random.default_rng(0).integers(3, 500, (2, 24))
    found, want = (np.array(each(tokens)) for each in (model, tiny_gguf.plain_model(store, model.config)))
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())  # sums in another order


@pytest.mark.parametrize("kind", [*EXACT, *GROUPS_OF_16])
def test_bfloat16_packs_every_matrix(kind: str, tmp_path: Path) -> None:
    tensors = tiny.random_tensors(WIDE)
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", WIDE, tensors, kind=kind)
    model = load_model(path, dtype="bfloat16")
    assert {str(value.dtype) for _, value in tree_flatten(model.parameters())} == {
        "mlx.core.uint32",
        "mlx.core.bfloat16",
    }
    assert {module.bits for _, module in model.named_modules() if "scales" in module} == {EXACT.get(kind, 8)}
    want = floats_of(load_model(path, dtype="float32"))
    for name, found in floats_of(model).items():
        # Scale and bias are each off by up to 2**-9, of parts that can be twice their sum; 8 bits anew add half a step.
        assert np.abs(found - want[name]).max() <= 2**-6 * np.abs(want[name]).max(), name


def test_pieces_join_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_blocks, "_PIECE", 96)  # three blocks: pieces end inside rows, the last one is short
    tensors = tiny.random_tensors(TEXT)
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", TEXT, tensors, kind="Q8_0")
    same_parameters(load_model(path, dtype="float32"), tiny_gguf.gguf_floats(tensors, "Q8_0"))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_vision_file_equals_its_floats(kind: str, swapped: bool, tmp_path: Path) -> None:
    tensors = tiny.random_tensors(IMAGE)
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", IMAGE, tensors, kind=kind)
    tiny_gguf.write_mmproj(tmp_path / "mmproj-model.gguf", IMAGE, tensors, kind=kind, swapped=swapped)
    model = load_model(path, dtype="float32")
    floats = tiny_gguf.gguf_floats(tensors, kind)
    same_parameters(model, floats)
    assert model.config == Config.from_dict(IMAGE)
    folder = tiny.write_folder(tmp_path / "folder", IMAGE, floats)
    tokens, pixels = np.array([[2, 9, 500, 502, 502, 502, 502, 501, 8, 7]]), np.full((1, 56, 56, 3), 0.25, np.float32)
    found, want = (np.array(m(tokens, pixels)) for m in (model, load_model(folder, dtype="float32")))
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())  # the norms' last bit


def test_text_only_leaves_the_vision_file_alone(tmp_path: Path) -> None:
    tensors = tiny.random_tensors(IMAGE)
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", IMAGE, tensors)
    (tmp_path / "mmproj.gguf").write_bytes(b"damaged")
    assert load_model(path, text_only=True).config.vision is None
    assert "mmproj.gguf" in error_of(lambda: load_model(path), CheckpointError)


def test_projection_either_way_round(tmp_path: Path) -> None:
    tensors = tiny.random_tensors(IMAGE)
    name = "multi_modal_projector.mm_input_projection_weight"
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", IMAGE, tensors)
    tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", IMAGE, tensors | {name: tensors[name].T})
    same_parameters(load_model(path, dtype="float32"), tensors)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_dropped_vocabulary_rows_come_back(kind: str, tmp_path: Path) -> None:
    """llama.cpp's older converter cuts the rows that the vocabulary lacks, the image token's among them."""
    tensors = tiny.random_tensors(IMAGE)
    settings = {"tokenizer.ggml.tokens": None, "tokenizer.ggml.padding_token_id": 3}
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", IMAGE, tensors, kind=kind, settings=settings)
    tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", IMAGE, tensors)
    model = load_model(path, dtype="float32")
    table = floats_of(model)["language_model.embed_tokens.weight"]
    assert model.config.text.vocab_size == len(table) == 262208
    assert (model.config.boi_token_id, model.config.image_token_id) == (255999, 262144)
    own = tiny_gguf.gguf_floats(tensors, kind)["language_model.embed_tokens.weight"]
    np.testing.assert_array_equal(table[:512], own)
    np.testing.assert_array_equal(table[512:], np.broadcast_to(own[3], (262208 - 512, 64)))
    store = tiny_gguf.open_store(path)
    entry = next(entry for entry in store.entries if entry.name == "language_model.embed_tokens.weight")
    assert entry.shape == table.shape and entry.nbytes == own.size * 4 * (1 if kind == "F32" else 34 / 128)
    whole = store.read(entry)
    for start, stop in ((0, 3), (510, 515), (511, 512), (512, 513), (262200, None), (9, 9)):
        for name, part in store.read(entry, start, stop).items():
            assert mx.array_equal(part, whole[name][start:stop]), (name, start, stop)


def test_every_parameter_can_be_read_by_rows(tmp_path: Path) -> None:
    tensors = tiny.random_tensors(IMAGE)
    projection = "multi_modal_projector.mm_input_projection_weight"
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", IMAGE, tensors, kind="Q5_0")
    tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", IMAGE, tensors | {projection: tensors[projection].T}, kind="Q8_0")
    store, model = tiny_gguf.open_store(path), load_model(path, dtype="float32")
    parameters, numbers = dict(tree_flatten(model.parameters())), floats_of(model)
    assert len(store.entries) == len({entry.name for entry in store.entries}) == len(numbers)
    read = {}
    for entry in store.entries:
        assert entry.shape == numbers[entry.name].shape, entry
        read |= store.read(entry)
        for start, stop in ((0, 1), (2, 5), (3, None)):
            for name, part in store.read(entry, start, stop).items():
                np.testing.assert_array_equal(np.array(part), np.array(parameters[name][start:stop]), err_msg=name)
    assert read.keys() == parameters.keys()
    entries = {entry.name: entry for entry in store.entries}
    up = entries["language_model.layers.0.mlp.up_proj.weight"]
    assert (up.kind, up.packing, up.nbytes) == ("Q5_0", Packing(5, 32), 128 * 64 * 22 // 32)
    norm = entries["language_model.norm.weight"]
    assert (norm.kind, norm.packing, norm.nbytes) == ("F32", None, 256)
    assert entries[projection].packing is None and entries[projection].kind == "Q8_0"
    assert entries[tiny.PATCH_WEIGHT].shape == (32, 14, 14, 3)
    assert sum(entry.nbytes for entry in store.entries) <= sum(file.stat().st_size for file in tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_numbers_are_read_in_the_precision_of_the_file(kind: str, tmp_path: Path) -> None:
    tensors = tiny.random_tensors(TEXT)
    store = tiny_gguf.open_store(tiny_gguf.write_gguf(tmp_path / "model.gguf", TEXT, tensors, kind=kind))
    for entry in store.entries:
        (array,) = store.read(entry).values()
        assert array.dtype == {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}[entry.kind]


@pytest.mark.parametrize("kind", GROUPS_OF_16)
def test_the_store_says_what_packing_anew_costs(kind: str, tmp_path: Path) -> None:
    tensors = tiny.random_tensors(WIDE)
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", WIDE, tensors, kind=kind)
    store, exact = tiny_gguf.open_store(path), tiny_gguf.open_store(path, exact=True)
    matrices = [entry for entry in store.entries if entry.packing]
    assert len(matrices) == 15 and store.requantised == {}
    assert not any(entry.packing for entry in exact.entries)
    wanted = tiny_gguf.gguf_floats(tensors, kind)
    for entry in matrices:
        half = entry.shape[0] // 2
        parts = [store.read(entry, 0, half), store.read(entry, half)]
        found = np.concatenate([mx.dequantize(*part.values(), group_size=32, bits=8) for part in parts])
        errors, want = np.abs(found - wanted[entry.name]), wanted[entry.name]
        lost = store.requantised[entry.name]
        assert lost.kind == kind and lost.largest == errors.max()
        assert lost.relative_rms == pytest.approx(np.linalg.norm(errors) / np.linalg.norm(want), rel=1e-3)
        assert 1e-4 < lost.relative_rms < 0.01
    for entry in exact.entries:
        exact.read(entry)
    assert exact.requantised == {}


def test_positions_may_be_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = tiny.random_tensors(IMAGE)
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", IMAGE, tensors)
    q8 = tiny_gguf.gguf.GGMLQuantizationType.Q8_0
    monkeypatch.setattr(
        tiny_gguf, "gguf_type", lambda _, name, x: q8 if "position" in name else tiny_gguf.gguf.GGMLQuantizationType.F32
    )
    tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", IMAGE, tensors)
    model = load_model(path, dtype="float32")
    assert isinstance(model.vision_tower.embeddings.position_embedding, nn.QuantizedEmbedding)
    same_parameters(model, tiny_gguf.gguf_floats(tensors, "F32"))
    tokens, pixels = np.array([[2, 500, 502, 502, 502, 502, 501, 7]]), np.full((1, 56, 56, 3), 0.25, np.float32)
    found, want = (
        np.array(each(tokens, pixels))
        for each in (model, tiny_gguf.plain_model(tiny_gguf.open_store(path), model.config))
    )
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())


def test_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    tensors = tiny.random_tensors(TEXT)
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", TEXT, tensors)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"))
    assert "blk.0.attn_q.weight: got two of them" in error_of(lambda: load_model(path), CheckpointError)


def test_own_head(tmp_path: Path) -> None:
    config = tiny.text_config(tie_word_embeddings=False)
    tensors = tiny.random_tensors(config)
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", config, tensors, kind="Q8_0")
    same_parameters(load_model(path, dtype="float32"), tiny_gguf.gguf_floats(tensors, "Q8_0"))


def test_bfloat16_keeps_the_weights_of_a_bfloat16_checkpoint(tmp_path: Path) -> None:
    random = tiny.random_tensors(TEXT)
    tensors = {name: np.array(mx.array(x).astype(mx.bfloat16).astype(mx.float32)) for name, x in random.items()}
    model = load_model(tiny_gguf.write_gguf(tmp_path / "model.gguf", TEXT, tensors, kind="BF16"), dtype="bfloat16")
    for name, value in tree_flatten(model.parameters()):
        assert value.dtype == mx.bfloat16
        if tensors[name].ndim == 2:
            np.testing.assert_array_equal(np.array(value.astype(mx.float32)), tensors[name], err_msg=name)


def test_missing_and_unknown_tensors(tmp_path: Path) -> None:
    tensors = tiny.random_tensors(TEXT)
    lost = tensors.pop("language_model.layers.0.mlp.up_proj.weight")
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", TEXT, tensors)
    assert "1 missing (language_model.layers.0.mlp.up_proj.weight)" in error_of(
        lambda: load_model(path), CheckpointError
    )
    tensors = tiny.random_tensors(TEXT) | {"language_model.layers.8.mlp.up_proj.weight": lost}
    path = tiny_gguf.write_gguf(tmp_path / "more.gguf", TEXT, tensors)
    assert "1 unknown (language_model.layers.8" in error_of(lambda: load_model(path), CheckpointError)


def test_cut_off_file(tmp_path: Path) -> None:
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", TEXT, tiny.random_tensors(TEXT), kind="Q8_0")
    whole = path.read_bytes()
    stop = max(tensor.offset for tensor in GGUFHeader.read(path).tensors) + 1
    for size, words in ((stop, f"got {stop} bytes"), (200, "cut off or damaged"), (0, "a whole file")):
        path.write_bytes(whole[:size])
        assert words in error_of(lambda: load_model(path), CheckpointError)


@pytest.mark.parametrize(("number", "name"), [(15, "Q8_K"), (26, "I32"), (99, "99")])
def test_unreadable_type_is_named(number: int, name: str, tmp_path: Path) -> None:
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", TEXT, tiny.random_tensors(TEXT))
    entry = b"token_embd.weight" + (2).to_bytes(4, "little") + (64).to_bytes(8, "little") + (512).to_bytes(8, "little")
    data = path.read_bytes()
    assert data.count(entry + bytes(4)) == 1  # type 0, F32, comes next
    path.write_bytes(data.replace(entry + bytes(4), entry + number.to_bytes(4, "little")))
    message = error_of(lambda: load_model(path), CheckpointError)
    assert f"token_embd.weight: got ggml type {name}" in message

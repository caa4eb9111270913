"""Checkpoint folders: every naming style, packing and sharding loads to the same model; every bad one is one line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten

from mlx_gemma3.checkpoint.load import Checkpoint, open_checkpoint
from mlx_gemma3.checkpoint.load import load_model as load_named
from mlx_gemma3.checkpoint.safetensors import canonical_name, read_folder, read_header
from mlx_gemma3.checkpoint.source import Source
from mlx_gemma3.config import Config
from mlx_gemma3.errors import CheckpointError, ConfigError, Gemma3Error, OptionError
from mlx_gemma3.model.gemma3 import Gemma3
from mlx_gemma3.model.runner import Runner, on_device

TEXT, IMAGE = tiny.text_config(), tiny.image_config()
TOKENS = np.random.default_rng(1).integers(3, 499, size=(1, 24))
PACKING = {"bits": 4, "group_size": 32}


def load_model(folder: Path, *, dtype: str = "auto", text_only: bool = False) -> Gemma3:
    """As the public one, without source.py's own look at the folder, which would find some of these mistakes first."""
    return load_named(open_checkpoint(Source(str(folder), folder), text_only=text_only), dtype=dtype)


def parameters(model: Gemma3) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def same_parameters(model: Gemma3, tensors: tiny.Tensors) -> None:
    found = parameters(model)
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        want = values.transpose(0, 2, 3, 1) if name == tiny.PATCH_WEIGHT else values
        np.testing.assert_array_equal(found[name], want, err_msg=name)


def logits(model: Gemma3) -> np.ndarray:
    """Of some text, and of a picture before it where the model sees pictures."""
    if model.config.vision is None:
        return np.array(model(TOKENS))
    pixels = np.random.default_rng(2).uniform(-1, 1, (1, 56, 56, 3)).astype(np.float32)
    return np.array(model(np.concatenate([[[2, 500, 502, 502, 502, 502, 501]], TOKENS], axis=1), pixels))


def error_of(call: Callable[[], Any], kind: type[Gemma3Error] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize("style", [style for style in tiny.STYLES if style != "text"])
def test_every_style_loads_the_same_tensors(style: str, tmp_path: Path) -> None:
    tensors = tiny.random_tensors(IMAGE)
    tiny.write_folder(tmp_path, IMAGE, tensors, style=style)
    same_parameters(load_model(tmp_path, dtype="float32"), tensors)
    text = {name: values for name, values in tensors.items() if name.startswith("language_model.")}
    same_parameters(load_model(tmp_path, dtype="float32", text_only=True), text)


def test_text_checkpoint_and_shards(tmp_path: Path) -> None:
    tensors = tiny.random_tensors(TEXT)
    for shards in (1, 3):
        folder = tiny.write_folder(tmp_path / str(shards), TEXT, tensors, style="text", shards=shards)
        same_parameters(load_model(folder, dtype="float32"), tensors)
    (folder / "model.safetensors.index.json").unlink()
    same_parameters(load_model(folder, dtype="float32"), tensors)


NAMES = {
    "model.layers.3.mlp.up_proj.scales": "language_model.layers.3.mlp.up_proj.scales",
    "language_model.model.norm.weight": "language_model.norm.weight",
    "model.language_model.embed_tokens.biases": "language_model.embed_tokens.biases",
    "language_model.lm_head.scales": "lm_head.scales",
    "model.vision_tower.post_layernorm.bias": "vision_tower.post_layernorm.bias",
    "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias": "vision_tower.encoder.layers.0.mlp.fc1.bias",
    "model.multi_modal_projector.mm_soft_emb_norm.weight": "multi_modal_projector.mm_soft_emb_norm.weight",
    "transformer.h.0.attn.c_attn.weight": "transformer.h.0.attn.c_attn.weight",
}


def test_names() -> None:
    for published, canonical in NAMES.items():
        assert canonical_name(published) == canonical == canonical_name(canonical)


def test_untied_head_is_required(tmp_path: Path) -> None:
    untied = tiny.image_config() | {"tie_word_embeddings": False}
    tensors = tiny.random_tensors(untied)
    same_parameters(load_model(tiny.write_folder(tmp_path / "untied", untied, tensors), dtype="float32"), tensors)
    del tensors["lm_head.weight"]
    assert "1 missing (lm_head.weight)" in error_of(
        lambda: load_model(tiny.write_folder(tmp_path / "missing", untied, tensors))
    )


MIXED = {
    **PACKING,
    "language_model.layers.1.mlp.down_proj": {"bits": 8, "group_size": 64},
    "language_model.layers.2.self_attn.q_proj": {"bits": 3, "group_size": 32},
    "language_model.layers.3.self_attn.o_proj": False,
    "language_model.embed_tokens": {"bits": 6, "group_size": 64},
}


@pytest.mark.parametrize("common", [{"bits": 4, "group_size": 32, "mode": "mxfp4"}, {"bits": 8, "group_size": 32}])
def test_a_modules_own_entry_takes_the_place_of_what_is_said_for_all(common: dict[str, Any], tmp_path: Path) -> None:
    """As in MLX: what an entry leaves out is affine, of 4 bits in groups of 64, and not what stands there for all."""
    path, other = "language_model.layers.1.mlp.down_proj", "language_model.layers.2.mlp.up_proj"
    written = {path: {"bits": 8, "group_size": 64, "mode": "affine"}, other: {"bits": 4, "group_size": 64}}
    packed, floats = tiny.pack(tiny.random_tensors(TEXT), {**common, **written})

    def folder(entries: dict[str, Any]) -> Path:
        return tiny.write_folder(tmp_path / "packed", TEXT, packed, style="text", packing=common | entries)

    want = load_model(tiny.write_folder(tmp_path / "plain", TEXT, floats, style="text"), dtype="float32")
    model = load_model(folder({path: {"bits": 8}, other: {"group_size": 64}}), dtype="float32")
    layers = model.language_model.layers
    assert [layers[1].mlp.down_proj.bits, layers[2].mlp.up_proj.bits] == [8, 4]
    assert layers[0].mlp.up_proj.bits == common["bits"] and layers[0].mlp.up_proj.mode == common.get("mode", "affine")
    np.testing.assert_allclose(logits(model), logits(want), atol=2e-4)
    wrong = {path: {"bits": 8, "group_size": 32}, other: {"group_size": 64}}
    assert f"{path}: group_size" in error_of(lambda: load_model(folder(wrong)))
    active = {path: {"bits": 8, "quantize_input": True}, other: {"group_size": 64}}
    assert "quantize_input: got true" in error_of(lambda: load_model(folder(active)), ConfigError)


@pytest.mark.parametrize("mode", ["one", "mixed", "mxfp4", "mxfp8", "nvfp4", "unsaid"])
@pytest.mark.parametrize("style", ["hub", "transformers-5", "mlx-vlm"])
def test_packed_equals_its_floats(mode: str, style: str, tmp_path: Path) -> None:
    """The logits are sums of the same products, packed or not: float32 rounding only."""
    packing: dict[str, Any] = {
        "mixed": MIXED,
        "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
        "mxfp8": {"bits": 8, "group_size": 32, "mode": "mxfp8"},
        "nvfp4": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
    }.get(mode, PACKING)
    packed, floats = tiny.pack(tiny.random_tensors(IMAGE), packing)
    said = None if mode == "unsaid" else packing
    folder = tiny.write_folder(tmp_path / "packed", IMAGE, packed, style=style, packing=said)
    model = load_model(folder, dtype="float32")
    plain = load_model(tiny.write_folder(tmp_path / "floats", IMAGE, floats), dtype="float32")
    assert model.language_model.layers[1].mlp.down_proj.bits == (8 if mode in ("mixed", "mxfp8") else 4)
    assert hasattr(model.language_model.layers[3].self_attn.o_proj, "scales") == (mode != "mixed")
    assert hasattr(model.vision_tower.encoder.layers[0].mlp.fc1, "scales")
    assert hasattr(model.vision_tower.encoder.layers[0].mlp.fc2, "scales") == (80 % packing["group_size"] == 0)
    np.testing.assert_allclose(logits(model), logits(plain), atol=1e-5 * np.abs(logits(plain)).max())


def test_scales_are_not_rounded_in_float32(tmp_path: Path) -> None:
    tensors = tiny.random_tensors(TEXT)
    packed, _ = tiny.pack(tensors, PACKING)
    half = {name: x.astype(mx.bfloat16) if x.dtype == mx.float32 else x for name, x in packed.items()}
    folder = tiny.write_folder(tmp_path, TEXT, half, style="text", packing=PACKING)
    for dtype, want in (("float32", mx.float32), ("bfloat16", mx.bfloat16)):
        model = load_model(folder, dtype=dtype)
        found = dict(tree_flatten(model.parameters()))
        assert {str(x.dtype) for x in found.values()} == {str(want), "mlx.core.uint32"}
        for name, x in half.items():
            np.testing.assert_array_equal(np.array(found[name].astype(mx.float32)), np.array(x.astype(mx.float32)))


def test_dtypes(tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path, TEXT, tiny.random_tensors(TEXT), style="text")
    assert load_model(folder).language_model.norm.weight.dtype == mx.float32  # "auto" on the CPU
    assert load_model(folder, dtype="bfloat16").language_model.norm.weight.dtype == mx.bfloat16
    assert "overflows" in error_of(lambda: load_model(folder, dtype="float16"), OptionError)
    assert "'auto'" in error_of(lambda: load_model(folder, dtype="int8"), OptionError)


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="counts bytes in /proc/self/io")
def test_only_used_tensors_are_read(tmp_path: Path) -> None:
    config = tiny.image_config()
    config["vision_config"] |= {"hidden_size": 256, "intermediate_size": 1024}
    tensors = tiny.random_tensors(config)
    vision = sum(x.nbytes for name, x in tensors.items() if name.startswith(("vision_", "multi_")))
    text = sum(x.nbytes for name, x in tensors.items() if name.startswith("language_model."))
    folder = tiny.write_folder(tmp_path, config, tensors)
    assert vision > text
    start = bytes_read()
    model = load_model(folder, dtype="float32", text_only=True)
    opened = bytes_read()
    assert opened - start < 100_000  # headers and settings
    mx.eval(model.parameters())
    assert text <= bytes_read() - opened < text + 50_000


def test_text_only_needs_no_vision_shard(tmp_path: Path) -> None:
    tensors = tiny.random_tensors(IMAGE)
    folder = tiny.write_folder(tmp_path, IMAGE, tensors, shards=4)
    last = folder / "model-00004-of-00004.safetensors"
    assert all(name.startswith(("vision_", "multi_")) for name in read_header(last))
    last.unlink()
    assert load_model(folder, text_only=True).config.vision is None
    assert "model-00004-of-00004.safetensors: got no such file" in error_of(lambda: load_model(folder))
    (folder / "model.safetensors.index.json").unlink()
    assert "model-00004-of-00004.safetensors: got no such file" in error_of(lambda: load_model(folder))


def test_header_says_what_is_in_the_file(tmp_path: Path) -> None:
    tiny.write_folder(tmp_path, TEXT, tiny.random_tensors(TEXT), style="text")
    info = read_header(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    assert (info.dtype, info.shape, info.stop - info.start) == ("F32", (512, 64), 512 * 64 * 4)


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "an empty file"),
    "cut in the header": (lambda data: data[:100], "cut off"),
    "cut in the data": (lambda data: data[:-1], "it is cut off: fetch it again"),
    "seven bytes": (lambda data: data[:7], "cut off"),
    "text": (lambda data: b"<html>Not found</html>" * 100, "something else"),
    "lfs pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "bad json": (lambda data: data[:8] + b"{" + b"x" * (len(data) - 9), "a damaged header"),
    "bad offsets": (lambda data: data.replace(b'"data_offsets":[', b'"data_offsets":{', 1), "a damaged header"),
    "bad shape": (lambda data: data.replace(b"[512,64]", b"[511,64]", 1), "want 130816 for F32"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_file(how: str, tmp_path: Path) -> None:
    change, words = BROKEN[how]
    tiny.write_folder(tmp_path, TEXT, tiny.random_tensors(TEXT), style="text")
    path = tmp_path / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    message = error_of(lambda: load_model(tmp_path))
    assert "model.safetensors" in message and words in message


def test_float8_is_refused_by_name(tmp_path: Path) -> None:
    tiny.write_folder(tmp_path, TEXT, {})
    header = json.dumps({"model.norm.weight": {"dtype": "F8_E4M3", "shape": [64], "data_offsets": [0, 64]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    assert "model.norm.weight: got dtype F8_E4M3" in error_of(lambda: load_model(tmp_path))


def test_index_that_promises_too_much(tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path, TEXT, tiny.random_tensors(TEXT), style="text", shards=2)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(values))
    message = error_of(lambda: load_model(folder))
    assert "model-00001-of-00002.safetensors: got no model.norm.weight" in message
    for broken in ("{", "[]", '{"weight_map": {"model.norm.weight": "../secret"}}'):
        index.write_text(broken)
        assert "weight_map" in error_of(lambda: load_model(folder))


def test_no_weights_and_no_config(tmp_path: Path) -> None:
    config = Config.from_dict(TEXT)
    assert "no weights" in error_of(lambda: read_folder(tmp_path, config))
    assert "config.json" in error_of(lambda: open_checkpoint(Source("x", tmp_path)), ConfigError)


def test_missing_extra_shape_and_kind(tmp_path: Path) -> None:
    tensors = tiny.random_tensors(TEXT)

    def refused(change: dict[str, np.ndarray | None]) -> str:
        changed = {name: x for name, x in (tensors | change).items() if x is not None}
        return error_of(lambda: load_model(tiny.write_folder(tmp_path, TEXT, changed, style="text")))

    name = "language_model.layers.0.mlp.up_proj.weight"
    assert f"1 missing ({name})" in refused({name: None})
    assert "1 unknown (score.weight)" in refused({"score.weight": tensors[name]})
    assert f"{name}: got shape (128, 63), want (128, 64)" in refused({name: tensors[name][:, 1:]})
    assert f"{name}: got uint32, want float32" in refused({name: tensors[name].view(np.uint32)})
    several = refused({f"language_model.layers.{layer}.input_layernorm.weight": None for layer in range(8)})
    assert "8 missing" in several and "and 5 more" in several
    assert "the same tensor as" in refused({"model.language_model.norm.weight": tensors["language_model.norm.weight"]})


def test_vision_that_is_not_there_or_not_expected(tmp_path: Path) -> None:
    tensors = tiny.random_tensors(IMAGE)
    text = {name: x for name, x in tensors.items() if name.startswith("language_model.")}
    without = tiny.write_folder(tmp_path / "without", IMAGE, text)
    assert "holds no vision tower" in error_of(lambda: load_model(without))
    assert load_model(without, text_only=True).config.vision is None
    unexpected = tiny.write_folder(tmp_path / "unexpected", IMAGE["text_config"], tensors)
    assert "no vision_config" in error_of(lambda: load_model(unexpected))
    assert load_model(unexpected, text_only=True).config.vision is None


def test_packing_that_contradicts_itself(tmp_path: Path) -> None:
    packed, _ = tiny.pack(tiny.random_tensors(TEXT), PACKING)
    path = "language_model.layers.0.mlp.up_proj"

    def refused(said: dict[str, Any], change: dict[str, mx.array | None] | None = None) -> str:
        tensors = {name: x for name, x in {**packed, **(change or {})}.items() if x is not None}
        folder = tiny.write_folder(tmp_path, TEXT, tensors, style="text", packing=said)
        return error_of(lambda: load_model(folder, dtype="float32"), Gemma3Error)

    assert "bits: got 8 in config.json, want 4" in refused(PACKING | {"bits": 8})
    assert "group_size: got 64 in config.json, want 32" in refused(PACKING | {path: {"bits": 4, "group_size": 64}})
    assert f"{path}: got scales, want what its entry in config.json says, false" in refused({**PACKING, path: False})
    assert f"{path}: got no scales" in refused(
        {**PACKING, path: {"bits": 4, "group_size": 32}},
        {f"{path}.scales": None, f"{path}.biases": None, f"{path}.weight": mx.zeros((128, 64))},
    )
    assert f"1 missing ({path}.biases)" in refused(PACKING, {f"{path}.biases": None})
    assert f"{path}.weight: got shape (128, 7)" in refused(PACKING, {f"{path}.weight": mx.zeros((128, 7), mx.uint32)})
    assert f"{path}.weight: got float32, want uint32" in refused(PACKING, {f"{path}.weight": mx.zeros((128, 8))})
    assert f"{path}.scales: got float32, want uint8" in refused(
        {**PACKING, path: {"bits": 4, "group_size": 32, "mode": "mxfp4"}}
    )
    assert "'fp3'" in refused(PACKING | {"mode": "fp3"})


def test_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TEXT | {"model_type": "llama"}))
    assert "this program runs Gemma 3 only" in error_of(lambda: load_model(tmp_path), ConfigError)


def opened(folder: Path, name: str = "owner/gemma-3-4b-it", **options: Any) -> Checkpoint:
    return open_checkpoint(Source(name, folder), **options)


def test_generation_settings(tmp_path: Path) -> None:
    generation = {"eos_token_id": [1, 106, 7], "top_k": 64, "top_p": 0.95, "temperature": None, "do_sample": True}
    tiny.write_folder(tmp_path, IMAGE, {}, generation=generation)
    checkpoint = opened(tmp_path)
    assert checkpoint.config.eos_token_ids == (1, 106, 7)
    assert checkpoint.generation["eos_token_id"] == (1, 106, 7)
    assert checkpoint.generation["top_k"] == 64 and "temperature" not in checkpoint.generation
    (tmp_path / "generation_config.json").unlink()
    assert opened(tmp_path).generation == {}
    for name, value in (("top_k", 6.5), ("top_p", "high"), ("eos_token_id", [True]), ("do_sample", 1), ("min_p", [])):
        (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
        assert f"{name}: got" in error_of(lambda: opened(tmp_path), ConfigError)
    (tmp_path / "generation_config.json").write_text("{")
    assert "generation_config.json" in error_of(lambda: opened(tmp_path), ConfigError)


def test_opened_checkpoint_loads(tmp_path: Path) -> None:
    tensors = tiny.random_tensors(IMAGE)
    folder = tiny.write_folder(tmp_path, IMAGE, tensors)
    checkpoint, text_only = opened(folder), opened(folder, text_only=True)
    assert checkpoint.config.vision is not None and text_only.config.vision is None
    same_parameters(load_named(checkpoint, dtype="float32"), tensors)
    same_parameters(load_named(folder, dtype="float32"), tensors)
    same_parameters(load_named(str(folder), dtype="float32"), tensors)
    assert load_named(text_only).config.vision is None
    assert load_named(checkpoint, text_only=True).config == load_named(folder, text_only=True).config
    assert not tree_flatten(load_named(checkpoint).trainable_parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_a_late_embedding_is_widened_for_the_second_token(stored: str, tied: bool, tmp_path: Path) -> None:
    config = TEXT | {"tie_word_embeddings": tied}
    kind = getattr(mx, stored)
    half = {name: mx.array(x).astype(kind) for name, x in tiny.random_tensors(config).items()}
    folder = tiny.write_folder(tmp_path, config, half, style="text")
    plain, late = load_model(folder), load_named(folder, late_embedding=True)
    runner = on_device(late)
    table = late.language_model.embed_tokens
    caches, want = runner.make_caches(), plain.make_caches()
    ids = [[2, 5, 6, 7]]
    np.testing.assert_allclose(np.array(late(ids, caches=caches)), np.array(plain(ids, caches=want)), atol=1e-4)
    assert table.weight.dtype == kind
    for token in (8, 9):
        got = runner.step(mx.array([token]), [caches])
        np.testing.assert_allclose(np.array(got), np.array(Runner(plain).step(mx.array([token]), [want])), atol=1e-4)
        assert table.weight.dtype == (mx.float32 if tied else kind)
    everything = tree_flatten(load_named(folder, dtype="bfloat16", late_embedding=True).parameters())
    assert {str(x.dtype) for _, x in everything} == {"mlx.core.bfloat16"}


def test_a_whole_file_beside_a_stale_index_is_read(tmp_path: Path) -> None:
    tensors = tiny.random_tensors(TEXT)
    folder = tiny.write_folder(tmp_path, TEXT, tensors, style="text", shards=2)
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    assert "no such file" in error_of(lambda: load_named(folder)) or "fetch" in error_of(lambda: load_named(folder))
    tiny.save_shards(folder, {f"model.{n.removeprefix('language_model.')}": mx.array(x) for n, x in tensors.items()}, 1)
    same_parameters(load_named(folder), tensors)


def with_entry(tmp_path: Path, **changes: object) -> Path:
    """A folder whose header says this of the last norm."""
    folder = tiny.write_folder(tmp_path, TEXT, tiny.random_tensors(TEXT), style="text")
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"] |= changes
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + length :])
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"data_offsets": [0, 256]},  # another tensor's
        {"data_offsets": [1.5, 257.5]},
        {"data_offsets": [2, 258]},
        {"data_offsets": [-256, 0]},
        {"data_offsets": "all"},
        {"shape": [2**70]},
        {"shape": [1e300]},
        {"shape": [True] * 64},
        {"dtype": None},
    ],
    ids=str,
)
def test_a_header_that_no_writer_makes_is_one_sentence(changes: dict[str, object], tmp_path: Path) -> None:
    said = error_of(lambda: load_named(with_entry(tmp_path, **changes)))
    assert "norm.weight" in said and "\n" not in said


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_only_regular_files_are_read(name: str, tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path, TEXT, tiny.random_tensors(TEXT), style="text")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(Gemma3Error):
        load_named(folder)


def test_deep_and_infinite_headers(tmp_path: Path) -> None:
    folder = tiny.write_folder(tmp_path, TEXT, tiny.random_tensors(TEXT), style="text")
    for head in (b"[" * 100_000, b'{"a":' * 50_000, b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,4]}}'):
        (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
        assert "\n" not in error_of(lambda: load_named(folder))

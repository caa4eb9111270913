"""Converting: the numbers that come out, the folder that appears whole or not at all, what is refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_gguf
import tiny_tokenizer
from mlx.utils import tree_flatten

import mlx_gemma3 as g3
from mlx_gemma3.checkpoint.entries import Packing
from mlx_gemma3.convert import Report, converter
from mlx_gemma3.convert.folder_format import config_json
from mlx_gemma3.convert.recipe import MODES, make_recipe, packing
from mlx_gemma3.convert.writer import Planned, split
from mlx_gemma3.errors import CheckpointError, Gemma3Error, OptionError, OutputError

TOKENS = [[2, 5, 9, 30, 77, 105]]
PICTURE = [[2, 500, 502, 502, 502, 502, 501, 9]]
PIXELS = np.random.default_rng(0).uniform(-1, 1, (1, 56, 56, 3)).astype(np.float32)


def parameters(folder: Path, **options: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(g3.load_model(folder, dtype="float32", **options).parameters()))


def logits(folder: Path) -> mx.array:
    return g3.load_model(folder, dtype="float32")(PICTURE, PIXELS)


@pytest.mark.parametrize(
    ("mode", "bits", "group"),
    [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64)]
    + [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)],
)
def test_packed_numbers_are_what_mx_quantize_makes(
    chat_folder: Path, tmp_path: Path, mode: str, bits: int, group: int
) -> None:
    plain = parameters(chat_folder)
    g3.convert(chat_folder, tmp_path / "out", bits=bits, group_size=group, mode=mode, dtype="float32")
    packed = parameters(tmp_path / "out")
    name = "language_model.layers.3.mlp.up_proj"
    want = mx.quantize(plain[f"{name}.weight"], group_size=group, bits=bits, mode=mode)
    for part, array in zip(("weight", "scales", "biases"), want, strict=False):
        assert mx.array_equal(packed[f"{name}.{part}"], array)
    assert all(mx.array_equal(packed[n], plain[n]) for n in plain if n.startswith("vision_tower.") or "norm" in n)


def test_packed_and_unpacked_again_is_what_the_packed_folder_computes(chat_folder: Path, tmp_path: Path) -> None:
    g3.convert(chat_folder, tmp_path / "small", bits=4, group_size=32, overrides=["vision_tower=8:32"])
    g3.convert(tmp_path / "small", tmp_path / "plain", dequantize=True, dtype="float32")
    assert mx.abs(logits(tmp_path / "small") - logits(tmp_path / "plain")).max() < 1e-3
    assert not any("scales" in name for name in parameters(tmp_path / "plain"))
    assert mx.abs(logits(tmp_path / "plain") - logits(chat_folder)).max() > 1e-2


@pytest.mark.parametrize("folder", ["text_folder", "chat_folder"])
def test_plain_in_and_plain_out_is_the_same(folder: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(folder)
    report = g3.convert(source, tmp_path / "out", dequantize=True, dtype="float32")
    before, after = parameters(source), parameters(tmp_path / "out")
    assert before.keys() == after.keys() and all(mx.array_equal(before[name], after[name]) for name in before)
    assert report.bits_per_weight == 32 and not report.worst
    assert g3.Config.from_file(tmp_path / "out" / "config.json") == g3.Config.from_file(source / "config.json")


def test_shards_hold_no_more_than_their_limit_and_an_index_names_them(chat_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    g3.convert(chat_folder, out, bits=8, group_size=32, max_shard_bytes=60_000)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(files) > 5 and sorted(set(index.values())) == files
    assert all((out / name).stat().st_size < 70_000 for name in files)
    g3.convert(chat_folder, tmp_path / "one", bits=8, group_size=32)
    a, b = parameters(out), parameters(tmp_path / "one")
    assert all(mx.array_equal(a[name], b[name]) for name in b)


def test_a_tensor_larger_than_a_shard_has_its_own() -> None:
    sizes = [Planned(str(n), mx.uint8, (size,)) for n, size in enumerate((5, 30, 4, 4, 4))]
    shards = split(sizes, 10)
    assert [[t.nbytes for t in shard] for shard in shards.values()] == [[5], [30], [4, 4], [4]]
    assert list(shards)[2] == "model-00003-of-00004.safetensors" and list(split(sizes)) == ["model.safetensors"]


def test_pieces_change_nothing(chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g3.convert(chat_folder, tmp_path / "whole", bits=4, group_size=32)
    monkeypatch.setattr(converter, "PIECE", 700)
    seen: list[tuple[int, int]] = []
    report = g3.convert(
        chat_folder,
        tmp_path / "pieces",
        bits=4,
        group_size=32,
        progress=lambda done, total, _: seen.append((done, total)),
    )
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "pieces"))
    assert one == two
    assert len(seen) > 500 and seen[-1] == (report.parameters, report.parameters) and seen == sorted(seen)


def test_overrides_and_presets_decide_by_name(chat_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    overrides = ["embed_tokens=8:32", "layers.0=none", "*.down_proj=mxfp4", "vision_tower=8:32"]
    report = g3.convert(chat_folder, out, bits=4, group_size=32, overrides=overrides)
    quantization = json.loads((out / "config.json").read_text())["quantization"]
    assert {key: quantization[key] for key in ("bits", "group_size", "mode")} == {
        "bits": 4, "group_size": 32, "mode": "affine"
    }  # fmt: skip
    assert quantization["language_model.model.embed_tokens"]["bits"] == 8
    assert quantization["language_model.model.layers.3.mlp.down_proj"]["mode"] == "mxfp4"
    names = parameters(out)
    assert "language_model.layers.0.self_attn.q_proj.scales" not in names
    assert "language_model.layers.1.self_attn.q_proj.scales" in names
    assert "language_model.layers.0.mlp.down_proj.scales" in names  # the later override decides
    # 80 columns: no group divides them, so they stay plain and are listed
    assert report.left_plain == [f"vision_tower.encoder.layers.{n}.mlp.fc2" for n in (0, 1)]
    for preset in ("small", "balanced", "quality"):
        assert g3.convert(chat_folder, tmp_path / preset, preset=preset).worst
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("small", "balanced", "quality")]
    assert sizes == sorted(sizes)


def test_a_group_that_does_not_divide_is_made_smaller() -> None:
    recipe = make_recipe(bits=4, group_size=128, mode="affine", preset=None, overrides=[])
    assert recipe.choose("language_model.layers.0.mlp.up_proj", 640) == Packing(4, 128)
    assert recipe.choose("language_model.layers.0.mlp.up_proj", 1152 + 64) == Packing(4, 64)
    assert recipe.choose("language_model.layers.0.mlp.up_proj", 96) == Packing(4, 32)
    assert recipe.choose("language_model.layers.0.mlp.up_proj", 4304) is None
    assert recipe.choose("vision_tower.encoder.layers.0.mlp.fc1", 1152) is None


def test_the_report_says_what_was_lost(chat_folder: Path, tmp_path: Path) -> None:
    report = g3.convert(chat_folder, tmp_path / "out", bits=4, group_size=32, dtype="float32")
    plain, packed = parameters(chat_folder), g3.load_model(tmp_path / "out", dtype="float32")
    module = packed.language_model.layers[2].mlp.up_proj
    back = mx.dequantize(module.weight, module.scales, module.biases, group_size=32, bits=4)
    matrices = [name for name in plain if name.startswith("language_model.") and plain[name].ndim == 2]
    errors = {name: _relative(plain[name], _plain_of(packed, name)) for name in matrices}
    assert mx.array_equal(back, _plain_of(packed, "language_model.layers.2.mlp.up_proj.weight"))
    worst_name, worst = max(errors.items(), key=lambda item: item[1])
    assert report.worst[0][0] == worst_name and report.worst[0][1] == pytest.approx(worst, rel=1e-3)
    assert report.parameters == sum(array.size for array in plain.values())
    files = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert report.nbytes == pytest.approx(files, rel=0.1)  # the headers
    text, data = report.text(), report.to_dict()
    for part in ("bits a weight", "relative error", "4 bits, groups of 32", worst_name, "mlx-vlm's head"):
        assert part in text
    assert json.loads(json.dumps(data))["kinds"]["mlp"]["relative_error"] > 0.01
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: gemma" in card and "ai.google.dev/gemma/terms" in card and text in card


def _plain_of(model: g3.Gemma3Error | Any, name: str) -> mx.array:
    module = model
    for part in name.removesuffix(".weight").split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    if "scales" not in module:
        return module.weight
    return mx.dequantize(module.weight, module.scales, module.biases, group_size=module.group_size, bits=module.bits)


def _relative(a: mx.array, b: mx.array) -> float:
    return float(mx.sqrt(((a - b) ** 2).sum() / (a**2).sum()).item())  # type: ignore[arg-type]


def test_text_only_leaves_the_tower_out(chat_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    g3.convert(chat_folder, out, dequantize=True, dtype="float32", text_only=True)
    assert json.loads((out / "config.json").read_text())["model_type"] == "gemma3_text"
    model, whole = g3.load_model(out, dtype="float32"), g3.load_model(chat_folder, dtype="float32")
    assert model.config.vision is None and mx.allclose(model(TOKENS), whole(TOKENS), atol=1e-5)


def test_the_written_config_is_read_by_older_programs(chat_folder: Path) -> None:
    """Every setting in full, in the old spelling: what mlx-lm and mlx-vlm do not find they silently guess."""
    config = g3.Config.from_file(chat_folder / "config.json")
    written = config_json(config, dtype="bfloat16", packings={})
    assert g3.Config.from_dict(written) == config
    assert written["hidden_size"] == 64 and written["vocab_size"] == 512
    text = written["text_config"]
    assert text["rope_scaling"] == {"factor": 8.0, "rope_type": "linear"} and "rope_parameters" not in text
    assert text["mm_tokens_per_image"] == 4 and text["sliding_window_pattern"] == 6


def test_a_gguf_keeps_its_packing_bit_for_bit(tmp_path: Path) -> None:
    values = tiny.text_config()
    source = tmp_path / "model.gguf"
    tiny_gguf.write_gguf(source, values, tiny.random_tensors(values), kind="Q4_0")
    report = g3.convert(source, tmp_path / "out")
    before, after = parameters(source), parameters(tmp_path / "out")
    assert before.keys() == after.keys() and all(mx.array_equal(before[name], after[name]) for name in before)
    assert any("4 bits, groups of 32, float32 scales" in row.stored for row in report.kinds.values())
    assert all(not row.loss.errors for row in report.kinds.values())
    with pytest.raises(OptionError, match="packed already"):
        g3.convert(source, tmp_path / "again", bits=8)
    g3.convert(source, tmp_path / "plain", dequantize=True, dtype="float32")
    assert not any("scales" in name for name in parameters(tmp_path / "plain"))


def test_an_existing_folder_is_not_overwritten_unless_told(chat_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(OutputError, match="--overwrite"):
        g3.convert(chat_folder, out)
    assert [path.name for path in out.iterdir()] == ["precious"]
    g3.convert(chat_folder, out, overwrite=True)
    assert not (out / "precious").exists() and (out / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        g3.convert(chat_folder, tmp_path / "file", overwrite=True)


def test_a_disk_too_small_is_refused_before_anything_is_written(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(OutputError, match="make room"):
        g3.convert(chat_folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failure_on_the_way_leaves_nothing(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(converter, "write_index", full)
    with pytest.raises(OutputError, match="full disk"):
        g3.convert(chat_folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_source_packed_already_is_refused(chat_folder: Path, tmp_path: Path) -> None:
    g3.convert(chat_folder, tmp_path / "small", bits=4, group_size=32)
    for options in ({}, {"bits": 8}, {"preset": "quality"}):
        with pytest.raises(OptionError, match=r"packed already.*--dequantize"):
            g3.convert(tmp_path / "small", tmp_path / "again", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 7}, "bits"),
        ({"bits": 4, "group_size": 48}, "group size"),
        ({"mode": "mxfp4", "bits": 8}, "bits"),
        ({"mode": "int8"}, "mode"),
        ({"preset": "tiny"}, "preset"),
        ({"preset": "small", "bits": 4}, "preset"),
        ({"dequantize": True, "bits": 4}, "dequantize"),
        ({"dtype": "int8"}, "dtype"),
        ({"overrides": ["embed_tokens"]}, "override"),
        ({"overrides": ["embed_tokens=9"]}, "bits"),
        ({"overrides": ["nothing_like_it=4"]}, "matches no matrix"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    chat_folder: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(OptionError, match=says) as caught:
        g3.convert(chat_folder, tmp_path / "out", **options)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_every_mode_of_the_table_is_one_that_mlx_has() -> None:
    weight = mx.random.normal((4, 128), key=mx.random.key(0))
    for mode, (many_bits, groups) in MODES.items():
        for bits in many_bits:
            for group in groups:
                made = packing(bits, group, mode)
                mx.eval(mx.quantize(weight, group_size=made.group_size, bits=made.bits, mode=made.mode))


def test_the_function_and_the_package_share_a_name(chat_folder: Path, tmp_path: Path) -> None:
    import mlx_gemma3.convert as package

    assert package.Report is Report
    assert isinstance(g3.convert(chat_folder, tmp_path / "out", text_only=True), Report)


COMMAND = [sys.executable, "-W", "error", "-m", "mlx_gemma3.cli", "convert"]


def test_the_command_writes_a_folder_and_a_report(chat_folder: Path, tmp_path: Path) -> None:
    words = [*COMMAND, str(chat_folder), "--bits", "4", "--group-size", "32"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and "bits a weight" in done.stdout
    out = tmp_path / f"{chat_folder.name}-4bit"
    assert g3.Tokenizer.from_folder(out).vocab_size == 512
    assert "mlx-gemma3 convert" in (out / "README.md").read_text()
    again = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (again.returncode, again.stdout) == (1, "") and again.stderr.count("\n") == 1
    as_json = subprocess.run(
        [*words, "--overwrite", "--json"], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert json.loads(as_json.stdout)["bits_per_weight"] > 4


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_left_that_loads_wrongly(tmp_path: Path) -> None:
    """kill -9, twenty times: the folder is whole or absent, and the next run clears what the killed one left."""
    values = tiny.text_config(vocab_size=512, hidden_size=512, intermediate_size=2048, num_hidden_layers=12)
    source = tiny.write_folder(tmp_path / "source", values, tiny.random_tensors(values))
    tiny_tokenizer.write_tokenizer(source)
    out, rng, whole = tmp_path / "out", random.Random(1), 0
    took = time.monotonic()
    subprocess.run([*COMMAND, str(source), str(out), "--bits", "4"], check=True, capture_output=True, timeout=120)
    took = time.monotonic() - took
    want = (out / "model.safetensors").read_bytes()
    for _ in range(20):
        child = subprocess.Popen(
            [*COMMAND, str(source), str(out), "--bits", "4", "--overwrite"], stdout=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(0.3, 1.1) * took)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        if out.exists():
            whole += 1
            assert (out / "model.safetensors").read_bytes() == want
            g3.load_model(out)
    subprocess.run(
        [*COMMAND, str(source), str(out), "--bits", "4", "--overwrite"], check=True, capture_output=True, timeout=120
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"] and whole


def test_bad_input_is_one_line(tmp_path: Path, chat_folder: Path) -> None:
    for words in ([str(chat_folder), "--bits", "7"], ["gemma-9"], [str(tmp_path / "none")]):
        done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(Gemma3Error):
        g3.convert(tmp_path / "none.gguf", tmp_path / "out")


BEYOND = "language_model.layers.8.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: drop(tensors, "layers.5.mlp"), "3 missing (language_model.layers.5.mlp.down_proj.weight"),
        (lambda tensors: drop(tensors, "language_model.norm"), "1 missing (language_model.norm.weight)"),
        (lambda tensors: {**tensors, BEYOND: np.zeros((128, 64), np.float32)}, f"1 unknown ({BEYOND})"),
        (lambda tensors: {**tensors, **wider(tensors)}, "up_proj.weight: got shape (160, 64), want (128, 64)"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"bits": 4, "group_size": 32}, {"dequantize": True}])
def test_a_gguf_file_that_is_not_the_whole_model_makes_nothing(
    change: Any, words: str, options: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny.text_config()
    path = tiny_gguf.write_gguf(tmp_path / "holes.gguf", config, change(tiny.random_tensors(config)))
    for call in (lambda: g3.convert(path, tmp_path / "out", **options), lambda: g3.load_model(path)):
        with pytest.raises(CheckpointError) as caught:
            call()
        assert words in str(caught.value) and str(path) in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def drop(tensors: tiny.Tensors, part: str) -> tiny.Tensors:
    return {name: values for name, values in tensors.items() if part not in name}


def wider(tensors: tiny.Tensors) -> tiny.Tensors:
    name = "language_model.layers.0.mlp.up_proj.weight"
    return {name: np.concatenate([tensors[name], tensors[name][:32]])}


def test_numbers_that_the_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    config = tiny.text_config()
    tensors = tiny.random_tensors(config)
    tensors["language_model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    folder = tiny.write_folder(tmp_path / "wide", config, tensors, style="text")
    tiny_tokenizer.write_tokenizer(folder)
    with pytest.raises(OptionError, match=r"1\.mlp\.up_proj\.weight as float16: got numbers beyond its range"):
        g3.convert(folder, tmp_path / "out", dequantize=True, dtype="float16")
    assert list(tmp_path.iterdir()) == [folder]

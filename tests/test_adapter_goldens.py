"""An adapter beside the model = PEFT's own numbers: by the plain modules, by each way to run them, in each layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_adapter
from golden_cases import GOLDENS as MODELS
from golden_cases import Case, difference, load_case, whole
from safetensors.numpy import load_file

import mlx_gemma3
from mlx_gemma3.checkpoint.adapter import AdapterFile, read_adapter
from mlx_gemma3.checkpoint.load import load_model
from mlx_gemma3.checkpoint.safetensors import canonical_name
from mlx_gemma3.config import Config
from mlx_gemma3.model import cpu
from mlx_gemma3.model.fused import gpu_kernels, gpu_tower
from mlx_gemma3.model.runner import Runner

GOLDENS = MODELS.parent / "adapters"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/adapter_config.json"))
# As without adapters; a scale of √r for r, the wrong pattern, or a bias scaled by DoRA shows 2e-2 and more.
TOLERANCE = 1e-3


def golden(name: str) -> tuple[str, Case, np.ndarray]:
    """The kind of base, the prompt, and PEFT's logits at the case's positions."""
    with np.load(GOLDENS / name / "logits.npz") as data:
        kind, case = str(data["kind"]), load_case(str(data["kind"]), str(data["case"]))
        assert np.array_equal(data["positions"], case.positions)
        return kind, case, data["logits"]


def read(path: Path, kind: str) -> AdapterFile:
    return read_adapter(path, Config.from_file(MODELS / kind / "config.json"), model=f"tiny-{kind}")


@pytest.mark.parametrize("name", NAMES)
def test_the_plain_modules(name: str) -> None:
    kind, case, want = golden(name)
    model = mlx_gemma3.load_model(MODELS / kind, dtype="float32", adapter=GOLDENS / name)
    assert difference(whole(model, case), want) < TOLERANCE
    assert difference(whole(mlx_gemma3.load_model(MODELS / kind, dtype="float32"), case), want) > 0.1


@pytest.mark.parametrize("form", ["cpu", "gpu"])
@pytest.mark.parametrize("name", NAMES)
def test_beside_the_joined_matrices(name: str, form: str) -> None:
    """The prompt as a chunk, the answer in steps, together with a sequence that has no adapter."""
    kind, case, want = golden(name)
    model = load_model(MODELS / kind, dtype="float32")
    on_cpu = form == "cpu"
    tower = cpu.tower_kernels(model.vision_tower) if on_cpu and kind == "image" else gpu_tower(compiled=False)
    runner = Runner(model, cpu.kernels() if on_cpu else gpu_kernels(compiled=False), tower)
    runner.add_adapter("own", read(GOLDENS / name, kind).matrices)
    pictures = None if case.pixels is None else runner.encode_images(case.pixels, "own")
    rows = [runner.make_caches(adapter="own"), runner.make_caches()]
    found = [runner.head(runner.read([case.tokens], pictures, rows[0]))[0]]
    runner.read([[2, 5]], None, rows[1])
    for token in case.generated:
        found.append(runner.step(mx.array([token, 7]), rows)[:1])
    assert difference(mx.concatenate(found)[mx.array(case.positions)], want) < TOLERANCE


def in_another_layout(name: str, folder: Path, form: str) -> Path:
    """The same update as mlx-lm or mlx-vlm would have written it."""
    config = json.loads((GOLDENS / name / "adapter_config.json").read_text(encoding="utf-8"))
    rank, alpha = config["r"], config["lora_alpha"]
    tensors = {}
    for key, values in load_file(GOLDENS / name / "adapter_model.safetensors").items():
        module, part = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B|magnitude_vector)(?:\.weight)?", key).groups()  # type: ignore[union-attr]
        leaf = {"A": "lora_a", "B": "lora_b", "magnitude_vector": "m"}[part]
        if form == "mlx-vlm":
            leaf = {"lora_a": "A", "lora_b": "B"}[leaf]
        module = tiny_adapter.published(canonical_name(module + ".weight").removesuffix("weight"), "hub")
        tensors[f"{module}{leaf}"] = np.ascontiguousarray(values.T)
    said: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": 0.0}
    if form == "mlx-lm":
        scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
        said = {
            "fine_tune_type": "dora" if config["use_dora"] else "lora",
            "num_layers": 4,
            "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0},
        }
    tiny_adapter.write_parts(folder, form, tensors, said)
    return folder


@pytest.mark.parametrize(
    ("name", "form"),
    [("lora", "mlx-lm"), ("dora", "mlx-lm"), ("rslora", "mlx-lm"), ("tower-dora", "mlx-lm"), ("pictures", "mlx-vlm")],
)
def test_the_same_update_as_other_programs_write_it(name: str, form: str, tmp_path: Path) -> None:
    kind, case, want = golden(name)
    path = in_another_layout(name, tmp_path / "adapter", form)
    assert read(path, kind).form == form
    model = mlx_gemma3.load_model(MODELS / kind, dtype="float32", adapter=path)
    assert difference(whole(model, case), want) < TOLERANCE


def test_names_of_older_transformers_and_of_a_saved_adapter_name(tmp_path: Path) -> None:
    """transformers 4.52 to 4.57, and before; `.default` as torch.save of a whole model leaves it."""
    config = json.loads((GOLDENS / "tower" / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(GOLDENS / "tower" / "adapter_model.safetensors")
    want = read(GOLDENS / "tower", "image").matrices
    for number, style in enumerate(("transformers-4", "hub")):
        older = {}
        for key, values in tensors.items():
            name = canonical_name(key.removeprefix("base_model.model."))
            name = tiny_adapter.published(name, style)
            older["base_model.model." + name.replace(".weight", ".default.weight" if number else ".weight")] = values
        tiny_adapter.write_parts(tmp_path / style, "PEFT", older, config)
        got = read(tmp_path / style, "image").matrices
        assert got.keys() == want.keys()
        assert all(mx.array_equal(got[path].a, want[path].a) for path in want)


def test_an_adapter_of_words_fits_a_model_that_sees(tmp_path: Path) -> None:
    """Its names are those of a text-only model: `model.layers…`."""
    sees = json.loads((MODELS / "image" / "config.json").read_text(encoding="utf-8"))
    shape = Config.from_file(MODELS / "image" / "config.json").text
    a = np.ones((2, shape.hidden_size), np.float32)
    b = np.ones((shape.intermediate_size, 2), np.float32)
    name = "base_model.model.model.layers.1.mlp.up_proj"
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    tiny_adapter.write_parts(tmp_path / "words", "PEFT", tensors, tiny_adapter.settings("PEFT", "tiny", 2))
    assert "vision_config" in sees
    found = read(tmp_path / "words", "image")
    assert list(found.matrices) == ["language_model.layers.1.mlp.up_proj"] and not found.sees

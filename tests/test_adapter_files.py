"""Wrong adapters: each is one sentence that names the file, what it has, what it should have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_adapter
from safetensors.numpy import load_file, save_file

import mlx_gemma3
from mlx_gemma3.checkpoint.adapter import AdapterFile, read_adapter
from mlx_gemma3.config import Config
from mlx_gemma3.errors import Gemma3Error

CONFIG = tiny.image_config()
Change = Callable[[Path], None]


def read(path: Path | str, config: dict[str, Any] | None = None, **how: Any) -> AdapterFile:
    return read_adapter(path, Config.from_dict(config or CONFIG), model="tiny-it", **how)


def said(**values: Any) -> Change:
    """Changes to adapter_config.json; None takes a value out."""

    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text(encoding="utf-8")) | values
        kept = {name: value for name, value in config.items() if value is not ...}
        file.write_text(json.dumps(kept), encoding="utf-8")

    return change


def held(edit: Callable[[dict[str, np.ndarray]], object]) -> Change:
    """Changes to the tensors."""

    def change(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file)

    return change


def named(part: str) -> str:
    return f"base_model.model.model.language_model.layers.0.self_attn.q_proj.{part}"


A, B = named("lora_A.weight"), named("lora_B.weight")
OTHER = {"base_model.model.model.embed_tokens.weight": np.ones((2, 2), np.float32)}
EMBEDDING = {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((2, 2), np.float32)}
HEAD = {"base_model.model.lm_head.lora_A.weight": np.ones((3, 64), np.float32)}
PROJECTOR = {"base_model.model.model.multi_modal_projector.lora_A.weight": np.ones((3, 64), np.float32)}
DEEP = {A.replace("layers.0", "layers.30"): np.ones((3, 64), np.float32)}


def rename(before: str, after: str) -> Change:
    return lambda folder: (folder / before).rename(folder / after) and None


WRONG: list[tuple[str, Change, list[str]]] = [
    ("PEFT", lambda folder: shutil.rmtree(folder), ["no such folder", "adapter_config.json"]),
    ("PEFT", rename("adapter_config.json", "x"), ["adapter_config.json: got no such file"]),
    ("PEFT", rename("adapter_config.json", "config.json"), ["got a model (config.json), want an adapter"]),
    ("PEFT", rename("adapter_model.safetensors", "x"), ["got no adapter_model.safetensors"]),
    ("PEFT", rename("adapter_model.safetensors", "adapter_model.bin"), ["a pickled file", "save_pretrained() writes"]),
    ("PEFT", lambda f: (f / "adapter_config.json").write_text("[]") and None, ["got list, want a JSON object"]),
    ("PEFT", lambda f: (f / "adapter_config.json").write_text("{") and None, ["adapter_config.json: got"]),
    ("PEFT", lambda f: (f / "adapter_model.safetensors").write_bytes(b"x") and None, ["want a safetensors file"]),
    ("PEFT", said(peft_type="LOHA"), ["peft_type: got LOHA, want LORA"]),
    ("PEFT", said(modules_to_save=["lm_head", "norm"]), ["modules_to_save: got lm_head, norm", "merge_and_unload"]),
    ("PEFT", said(bias="all"), ["bias: got 'all', want none", "merge_and_unload"]),
    ("PEFT", said(lora_bias=True), ["lora_bias: got True"]),
    ("PEFT", said(alora_invocation_tokens=[5]), ["alora_invocation_tokens: got [5]"]),
    ("PEFT", said(trainable_token_indices=[5]), ["trainable_token_indices: got [5]"]),
    ("PEFT", said(target_parameters=["mlp.down_proj"]), ["target_parameters: got ['mlp.down_proj']"]),
    ("PEFT", said(target_parameters=["mm_input_projection_weight", "x"]), ["target_parameters: got"]),
    ("PEFT", said(target_parameters="mm_input_projection_weight"), ["target_parameters: got"]),
    ("PEFT", held(lambda t: t.update(PROJECTOR)), ["projector", "got a matrix that the model has not"]),
    ("PEFT", said(layer_replication=[[0, 4]]), ["layer_replication: got [[0, 4]]"]),
    ("PEFT", said(something_new={"a": 1}), ["something_new: got {'a': 1}, want none: it is not computed here"]),
    ("PEFT", said(init_lora_weights="pissa"), ["init_lora_weights: got 'pissa'", "gaussian"]),
    ("PEFT", said(use_dora=True), ["got", "lora_A", "want lora_A and lora_B and lora_magnitude_vector"]),
    ("PEFT", said(use_dora="yes"), ["use_dora: got 'yes', want true or false"]),
    ("PEFT", said(lora_alpha="a"), ["lora_alpha: got 'a', want a number above 0"]),
    ("PEFT", said(r=0), ["r: got 0, want a number above 0"]),
    ("PEFT", said(r=9), ["rank of model.language_model.layers.0.", "got 9, want 3, which its tensors have"]),
    ("PEFT", said(rank_pattern={"q_proj": 2}), ["rank of model.language_model.layers.0.self_attn.q_proj: got 2"]),
    ("PEFT", said(alpha_pattern={"q_proj(": 2}), ["alpha_pattern: got 'q_proj('", "a regular expression"]),
    ("PEFT", said(rank_pattern=[2]), ["rank_pattern: got [2], want an object"]),
    ("PEFT", held(lambda t: t.pop(B)), ["q_proj: got model.language_model", "want lora_A and lora_B"]),
    ("PEFT", held(lambda t: t.clear()), ["got no matrices"]),
    ("PEFT", held(lambda t: t.update(OTHER)), ["embed_tokens.weight: got a whole tensor beside those of LoRA"]),
    ("PEFT", held(lambda t: t.update(EMBEDDING)), ["got an adapter of the embedding"]),
    ("PEFT", held(lambda t: t.update(HEAD)), ["lm_head: got an adapter of the vocabulary's matrix"]),
    ("PEFT", held(lambda t: t.update(DEEP)), ["layers.30", "got a matrix that the model has not", "the 8 layers"]),
    ("PEFT", held(lambda t: t.update({A: t[A][:, :9]})), ["lora_A of shape (3, 9), want (3, 64)", "made for tiny-it"]),
    ("PEFT", held(lambda t: t.update({B: t[B][:, :2]})), ["lora_B of shape (128, 2), want (128, 3)"]),
    ("PEFT", held(lambda t: t.update({A: t[A][0]})), ["lora_A of shape (64,), want (1, 64)"]),
    ("PEFT", held(lambda t: t.update({A: t[A][:0], B: t[B][:, :0]})), ["lora_A of shape (0, 64), want (1, 64)"]),
    ("PEFT", held(lambda t: t.update({A: t[A].astype(np.int8)})), ["lora_A in I8, want F32, F16, BF16"]),
    ("PEFT", held(lambda t: t.update({A: t[A] * np.nan})), ["got NaN or infinity among its numbers"]),
    ("PEFT", held(lambda t: t.update({A.replace(".weight", ".default.weight"): t[A]})), ["there twice"]),
    ("mlx-lm", said(fine_tune_type="full"), ["fine_tune_type: got 'full', want lora or dora", "mlx_lm.fuse"]),
    ("mlx-lm", said(lora_parameters={"rank": 3, "alpha": 6}), ["lora_parameters: got no scale"]),
    ("mlx-lm", said(lora_parameters=...), ["lora_parameters: got None, want rank and scale"]),
    ("mlx-lm", said(lora_parameters={"rank": 4, "scale": 1.0}), ["rank of", "got 4, want 3"]),
    ("mlx-lm", said(lora_parameters={"scale": float("inf")}), ["adapter_config.json: got", "Infinity"]),
    ("mlx-lm", said(fine_tune_type="dora"), ["want lora_a and lora_b and m"]),
    ("mlx-lm", held(lambda t: t.update(OTHER)), ["got a whole tensor, want lora_a, lora_b, m"]),
    ("mlx-vlm", said(rank="x"), ["rank: got 'x', want a number above 0"]),
    ("mlx-vlm", said(alpha=-1), ["alpha: got -1, want a number above 0"]),
]


@pytest.mark.parametrize(("form", "change", "words"), WRONG, ids=[f"{n}" for n in range(len(WRONG))])
def test_what_is_wrong_is_one_sentence(form: str, change: Change, words: list[str], tmp_path: Path) -> None:
    folder = tiny_adapter.write(tmp_path / "receipts", CONFIG, ["q_proj", "up_proj"], form=form)
    change(folder)
    with pytest.raises(Gemma3Error) as caught:
        read(folder)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    for word in words:
        assert word in text, text


def test_the_model_it_is_for(tmp_path: Path) -> None:
    """Of another size, of a model that sees while this one does not, or does but is loaded without its tower."""
    larger = tiny_adapter.write(tmp_path / "larger", tiny.image_config(hidden_size=128), ["q_proj"], base="gemma-3-12b")
    with pytest.raises(Gemma3Error, match=r"shape \(3, 128\), want \(3, 64\) for tiny-it; it was made for gemma-3-12b"):
        read(larger)
    words = tiny.text_config()
    seeing = tiny_adapter.write(tmp_path / "seeing", CONFIG, ["q_proj", "fc1"], vision=True)
    assert "vision_tower.encoder.layers.0.mlp.fc1" in read(seeing).matrices
    with pytest.raises(
        Gemma3Error, match=r"got a matrix of a vision tower, want matrices of the 8 layers of tiny-it, w"
    ):
        read(seeing, words)
    found = read(seeing, words, text_only=True)
    assert list(found.matrices) == [f"language_model.layers.{n}.self_attn.q_proj" for n in range(8)]
    tower = tiny_adapter.write(tmp_path / "tower", CONFIG, ["fc1"], vision=True)
    assert not read(tower, words, text_only=True).matrices  # to words it does nothing


@pytest.mark.parametrize(
    ("base", "model", "told"),
    [
        ("google/gemma-3-4b-pt", "gemma-3-4b-it", True),
        ("unsloth/gemma-3-4b-it-bnb-4bit", "google/gemma-3-4b-it", False),
        ("mlx-community/gemma-3-4b-it-8bit", "some/folder", False),
        ("", "gemma-3-4b-it", False),
        ("google/gemma-3-1b-it", "gemma-3-4b-it", True),
    ],
)
def test_another_base_of_the_same_shapes_is_told(base: str, model: str, told: bool, tmp_path: Path) -> None:
    folder = tiny_adapter.write(tmp_path / "receipts", CONFIG, ["q_proj"], base=base)
    notes = read_adapter(folder, Config.from_dict(CONFIG), model=model).notes
    want = f"the adapter receipts says that it was trained on {base}, and this is {model}"
    assert notes == ((want,) if told else ())


def test_every_layout_is_the_same_update_and_its_files_are_its_identity(tmp_path: Path) -> None:
    found = {
        form: read(tiny_adapter.write(tmp_path / form, CONFIG, form=form)) for form in ("PEFT", "mlx-lm", "mlx-vlm")
    }
    names = {form: adapter.form for form, adapter in found.items()}
    assert names == {form: form for form in found}
    first = found["PEFT"].matrices
    for adapter in found.values():
        assert adapter.matrices.keys() == first.keys() and len(first) == 8 * 7
        for path, term in adapter.matrices.items():
            assert np.array_equal(np.array(term.a), np.array(first[path].a))
            assert np.array_equal(np.array(term.b), np.array(first[path].b))
    copy = shutil.copytree(tmp_path / "PEFT", tmp_path / "copy")
    assert read(copy).fingerprint == found["PEFT"].fingerprint == read(copy / "adapter_model.safetensors").fingerprint
    said(lora_alpha=7)(copy)
    assert read(copy).fingerprint != found["PEFT"].fingerprint


def test_a_model_with_an_adapter_of_its_own(tmp_path: Path) -> None:
    """`load_model(adapter=…)`: packed or plain, what the melted checkpoint computes."""
    tensors = tiny.random_tensors(CONFIG)
    base = tiny.write_folder(tmp_path / "base", CONFIG, tensors)
    for dora in (False, True):
        how = {"vision": True, "dora": dora, "seed": 2}
        modules = ["q_proj", "o_proj", "up_proj", "fc2"]
        path = tiny_adapter.write(tmp_path / f"adapter {dora}", CONFIG, modules, form="mlx-lm", **how)
        melted = tiny_adapter.melted(tensors, tiny_adapter.update(CONFIG, modules, **how))
        other = tiny.write_folder(tmp_path / f"melted {dora}", CONFIG, melted)
        want, got = (mlx_gemma3.load_model(source, dtype="float32", adapter=adapter) for source, adapter in
                     ((other, None), (base, path)))  # fmt: skip
        ids = [[2, 9, 500, 502, 502, 502, 502, 501, 7]]
        pixels = np.random.default_rng(3).uniform(-1, 1, (1, 56, 56, 3)).astype(np.float32)
        assert np.abs(np.array(got(ids, pixels)) - np.array(want(ids, pixels))).max() < 1e-4
    with pytest.raises(Gemma3Error, match="adapter: got 3, want a path"):
        mlx_gemma3.load_model(base, adapter=3)  # type: ignore[arg-type]

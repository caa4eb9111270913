"""Tiny random adapters on disk for the checkpoints of tiny.py, in each program's layout.

    path = tiny_adapter.write(tmp_path / "receipts", tiny.image_config(), ["q_proj", "down_proj"], form="mlx-lm")

The update is the same in every layout: `update` has it by canonical names, the scale in B.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import tiny_tokenizer
from places import TEMPLATE
from safetensors.numpy import save_file

Update = dict[str, dict[str, np.ndarray]]  # module → "a" (r, in), "b" (out, r), "m" (out,)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 3, 6  # scale 2: the same in every layout


def write_base(folder: Path, config: Mapping[str, Any]) -> Path:
    """A checkpoint that is tuned for chat, the one of conftest.py's chat_folder."""
    tiny.write_folder(folder, dict(config), tiny.random_tensors(config, seed=4))
    tiny_tokenizer.write_tokenizer(folder)
    shutil.copy(TEMPLATE, folder / "tokenizer_config.json")
    return folder


def update(
    config: Mapping[str, Any],
    modules: Sequence[str] = ALL,
    *,
    vision: bool = False,
    dora: bool = False,
    rank: int = RANK,
    seed: int = 0,
    size: float = 1.0,
) -> Update:
    """A and B before any scale, and m, for every matrix with one of these last names.

    Args:
        vision: those of the tower too.
        size: of B's numbers; 1 moves every greedy answer.
    """
    random, found = np.random.default_rng(seed), {}
    for name, shape in tiny.tensor_shapes(config).items():
        module = name.removesuffix(".weight")
        decoder = module.startswith("language_model.layers.")
        if module.rpartition(".")[2] not in modules or len(shape) != 2 or not (decoder or vision):
            continue
        out, width = shape
        parts = {"a": random.standard_normal((rank, width)) / width**0.5, "b": random.standard_normal((out, rank))}
        parts["b"] *= size / (2 * rank**0.5)
        if dora:
            parts["m"] = 1 + 0.3 * random.standard_normal(out)
        found[module] = {part: values.astype(np.float32) for part, values in parts.items()}
    return found


def write(
    folder: Path,
    config: Mapping[str, Any],
    modules: Sequence[str] = ALL,
    *,
    form: str = "PEFT",
    style: str = "",
    base: str = "tiny-it",
    changes: Mapping[str, Any] | None = None,
    **how: Any,
) -> Path:
    """Write an adapter.

    Args:
        form: PEFT, mlx-lm or mlx-vlm.
        style: how the base's tensors are named, of tiny.STYLES; the program's usual one when empty.
        base: the model that it says it was made for.
        changes: to adapter_config.json.
        how: of `update`.
    """
    found = update(config, modules, **how)
    sees = "vision_config" in config
    usual = ("transformers-5" if sees else "text") if form == "PEFT" else "hub" if sees else "text"
    tensors = {}
    for module, parts in found.items():
        for part, values in parts.items():
            name = published(f"{module}.", style or usual)[:-1]
            tensors[_name(form, name, part)] = np.ascontiguousarray(values if form == "PEFT" else values.T)
    rank = how.get("rank", RANK)
    write_parts(folder, form, tensors, settings(form, base, rank, dora=how.get("dora", False)) | dict(changes or {}))
    return folder


def write_parts(folder: Path, form: str, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = "adapter_model.safetensors" if form == "PEFT" else "adapters.safetensors"
    save_file(dict(tensors), folder / file)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def published(name: str, style: str) -> str:
    for canonical, prefix in tiny.STYLES[style].items():
        if name.startswith(canonical):
            return prefix + name.removeprefix(canonical)
    return name


def settings(form: str, base: str, rank: int = RANK, *, dora: bool = False) -> dict[str, Any]:
    """adapter_config.json."""
    alpha = 2 * rank
    if form == "PEFT":
        return {
            "peft_type": "LORA", "peft_version": "0.21.2", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
            "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "use_dora": dora, "use_rslora": False,
            "target_modules": ["q_proj"], "modules_to_save": None, "init_lora_weights": True, "rank_pattern": {},
            "alpha_pattern": {}, "layers_to_transform": None, "fan_in_fan_out": False,
        }  # fmt: skip
    if form == "mlx-vlm":
        return {"rank": rank, "alpha": alpha, "dropout": 0.0}
    parameters = {"rank": rank, "scale": 2.0, "dropout": 0.0}
    kind = "dora" if dora else "lora"
    return {"fine_tune_type": kind, "num_layers": -1, "model": base, "lora_parameters": parameters}


def melted(tensors: tiny.Tensors, found: Update, scale: float = 2.0) -> tiny.Tensors:
    """The checkpoint's tensors with an update in them: a second way to the same model."""
    whole = dict(tensors)
    for module, parts in found.items():
        rows = whole[f"{module}.weight"].astype(np.float64) + scale * parts["b"].astype(np.float64) @ parts["a"]
        if "m" in parts:
            rows *= (parts["m"] / np.linalg.norm(rows, axis=1))[:, None]
        whole[f"{module}.weight"] = rows.astype(np.float32)
    return whole


def _name(form: str, module: str, part: str) -> str:
    if form == "PEFT":
        leaf = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}[part]
        return f"base_model.model.{module}.{leaf}"
    names = {"a": "A", "b": "B"} if form == "mlx-vlm" else {"a": "lora_a", "b": "lora_b", "m": "m"}
    return f"{module}.{names[part]}"

"""What a training writes: the adapter as PEFT or mlx-lm reads it, its state, the losses, the plot. Each appears whole.

OUT/adapter_config.json, adapter_model.safetensors      the best adapter so far, or the last without a validation
OUT/last/…                                              that of the last step
OUT/state.safetensors                                   what is needed to go on; gone when the training is done
OUT/losses.csv, losses.svg
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..boundary.writing import refusal, replacing, write_whole
from ..config import Config
from ..errors import DataError
from ..model.adapter import PROJECTOR
from .layers import LEARNT_PROJECTOR, Shape, layer_of

COLUMNS = ("step", "loss", "validation", "learning_rate", "tokens", "seconds")
CONFIG, PEFT, MLX = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"
STATE = "state.safetensors"
_PEFT_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}


def safetensors(arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of float32, int64 and uint32 arrays."""
    kinds = {"float32": "F32", "uint32": "U32", "uint64": "U64", "int32": "I32", "int64": "I64", "bool": "BOOL"}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts, at = [], 0
    for name, array in sorted(arrays.items()):
        values = np.ascontiguousarray(np.array(array))
        header[name] = {
            "dtype": kinds[values.dtype.name], "shape": list(array.shape), "data_offsets": [at, at + values.nbytes]
        }  # fmt: skip
        parts.append(values.tobytes())
        at += values.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])


def write_adapter(
    folder: Path, learnt: Mapping[str, mx.array], shape: Shape, config: Config, *, base: str, form: str
) -> None:
    """Write an adapter.

    Args:
        learnt: by path in mlx-lm's layout, see layers.parameters.
        base: the model it is for, as adapter_config.json says it.
        form: "peft" or "mlx-lm".

    Raises:
        OutputError: it cannot be written.
    """
    arrays, settings = (_peft if form == "peft" else _mlx)(learnt, shape, config, base)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"format": "pt" if form == "peft" else "mlx"}
        name = PEFT if form == "peft" else MLX
        write_whole(folder / name, safetensors(arrays, metadata), mode=0o666)
        write_whole(folder / CONFIG, (json.dumps(settings, indent=2) + "\n").encode(), mode=0o666)
    except OSError as error:
        raise refusal(folder, error) from None


def _peft(
    learnt: Mapping[str, mx.array], shape: Shape, config: Config, base: str
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """In transformers 5's names: `model.language_model.` where there is a tower, `model.` without."""
    arrays, modules = {}, list[str]()
    for path, values in learnt.items():
        module, _, part = path.rpartition(".")
        if module == LEARNT_PROJECTOR:  # stands the other way round in the Hub's files
            arrays[f"base_model.model.model.multi_modal_projector.lora_{'B' if part == 'lora_a' else 'A'}.weight"] = (
                values
            )
            continue
        name = f"model.{module}"
        if config.vision is None:
            name = name.replace("model.language_model.", "model.")
        if part == "lora_a":
            modules.append(name)
        arrays[f"base_model.model.{name}.{_PEFT_PARTS[part]}"] = values if part == "m" else values.T
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": shape.rank,
        "lora_alpha": shape.alpha, "lora_dropout": 0.0, "bias": "none", "use_dora": shape.kind == "dora",
        "use_rslora": False, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "modules_to_save": None, "target_modules": _pattern(modules),
        "target_parameters": [PROJECTOR] if shape.projector else None,
    }  # fmt: skip
    return arrays, settings


def _pattern(modules: Sequence[str]) -> str:
    """A regular expression that the names of these modules match, and no other's."""
    groups: dict[tuple[str, str], list[int]] = {}
    for module in modules:
        found = re.fullmatch(r"(.+)\.layers\.(\d+)\.(.+)", module)
        assert found is not None, module
        groups.setdefault((found[1], found[3]), []).append(int(found[2]))
    by_layers: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (stem, name), layers in groups.items():
        by_layers.setdefault((stem, tuple(layers)), []).append(name)
    parts = [
        rf"{re.escape(stem)}\.layers\.({'|'.join(map(str, layers))})\.({'|'.join(map(re.escape, names))})"
        for (stem, layers), names in by_layers.items()
    ]
    return "|".join(parts)


def _mlx(
    learnt: Mapping[str, mx.array], shape: Shape, config: Config, base: str
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """In mlx-lm's names for a text-only model; in mlx-vlm's, which are the Hub's, where there is a tower."""
    arrays = {}
    for path, values in learnt.items():
        name = path
        if config.vision is None:
            name = name.replace("language_model.", "model.", 1)
        elif name.startswith("language_model."):
            name = name.replace("language_model.", "language_model.model.", 1)
        else:
            name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        arrays[name] = values
    keys = sorted({name.rpartition(".")[0] for name in arrays})
    layers = {layer_of(path.rpartition(".")[0])[1] for path in learnt if path.startswith("language_model.")}
    settings = {
        "fine_tune_type": shape.kind, "model": base, "num_layers": len(layers),
        "lora_parameters": {"rank": shape.rank, "scale": shape.scale, "dropout": 0.0, "keys": keys},
    }  # fmt: skip
    return arrays, settings


@dataclass(frozen=True, eq=False)
class State:
    """A training between two steps."""

    arrays: Mapping[str, mx.array]
    values: Mapping[str, Any]


def write_state(out: Path, state: State) -> None:
    """Raises OutputError: it cannot be written."""
    data = safetensors(state.arrays, {"state": json.dumps(state.values)})
    try:
        write_whole(out / STATE, data, mode=0o666)
    except OSError as error:
        raise refusal(out / STATE, error) from None


def read_state(out: Path) -> State | None:
    """None where there is none. Raises DataError: it is damaged."""
    path = out / STATE
    if not path.exists():
        return None
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        mx.eval(arrays)
        return State(arrays, json.loads(metadata["state"]))
    except (RuntimeError, KeyError, ValueError) as error:
        raise DataError(f"{path}", got=error, want="the state of a training", do="start anew: --overwrite") from None


def write_losses(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """losses.csv; an empty field is one that was not measured. Raises OutputError."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    table.writeheader()
    table.writerows(rows)
    try:
        write_whole(out / "losses.csv", text.getvalue().encode(), mode=0o666)
    except OSError as error:
        raise refusal(out / "losses.csv", error) from None


def read_losses(out: Path, last: int) -> list[dict[str, Any]]:
    """The rows up to a step."""
    try:
        with (out / "losses.csv").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= last]
    except (OSError, ValueError, KeyError):
        return []
    return [{name: _number(row.get(name)) for name in COLUMNS} for row in rows]


def _number(text: str | None) -> Any:
    if not text:
        return None
    return int(text) if re.fullmatch(r"\d+", text) else float(text)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Raises OutputError: it cannot be written."""
    try:
        write_whole(path, (json.dumps(values, indent=2) + "\n").encode(), mode=0o666)
    except OSError as error:
        raise refusal(path, error) from None


def draw(out: Path, rows: Sequence[Mapping[str, Any]], title: str) -> Path | None:
    """losses.svg: the loss of each step, its running mean, and the validation's. None without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    trained = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    checked = [(row["step"], row["validation"]) for row in rows if row.get("validation") is not None]
    if not trained:
        return None
    with matplotlib.rc_context({"svg.hashsalt": "mlx-gemma3"}):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.subplots()
        steps, losses = (np.array(column, float) for column in zip(*trained, strict=True))
        axes.plot(steps, losses, color="tab:blue", linewidth=0.6, alpha=0.4, label="a step")
        width = max(1, len(losses) // 40)
        mean = np.convolve(losses, np.ones(width), "same") / np.convolve(np.ones(len(losses)), np.ones(width), "same")
        axes.plot(steps, mean, color="tab:blue", linewidth=1.5, label=f"mean of {width} steps")
        if checked:
            axes.plot(*zip(*checked, strict=True), "o-", color="black", markersize=3, linewidth=1, label="validation")
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats a token" if "preference" not in title else "loss")
        if min(losses) > 0 and max(losses) > 20 * min(losses):
            axes.set_yscale("log")
        axes.set_title(title, fontsize="medium")
        axes.legend(fontsize="small")
        path = out / "losses.svg"
        try:
            with replacing(path, mode=0o666) as file:
                figure.savefig(file, format="svg", metadata={"Date": None})
        except OSError as error:
            raise refusal(path, error) from None
    return path

"""What stands in an embedding model's folder beside what every model's has: its modules, prompts and length.

Files of sentence-transformers that the source has are copied; for a GGUF file they are made. The matrices lie with the
other weights, as MLX programs read them; where they are plain also in folders of their own, so that
sentence-transformers loads the result.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gemma3.checkpoint.load import Checkpoint
from mlx_gemma3.checkpoint.safetensors import DENSE_FILE, read_folder
from mlx_gemma3.checkpoint.selection import LENGTH_FILE, MODULES, PROMPT_FILE, SENTENCE_FILES
from mlx_gemma3.config import Config
from mlx_gemma3.embedder_config import EmbedderConfig

_MODULE = "sentence_transformers.models."  # versions 6 read these names too
_TORCH = {
    "identity": "torch.nn.modules.linear.Identity",
    "tanh": "torch.nn.modules.activation.Tanh",
    "relu": "torch.nn.modules.activation.ReLU",
    "gelu": "torch.nn.modules.activation.GELU",
    "sigmoid": "torch.nn.modules.activation.Sigmoid",
}


def joined(config: Config) -> Config:
    """The config of a written folder: the matrices lie with the other weights."""
    embedder = config.embedder
    assert embedder is not None, "no embedding model"
    return replace(config, embedder=replace(embedder, dense=tuple(replace(one, folder="") for one in embedder.dense)))


def write_sentence_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Write them into a folder whose config.json and weights are there.

    Raises:
        OSError: a file cannot be read or written.
    """
    config = joined(checkpoint.config)
    assert config.embedder is not None, checkpoint.name
    made = sentence_files(config.embedder)
    modules = checkpoint.path / MODULES
    names = dense_folders(modules) if modules.is_file() else [_dense_name(n) for n in range(len(config.embedder.dense))]
    if modules.is_file():
        copied = [checkpoint.path / name for name in SENTENCE_FILES]
        copied += [checkpoint.path / one["path"] / "config.json" for one in _listed(modules) if one.get("path")]
        for path in filter(Path.is_file, copied):
            target = folder / path.relative_to(checkpoint.path)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    else:
        for name, values in made.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _write_plain(folder, config, names)


def sentence_files(embedder: EmbedderConfig) -> dict[str, Any]:
    """Their values by name, in the spelling that every version of sentence-transformers reads."""
    kinds = ["Transformer", "Pooling", *["Dense"] * len(embedder.dense), *["Normalize"] * embedder.normalize]
    modules = [
        {"idx": n, "name": str(n), "path": f"{n}_{kind}" if n else "", "type": f"{_MODULE}{kind}"}
        for n, kind in enumerate(kinds)
    ]
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    pooling = {
        "word_embedding_dimension": embedder.hidden_size,
        **{f"pooling_mode_{mode}": mode == "mean_tokens" for mode in modes},
        "include_prompt": embedder.include_prompt,
    }
    dense = {
        f"{_dense_name(number)}/config.json": {
            "in_features": one.inputs,
            "out_features": one.outputs,
            "bias": one.bias,
            "activation_function": _TORCH[one.activation],
        }
        for number, one in enumerate(embedder.dense)
    }
    prompts = {
        "model_type": "SentenceTransformer",
        "prompts": dict(embedder.prompts),
        "default_prompt_name": embedder.default_prompt,
        "similarity_fn_name": "cosine",
    }
    length = {"max_seq_length": embedder.max_length, "do_lower_case": False}
    return {MODULES: modules, "1_Pooling/config.json": pooling, **dense, PROMPT_FILE: prompts, LENGTH_FILE: length}


def _dense_name(number: int) -> str:
    return f"{number + 2}_Dense"


def dense_folders(modules: Path) -> list[str]:
    """The folders of the matrices, in order."""
    return [one["path"] for one in _listed(modules) if str(one["type"]).endswith("Dense")]


def _listed(modules: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(modules.read_text(encoding="utf-8"))  # read_embedder has checked it
    return found


def _write_plain(folder: Path, config: Config, names: list[str]) -> None:
    """The matrices once more, in folders of their own, if none is packed."""
    tensors = read_folder(folder, config)
    if any(name.startswith("dense.") and name.endswith(".scales") for name in tensors):
        return
    for number, name in enumerate(names):
        parts = {part: tensors.get(f"dense.{number}.{part}") for part in ("weight", "bias")}
        (folder / name).mkdir(exist_ok=True)
        mx.save_safetensors(
            str(folder / name / DENSE_FILE),
            {f"linear.{part}": array for part, array in parts.items() if array is not None},
            metadata={"format": "pt"},
        )

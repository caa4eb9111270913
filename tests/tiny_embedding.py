"""Tiny EmbeddingGemmas on disk, the same wherever they are made: for the goldens, and for every test of embeddings.

    folder = tiny_embedding.write(tmp_path / "e", "plain")

"plain" is written as EmbeddingGemma is published: window 12 (W = 7), every third layer global. "tuned" is a fine-tune
as sentence-transformers 6 saves it: prompts that do not count in the mean, a default prompt, matrices with bias and
tanh, an odd window, no Normalize.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import tiny
import tiny_tokenizer

from convert.tokenizer_files import tokenizer_json
from mlx_gemma3.prompt.vocabulary import CONTROL_NAMES, Vocabulary

KINDS = ("plain", "tuned")
WIDTH, INNER, MAX_LENGTH = 64, 128, 60
CONFIG: dict[str, Any] = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3TextModel"],
    "use_bidirectional_attention": True,
    "vocab_size": 512,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "query_pre_attn_scalar": 32,
    "sliding_window": 12,
    "sliding_window_pattern": 3,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: "}
# name: (prompt's name, text); the last is longer than MAX_LENGTH
CASES: dict[str, tuple[str | None, str]] = {
    "empty": (None, ""),
    "one_letter": (None, "a"),
    "window_and_more": (None, "the user is in"),
    "query": ("query", "is the model in?"),
    "document": ("document", "the model is the user"),
    "bytes": (None, "naïve 🐟 中文"),
    "control": ("query", "a <end_of_turn> b <bos> c"),
    "blanks": (None, "  two  \n\n lines\n"),
    "cut": ("document", "the model and the user in the den " * 4),
}


def config(kind: str) -> dict[str, Any]:
    return CONFIG if kind == "plain" else CONFIG | {"sliding_window": 9, "sliding_window_pattern": 2}


def dense(kind: str) -> list[dict[str, np.ndarray]]:
    """The matrices after pooling: weight (out, in), and for "tuned" a bias."""
    random = np.random.default_rng(7)
    found = []
    for inputs, outputs in ((WIDTH, INNER), (INNER, WIDTH)):
        part = {"weight": random.standard_normal((outputs, inputs)) / np.sqrt(inputs)}
        if kind == "tuned":
            part["bias"] = 0.1 * random.standard_normal(outputs)
        found.append({name: values.astype(np.float32) for name, values in part.items()})
    return found


def tensors(kind: str) -> tiny.Tensors:
    """Canonical names, without the matrices after pooling."""
    return tiny.random_tensors(config(kind), seed=KINDS.index(kind))


def vocabulary() -> Vocabulary:
    known = tiny_tokenizer.pieces()
    added = {piece for piece in known if piece in tiny_tokenizer.PLACES.values() or piece.startswith("<unused")}
    return Vocabulary("tests", tuple(known), frozenset(added), CONTROL_NAMES & set(known))


def write(folder: Path, kind: str) -> Path:
    """A folder as sentence-transformers has it."""
    folder.mkdir(parents=True)
    values = {
        name.removeprefix("language_model."): mx.array(array) for name, array in tensors(kind).items()
    }  # no prefix, as published
    mx.save_safetensors(str(folder / "model.safetensors"), values, metadata={"format": "pt"})
    write_tokenizer(folder)
    write_modules(folder, kind)
    _json(folder / "config.json", config(kind))
    for place, part in zip(("2_Dense", "3_Dense"), dense(kind), strict=True):
        arrays = {f"linear.{name}": mx.array(array) for name, array in part.items()}
        mx.save_safetensors(str(folder / place / "model.safetensors"), arrays, metadata={"format": "pt"})
    return folder


def write_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(tokenizer_json(vocabulary(), eos=True))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _json(folder / "tokenizer_config.json", {"tokenizer_class": "GemmaTokenizer", **names})


def write_modules(folder: Path, kind: str) -> None:
    """Everything but config.json, weights and tokenizer."""
    old = kind == "plain"
    room = "sentence_transformers.models." if old else "sentence_transformers.base.modules."
    kinds = ["Transformer", "Pooling", "Dense", "Dense", *(["Normalize"] if old else [])]
    modules = [
        {"idx": n, "name": str(n), "path": f"{n}_{name}" if n else "", "type": room + ("" if old else "x.") + name}
        for n, name in enumerate(kinds)
    ]
    if not old:  # as version 6 calls them
        modules[0]["type"] = "sentence_transformers.base.modules.transformer.Transformer"
        modules[1]["type"] = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
        modules[2]["type"] = modules[3]["type"] = "sentence_transformers.base.modules.dense.Dense"
    _json(folder / "modules.json", modules)
    pooling: dict[str, Any] = {"embedding_dimension": WIDTH, "pooling_mode": "mean", "include_prompt": False}
    if old:
        pooling = {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    _json(folder / "1_Pooling" / "config.json", pooling)
    activation = {"activation_function": "torch.nn.modules.linear.Identity"} if old else {}  # absent: tanh
    for place, (inputs, outputs) in (("2_Dense", (WIDTH, INNER)), ("3_Dense", (INNER, WIDTH))):
        values = {"in_features": inputs, "out_features": outputs, "bias": not old, **activation}
        _json(folder / place / "config.json", values)
    _json(folder / "sentence_bert_config.json", {"max_seq_length": MAX_LENGTH, "do_lower_case": False})
    prompts = {"prompts": PROMPTS, "default_prompt_name": None if old else "document", "similarity_fn_name": "cosine"}
    _json(folder / "config_sentence_transformers.json", prompts)


def _json(path: Path, values: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")

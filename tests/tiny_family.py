"""Tiny checkpoints of Gemma 3's family on disk, the same wherever they are made: for the goldens and for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
import tiny_tokenizer

from convert.tokenizer_files import tokenizer_json

TEMPLATES = Path(__file__).parent / "templates"
KINDS = ("functiongemma", "translategemma", "shieldgemma-2", "thinking", "gemma-3")
CLASSES = (380, 390)  # ids that stand for Yes and No
SETTINGS = {
    **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")},
    "extra_special_tokens": {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    },
    "tokenizer_class": "GemmaTokenizer",
    "clean_up_tokenization_spaces": False,
}


def write_words(folder: Path, kind: str) -> Path:
    """The tokenizer and the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(tokenizer_json(tiny_tokenizer.family_vocabulary()))
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    text = (TEMPLATES / f"{kind}.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    return folder


def config_of(kind: str) -> dict[str, Any]:
    if kind in ("translategemma", "shieldgemma-2", "gemma-3"):
        config = tiny.image_config(max_position_embeddings=4096)
        if kind == "shieldgemma-2":
            config |= {"model_type": "shieldgemma2"}
            config |= dict(zip(("yes_token_index", "no_token_index"), CLASSES, strict=True))
        return config
    return tiny.text_config()


def write(folder: Path, kind: str) -> Path:
    """A whole checkpoint, its weights drawn at random."""
    config = config_of(kind)
    style = "hub" if "vision_config" in config else "text"
    tiny.write_folder(folder, config, tiny.random_tensors(config, seed=17), style=style)
    if kind == "shieldgemma-2":
        (folder / "processor_config.json").write_text('{"image_seq_length": 4}', encoding="utf-8")
    return write_words(folder, kind)

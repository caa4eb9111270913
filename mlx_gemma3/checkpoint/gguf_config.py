"""What the headers of GGUF files say of the model: the settings that become a Config, and which vision file fits.

Knows nothing of the tensors' numbers (gguf.py) nor of the vocabulary (prompt/vocabulary.py).

Source: llama.cpp's converter (conversion/gemma.py) and its graph (src/models/gemma3.cpp).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config
from ..errors import CheckpointError, ConfigError
from ..gguf_header import GGUFHeader

# Layers of 4B, 12B and 27B, whose global layers the reference runs with positions / 8. Files by llama.cpp's converter
# say so; those by early versions of Ollama leave it out, and llama.cpp then runs them unscaled.
_SCALED_LAYERS = (34, 48, 62)
_LAYERS_27B = 62
_VOCAB_WITH_IMAGES = 262208


def read_config(header: GGUFHeader, projector: GGUFHeader | None = None) -> Config:
    """The settings of a text file and, where there is one, its vision part.

    What GGUF does not say is what llama.cpp takes for granted: every sixth layer global, local theta 10,000, and
    query_pre_attn_scalar = head_dim but for 27B, where it is hidden / heads.

    Raises:
        ConfigError: another architecture, a setting missing or out of range.
    """
    settings = _Settings(header, "gemma3")
    architecture = header.settings.get("general.architecture")
    if architecture != "gemma3":
        do = "this program runs Gemma 3 only" if architecture != "clip" else "give the text model beside it"
        raise ConfigError(f"{header.path}: general.architecture", got=repr(architecture), want="'gemma3'", do=do)
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{header.path}", got="no token_embd.weight", want="a Gemma 3 text model")
    layers, width, heads = (settings[key] for key in ("block_count", "embedding_length", "attention.head_count"))
    head_dim = settings.get("attention.key_length", 256)
    context = settings.get("context_length", 131072)
    window = settings.get("attention.sliding_window", 0)
    if not window and settings.get("final_logit_softcapping", 0.0):
        raise ConfigError(f"{header.path}: final_logit_softcapping", got="set", want="none, as in Gemma 3")
    text = {
        "model_type": "gemma3_text",
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": width,
        "intermediate_size": settings["feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": settings.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "query_pre_attn_scalar": width / heads if layers == _LAYERS_27B else head_dim,
        "sliding_window": window or context,
        "sliding_window_pattern": 6 if window else 1,
        "rope_theta": settings.get("rope.freq_base", settings.get("rope.global.freq_base", 1e6)),
        "rope_local_base_freq": settings.get("rope.freq_base_swa", settings.get("rope.local.freq_base", 1e4)),
        "rope_scaling": _rope_scaling(settings, layers),
        "rms_norm_eps": settings.get("attention.layer_norm_rms_epsilon", 1e-6),
        "max_position_embeddings": context,
    }
    vocabulary = _Settings(header, "tokenizer.ggml")
    eos = [vocabulary.get(key, None) for key in ("eos_token_id", "eot_token_id")]
    top = {
        "bos_token_id": vocabulary.get("bos_token_id", 2),
        "pad_token_id": vocabulary.get("padding_token_id", 0),
        "eos_token_id": list(dict.fromkeys(token for token in (*eos, 1, 106) if token is not None)),
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    if projector is None:
        return Config.from_dict({**text, **top})
    return Config.from_dict({**_image_settings(header, projector, text), **top})


def _rope_scaling(settings: _Settings, layers: int) -> dict[str, Any] | None:
    kind, factor = settings.get("rope.scaling.type", None), settings.get("rope.scaling.factor", None)
    if kind is None and factor is None:
        return {"rope_type": "linear", "factor": 8.0} if layers in _SCALED_LAYERS else None
    if kind == "none" or factor is None:
        return None
    return {"rope_type": kind or "linear", "factor": factor}


def _image_settings(header: GGUFHeader, projector: GGUFHeader, text: dict[str, Any]) -> dict[str, Any]:
    vision = _Settings(projector, "clip.vision")
    image, patch = vision["image_size"], vision["patch_size"]
    tokens = header.settings.get("tokenizer.ggml.tokens") or []
    ids = {
        key: tokens.index(piece) if piece in tokens else published
        for key, piece, published in (
            ("boi_token_index", "<start_of_image>", 255999),
            ("eoi_token_index", "<end_of_image>", 256000),
            ("image_token_index", "<image_soft_token>", 262144),
        )
    }
    if ids["image_token_index"] >= text["vocab_size"]:  # the converter drops the rows that the vocabulary lacks
        text = {**text, "vocab_size": _VOCAB_WITH_IMAGES}
    side = image // patch // vision.get("projector.scale_factor", 4)
    return {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": vision["embedding_length"],
            "intermediate_size": vision["feed_forward_length"],
            "num_hidden_layers": vision["block_count"],
            "num_attention_heads": vision["attention.head_count"],
            "image_size": image,
            "patch_size": patch,
            "layer_norm_eps": vision.get("attention.layer_norm_epsilon", 1e-6),
        },
        "mm_tokens_per_image": side * side,
        **ids,
    }


class _Settings:
    """One file's settings under a prefix; float32 values as the decimal numbers they were written as."""

    def __init__(self, header: GGUFHeader, prefix: str) -> None:
        self.header, self.prefix = header, prefix

    def __getitem__(self, key: str) -> Any:
        if (value := self.get(key, None)) is None:
            raise ConfigError(f"{self.header.path}: {self.prefix}.{key}", got="nothing", want="a value")
        return value

    def get(self, key: str, default: Any) -> Any:
        value = self.header.settings.get(f"{self.prefix}.{key}", default)
        return float(str(np.float32(value))) if isinstance(value, float) else value


def find_projector(header: GGUFHeader) -> GGUFHeader | None:
    """The vision part of a text file: a .gguf called …mmproj… in the same folder, made for a decoder of this width.

    Of several, the one that rounds least: bf16 (as published), then f32, f16, the others.
    """

    def by_precision(path: Path) -> tuple[int, str]:
        name = path.name.lower()
        return next((place for place, kind in enumerate(("bf16", "f32", "f16")) if kind in name), 3), name

    found = [path for path in header.path.parent.glob("*.gguf") if "mmproj" in path.name.lower()]
    for path in sorted(found, key=by_precision):
        candidate = GGUFHeader.read(path)
        kind = candidate.settings.get("clip.projector_type") or candidate.settings.get("clip.vision.projector_type")
        shapes = {tensor.name: tensor.shape for tensor in candidate.tensors}
        width = header.settings.get("gemma3.embedding_length")
        if kind == "gemma3" and width in shapes.get("mm.input_projection.weight", ()):
            return candidate
    return None

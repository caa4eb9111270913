"""What the headers of GGUF files say of the model: the settings that become a Config, and which vision part fits.

Knows nothing of the tensors' numbers (gguf.py) nor of the vocabulary (prompt/vocabulary.py).

Sources: llama.cpp's converter (conversion/gemma.py) and its graph (src/models/gemma3.cpp); Ollama's converter
(convert/convert_gemma3.go) for files that hold both parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..boundary.gguf_header import GGUFHeader, part_names, peek
from ..config import GLOBAL, LOCAL, Config
from ..embedder_config import PROMPTS, DenseConfig, EmbedderConfig
from ..errors import CheckpointError, ConfigError

# Layers of 4B, 12B and 27B, whose global layers the reference runs with positions / 8. Files by llama.cpp's converter
# say so; those by early versions of Ollama leave it out, and llama.cpp then runs them unscaled.
_SCALED_LAYERS = (34, 48, 62)
_LAYERS_27B = 62
_VOCAB_WITH_IMAGES = 262208
_MEAN = 1  # llama.cpp's number of pooling by the mean
# The matrices of an embedding model, as llama.cpp and Ollama call them.
_DENSE = (("dense_2.weight", "dense.0.weight"), ("dense_3.weight", "dense.1.weight"))
_NO_MODEL: Mapping[str, tuple[str, str]] = {  # general.type, or what the architecture tells: what it is, what to do
    "adapter": ("a LoRA adapter", "merge it into its base model first: llama.cpp's llama-export-lora, or PEFT"),
    "imatrix": ("statistics for quantising (an imatrix)", "give the model's own file"),
    "vision": ("the vision part of a model (mmproj)", "give the text model beside it"),
    "vocab": ("a vocabulary without a model", "give the model's own file"),
}


def kind_of(path: Path) -> str:
    """What a GGUF file holds: "model", or a key of what is no model. Of a damaged one its name decides, and it is
    refused when it is read.
    """
    try:
        return _kind(peek(path))
    except CheckpointError:
        return "vision" if "mmproj" in path.name.lower() else "model"


def _kind(settings: Mapping[str, Any]) -> str:
    kind, architecture = settings.get("general.type"), settings.get("general.architecture")
    if kind == "mmproj" or (isinstance(architecture, str) and architecture == "clip"):
        return "vision"
    return kind if isinstance(kind, str) and kind in _NO_MODEL else "model"


def read_config(header: GGUFHeader, projector: GGUFHeader | None = None) -> Config:
    """The settings of a text file and, where there is one, its vision part.

    What GGUF does not say is what llama.cpp takes for granted: every sixth layer global, local theta 10,000, and
    query_pre_attn_scalar = head_dim but for 27B, where it is hidden / heads.

    Raises:
        ConfigError: another architecture, a setting missing or out of range.
        CheckpointError: a setting of another type, or a file that is no model.
    """
    if (kind := _kind(header.settings)) != "model":
        what, do = _NO_MODEL[kind]
        raise CheckpointError(f"{header.path}", got=what, want="a Gemma 3 text model", do=do)
    architecture = header.get("general.architecture", "text")
    if architecture not in ("gemma3", "gemma-embedding"):
        raise ConfigError(
            f"{header.path}: general.architecture",
            got=repr(architecture),
            want="'gemma3' or 'gemma-embedding'",
            do="this program runs Gemma 3 only",
        )
    settings = _Settings(header, architecture)
    # llama.cpp has an architecture of its own for embedding models; Ollama's converter says how they pool.
    embeds = architecture == "gemma-embedding" or bool(settings.whole("pooling_type", 0))
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{header.path}", got="no token_embd.weight", want="a Gemma 3 text model")
    layers, width = settings.must("block_count"), settings.must("embedding_length")
    heads = settings.alike("attention.head_count", None)
    head_dim = settings.whole("attention.key_length", 256)
    context = settings.whole("context_length", 131072)
    window = settings.whole("attention.sliding_window", 0)
    scalar = width / heads if layers == _LAYERS_27B and heads else head_dim
    _refuse_set(settings, ("final_logit_softcapping", "attn_logit_softcapping"))
    scale = settings.number("attention.scale", None)
    if scale and abs(scale - scalar**-0.5) > 1e-4 * scale:
        raise ConfigError(
            f"{header.path}: {architecture}.attention.scale", got=scale, want=f"{scalar**-0.5:.6g}, as Gemma 3"
        )
    text: dict[str, Any] = {
        "model_type": "gemma3_text",
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": width,
        "intermediate_size": settings.alike("feed_forward_length", None),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": settings.alike("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "query_pre_attn_scalar": scalar,
        "sliding_window": window or context,
        **_pattern(settings, window),
        "rope_theta": settings.number("rope.freq_base", settings.number("rope.global.freq_base", 1e6)),
        "rope_local_base_freq": settings.number("rope.freq_base_swa", settings.number("rope.local.freq_base", 1e4)),
        "rope_scaling": _rope_scaling(settings, layers),
        "rms_norm_eps": settings.number("attention.layer_norm_rms_epsilon", 1e-6),
        "max_position_embeddings": context,
        "use_bidirectional_attention": embeds,
    }
    vocabulary = _Settings(header, "tokenizer.ggml")
    eos = [vocabulary.whole(key, None) for key in ("eos_token_id", "eot_token_id")]
    top = {
        "bos_token_id": vocabulary.whole("bos_token_id", 2),
        "pad_token_id": vocabulary.whole("padding_token_id", 0),
        "eos_token_id": list(dict.fromkeys(token for token in (*eos, 1, 106) if token is not None)),
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    if embeds:
        found = Config.from_dict({**text, **top, "tie_word_embeddings": True})
        return replace(found, embedder=_embedder(settings, vocabulary, found, shapes))
    if projector is None:
        return Config.from_dict({**text, **top})
    return Config.from_dict({**_image_settings(header, projector, text), **top})


def _embedder(
    settings: _Settings, vocabulary: _Settings, config: Config, shapes: Mapping[str, tuple[int, ...]]
) -> EmbedderConfig:
    """An embedding model's: GGUF keeps no prompts, so they are EmbeddingGemma's. A file without the two matrices is
    one that llama.cpp's converter made without --sentence-transformers-dense-modules."""
    pooling = settings.whole("pooling_type", _MEAN)
    if pooling != _MEAN:
        raise ConfigError(f"{settings.header.path}: {settings.prefix}.pooling_type", got=pooling, want="1, the mean")
    matrices = [shapes[name] for pair in _DENSE for name in pair if name in shapes]
    if not all(len(shape) == 2 for shape in matrices):
        raise CheckpointError(f"{settings.header.path}: dense", got=matrices, want="matrices")
    said = vocabulary.header.get
    bos, eos = (said(f"tokenizer.ggml.add_{name}_token", "switch", True) for name in ("bos", "eos"))
    return EmbedderConfig(
        hidden_size=config.text.hidden_size,
        max_length=config.text.max_position_embeddings,
        dense=tuple(DenseConfig(inputs=shape[1], outputs=shape[0]) for shape in matrices),
        prefix=(config.bos_token_id,) * bos,
        suffix=(vocabulary.whole("eos_token_id", 1),) * eos,
        prompts=PROMPTS,
    )


def _pattern(settings: _Settings, window: int) -> dict[str, Any]:
    """Which layers are global: every n-th, or as a list says (true: a local one)."""
    name = "attention.sliding_window_pattern"
    said = settings.header.settings.get(f"{settings.prefix}.{name}")
    if not window:
        return {"sliding_window_pattern": 1}
    if isinstance(said, np.ndarray):
        return {"layer_types": [LOCAL if local else GLOBAL for local in said.tolist()]}
    return {"sliding_window_pattern": settings.whole(name, 6)}


def _refuse_set(settings: _Settings, names: tuple[str, ...]) -> None:
    for name in names:
        if value := settings.number(name, 0.0):
            raise ConfigError(f"{settings.header.path}: {name}", got=value, want="none, as in Gemma 3")


def _rope_scaling(settings: _Settings, layers: int) -> dict[str, Any] | None:
    kind = settings.header.get(f"{settings.prefix}.rope.scaling.type", "text")
    factor = settings.number("rope.scaling.factor", None)
    if kind is None and factor is None:
        return {"rope_type": "linear", "factor": 8.0} if layers in _SCALED_LAYERS else None
    if kind == "none" or factor is None:
        return None
    return {"rope_type": kind or "linear", "factor": factor}


def _image_settings(header: GGUFHeader, projector: GGUFHeader, text: dict[str, Any]) -> dict[str, Any]:
    vision = _Settings(projector, "clip.vision" if projector.path != header.path else "gemma3.vision")
    image, patch = vision.must("image_size"), vision.must("patch_size")
    tokens = header.get("tokenizer.ggml.tokens", "texts", [])
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
    side = image // max(patch, 1) // max(vision.whole("projector.scale_factor", 4), 1)
    per_image = header.get("gemma3.mm.tokens_per_image", "whole") if projector.path == header.path else None
    return {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": vision.must("embedding_length"),
            "intermediate_size": vision.must("feed_forward_length"),
            "num_hidden_layers": vision.must("block_count"),
            "num_attention_heads": vision.must("attention.head_count"),
            "image_size": image,
            "patch_size": patch,
            "layer_norm_eps": vision.number("attention.layer_norm_epsilon", 1e-6),
        },
        "mm_tokens_per_image": per_image or side * side,
        **ids,
    }


class _Settings:
    """One file's settings under a prefix."""

    def __init__(self, header: GGUFHeader, prefix: str) -> None:
        self.header, self.prefix = header, prefix

    def whole(self, key: str, default: Any) -> Any:
        return self.header.get(f"{self.prefix}.{key}", "whole", default)

    def number(self, key: str, default: Any) -> Any:
        return self.header.get(f"{self.prefix}.{key}", "number", default)

    def must(self, key: str) -> int:
        value: int | None = self.whole(key, None)
        if value is None:
            raise ConfigError(f"{self.header.path}: {self.prefix}.{key}", got="nothing", want="a whole number")
        return value

    def alike(self, key: str, default: int | None) -> int:
        """One number for all layers, or a list of it."""
        value = self.header.settings.get(name := f"{self.prefix}.{key}", default)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and len(set(value.tolist())) == 1:
            return int(value[0])
        if isinstance(value, np.ndarray):
            raise ConfigError(
                f"{self.header.path}: {name}", got="a list of different numbers", want="one for all layers"
            )
        return self.must(key) if default is None else int(self.whole(key, default))


class Headers(NamedTuple):
    """The parts of a model in GGUF."""

    text: GGUFHeader
    vision: GGUFHeader | None
    missing: str = ""  # why there is no vision part, and what to do, where there should be one


def read_headers(path: Path, *, text_only: bool) -> Headers:
    """Of a model's file: the text, whole where it is split, and the vision part, inside it or in a file of its own.

    Raises:
        CheckpointError: damaged headers.
    """
    header = GGUFHeader.read_whole(path)
    inside = tuple(tensor for tensor in header.tensors if tensor.name.startswith(("v.", "mm.")))
    if inside and "gemma3.vision.block_count" in header.settings:
        outside = tuple(tensor for tensor in header.tensors if not tensor.name.startswith(("v.", "mm.")))
        text, vision = replace(header, tensors=outside), replace(header, tensors=inside)
        return Headers(text, None if text_only else vision)
    if text_only:
        return Headers(header, None)
    found, misfit = find_projector(header)
    if found is not None or (header.settings.get("gemma3.block_count") not in _SCALED_LAYERS and not misfit):
        return Headers(header, found)
    beside = f"put the model's mmproj….gguf beside {header.path.name}"
    return Headers(header, None, f"{misfit}; {beside}" if misfit else beside)


def find_projector(header: GGUFHeader) -> tuple[GGUFHeader | None, str]:
    """The vision part of a text file: a GGUF file that is one, in the same folder or one up, for a decoder of this
    width. Of several the one in the same folder, then the one that rounds least: bf16 (as published), f32, f16, others.

    Returns:
        it, and where there is none what is wrong with one that is there.

    Raises:
        CheckpointError: none fits, and one is damaged.
    """

    def order(path: Path) -> tuple[bool, int, str]:
        name = path.name.lower()
        kind = next((place for place, kind in enumerate(("bf16", "f32", "f16")) if kind in name), 3)
        return path.parent != header.path.parent, kind, name

    width, misfit = header.settings.get("gemma3.embedding_length"), ""
    damaged: CheckpointError | None = None
    for path in sorted(_visions(header.path), key=order):
        try:
            candidate = GGUFHeader.read(path)
            projectors = [candidate.get(key, "text") for key in ("clip.projector_type", "clip.vision.projector_type")]
        except CheckpointError as error:
            damaged = damaged or error
            continue
        shapes = {tensor.name: tensor.shape for tensor in candidate.tensors}
        if "gemma3" in projectors and width in shapes.get("mm.input_projection.weight", ()):
            return candidate, ""
        misfit = misfit or f"{path.name} is the vision part of another model"
    if damaged is not None:
        raise damaged
    return None, misfit


def _visions(model: Path) -> list[Path]:
    """Files that hold a vision part, or claim it by their name, beside a model and one folder up."""
    found = []
    for folder in dict.fromkeys((model.absolute().parent, model.absolute().parent.parent)):
        try:
            names = sorted(folder.glob("*.[gG][gG][uU][fF]"))
        except OSError:
            continue
        own = part_names(model.name) or [model.name]
        for path in names:
            if path.name not in own and path.is_file():
                named = "mmproj" in path.name.lower() and folder == model.absolute().parent
                if named or kind_of(path) == "vision":
                    found.append(path)
    return found

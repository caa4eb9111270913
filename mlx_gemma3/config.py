"""What a checkpoint's config.json says about the model: frozen, complete, read strictly.

Owns the defaults of sparse configs, the two spellings of RoPE and of the layer pattern, and the refusal of
settings that this implementation does not compute. Knows nothing of arrays.

Source of the defaults and rules: Hugging Face transformers 5.23, configuration_gemma3.py and
configuration_siglip.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from .boundary.arguments import takes
from .boundary.reading import read_json
from .embedder_config import EmbedderConfig
from .errors import ConfigError

GLOBAL, LOCAL = "full_attention", "sliding_attention"

# What a size may be: far beyond any Gemma 3, and small enough that a file which claims it does no harm. Asked before
# anything is made from it, whatever the file was (config.json or GGUF).
BOUNDS: Mapping[str, tuple[float, float]] = {
    "vocab_size": (1, 1 << 22),
    "hidden_size": (1, 1 << 16),
    "intermediate_size": (1, 1 << 19),
    "num_hidden_layers": (1, 1 << 10),
    "num_attention_heads": (1, 1 << 10),
    "num_key_value_heads": (1, 1 << 10),
    "head_dim": (2, 1 << 12),
    "sliding_window": (1, 1 << 20),
    "max_position_embeddings": (1, 1 << 24),
    "query_pre_attn_scalar": (1e-6, 1e9),
    "rope_theta": (1e-3, 1e15),
    "rope_scale": (1e-6, 1e9),
    "rope_local_theta": (1e-3, 1e15),
    "rms_norm_eps": (1e-30, 1),
    "image_size": (1, 1 << 13),
    "patch_size": (1, 1 << 13),
    "layer_norm_eps": (1e-30, 1),
    "mm_tokens_per_image": (1, 1 << 16),
}
_MOST_PATCHES = 1 << 9  # of a side: the scores of one head are as many, to the fourth power

# A key that we do not know is refused when its name holds one of these words and its value says something: ignoring it
# would change the answer. Any other unknown key (bookkeeping of a training tool) is let pass.
_SEMANTIC_WORDS = frozenset(
    "act activation activations attention attn bias biases conv embed embedding embeddings expert experts head heads "
    "hidden intermediate kv layer layers moe norm norms pool pooling query rescale rope rotary scalar scale scaled "
    "scaling softcap softcapping theta vocab vocabulary window windows".split()
)
_SEMANTIC_PAIRS = frozenset((("token", "index"), ("token", "id"), ("token", "ids")))
# A key with one of these words is about training or bookkeeping, whatever else it says.
_HARMLESS_WORDS = frozenset(
    "cache checkpointing coef decay drop dropout dropped grad gradient implementation init initializer initialized "
    "label labels loss lora lr noise optimizer original output outputs padded pdrop pruned rate return std train "
    "trainable training unsloth wd".split()
)
# Keys with such a word that do not change what the model computes.
_INERT = frozenset(
    "add_cross_attention bos_token_id cross_attention_hidden_size decoder_start_token_id eos_token_id "
    "forced_bos_token_id forced_eos_token_id pad_token_id sep_token_id".split()
)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The decoder. Sizes are counts of elements; angles and positions as in the reference."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # K, divides H
    head_dim: int  # not hidden_size / H
    query_pre_attn_scalar: float  # scores are multiplied by this ** -0.5
    sliding_window: int  # W: a local query sees itself and the W - 1 keys before it
    layer_types: tuple[str, ...]  # GLOBAL or LOCAL, one a layer
    rope_theta: float  # global layers
    rope_scale: float  # global layers: positions are divided by this (linear scaling)
    rope_local_theta: float  # local layers, never scaled
    rms_norm_eps: float
    max_position_embeddings: int
    # EmbeddingGemma: no causality; W is then half of the file's sliding_window and one, and a local query sees the
    # W - 1 keys on each side (transformers 5.23, configuration_gemma3.py:102)
    bidirectional: bool = field(default=False, repr=False)

    def is_global(self, layer: int) -> bool:
        return self.layer_types[layer] == GLOBAL

    def __post_init__(self) -> None:
        for one in fields(self):
            if one.name not in ("layer_types", "bidirectional"):
                _within(one.name, getattr(self, one.name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                "num_key_value_heads",
                got=self.num_key_value_heads,
                want=f"a divisor of num_attention_heads {self.num_attention_heads} (config.json)",
            )
        if self.head_dim % 2:
            raise ConfigError("head_dim", got=self.head_dim, want="an even number (config.json)")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ConfigError(
                "layer_types",
                got=f"{len(self.layer_types)} entries",
                want=f"num_hidden_layers = {self.num_hidden_layers} (config.json)",
            )
        for kind in self.layer_types:
            if kind not in (GLOBAL, LOCAL):
                raise ConfigError("layer_types", got=repr(kind), want=f"{GLOBAL!r} or {LOCAL!r} (config.json)")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The SigLIP tower: a square picture of image_size pixels, cut into patches of patch_size."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Patches on one side of the picture."""
        return self.image_size // self.patch_size

    def __post_init__(self) -> None:
        for one in fields(self):
            _within(one.name, getattr(self, one.name), "vision_config.")
        if self.image_size % self.patch_size:
            raise ConfigError(
                "vision_config.image_size",
                got=self.image_size,
                want=f"a multiple of patch_size {self.patch_size} (config.json)",
            )
        if self.grid > _MOST_PATCHES:
            raise ConfigError(
                "vision_config.patch_size",
                got=f"{self.grid} patches on a side",
                want=f"at most {_MOST_PATCHES} (config.json)",
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                "vision_config.hidden_size",
                got=self.hidden_size,
                want=f"a multiple of num_attention_heads {self.num_attention_heads} (config.json)",
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole checkpoint: the decoder, the vision tower if there is one, and what joins them.

    Build it with `from_file` or `from_dict`; every field is then set, whatever the file left out.
    """

    text: TextConfig
    vision: VisionConfig | None = None
    mm_tokens_per_image: int = 256  # T: rows that one picture takes in the prompt
    boi_token_id: int = 255999  # <start_of_image>
    eoi_token_id: int = 256000  # <end_of_image>
    image_token_id: int = 262144  # <image_soft_token>
    bos_token_id: int = 2
    pad_token_id: int = 0
    eos_token_ids: tuple[int, ...] = (1, 106)
    tie_word_embeddings: bool = True
    # ShieldGemma 2: the ids of "Yes" and "No", whose logits after the prompt are its classes
    classes: tuple[int, int] | None = field(default=None, repr=False)
    # as MLX writes it: group_size, bits, mode, and entries by module name; None when nothing is packed
    quantization: Mapping[str, Any] | None = field(default=None, hash=False)
    embedder: EmbedderConfig | None = field(default=None, repr=False)  # set by `open_checkpoint`; not in config.json

    def __post_init__(self) -> None:
        rows = self.text.vocab_size
        for name, token in (("pad_token_id", self.pad_token_id), ("bos_token_id", self.bos_token_id)):
            if not 0 <= token < rows:
                raise ConfigError(name, got=token, want=f"an id below vocab_size {rows} (config.json)")
        for name, token in zip(("yes_token_index", "no_token_index"), self.classes or (), strict=False):
            if not 0 <= token < rows:
                raise ConfigError(name, got=token, want=f"an id below vocab_size {rows} (config.json)")
        if self.vision is None:
            return
        if self.text.bidirectional:
            raise ConfigError(
                "use_bidirectional_attention", got="true beside a vision_config", want="false (config.json)"
            )
        _within("mm_tokens_per_image", self.mm_tokens_per_image)
        side = math.isqrt(self.mm_tokens_per_image)
        if side < 1 or side * side != self.mm_tokens_per_image or self.vision.grid % side:
            raise ConfigError(
                "mm_tokens_per_image",
                got=self.mm_tokens_per_image,
                want=f"a square whose root divides the {self.vision.grid} patches of a side (config.json)",
            )
        if not 0 <= self.image_token_id < self.text.vocab_size:
            raise ConfigError(
                "image_token_index",
                got=self.image_token_id,
                want=f"an id below vocab_size {self.text.vocab_size} (config.json)",
            )

    @classmethod
    @takes(path="path")
    def from_file(cls, path: str | Path) -> Config:
        """Read a config.json as the Hub, transformers 4 or 5, mlx-lm or mlx-vlm write it.

        Raises:
            ConfigError: missing or broken file, another model, or a setting that this package does not compute.
        """
        path = Path(path)
        values = read_json(path, ConfigError, want="a config.json")
        if not isinstance(values, dict):
            raise ConfigError(f"{path}", got=type(values).__name__, want="a JSON object")
        return cls.from_dict(values)

    @classmethod
    @takes(values=Mapping)
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """As `from_file`, from the parsed JSON object."""
        model_type = values.get("model_type")
        nested = "text_config" in values
        if model_type not in _MODEL_TYPES or (model_type == "gemma3_text" and nested):
            raise ConfigError(
                "model_type",
                got=repr(model_type),
                want="'gemma3' or 'gemma3_text' (config.json)",
                do="this program runs Gemma 3 only",
            )
        if model_type != "gemma3_text" and not nested:
            raise ConfigError("text_config", got="nothing", want="an object (config.json)")

        text_values = _object(values, "text_config") if nested else values
        # An empty object is what mlx-vlm writes for a text-only model.
        sees = values.get("vision_config") is not None and (nested or values["vision_config"] != {})
        vision_values = _object(values, "vision_config") if sees else None
        # Text settings repeated beside text_config are let pass: text_config decides, as in the reference.
        _refuse_unknown(values, _TEXT_KEYS | _TOP_KEYS, "")
        _refuse_unknown(text_values, _TEXT_KEYS | _TOP_KEYS, "text_config." if nested else "")

        tied = values if values.get("tie_word_embeddings") is not None else text_values
        return cls(
            text=_read_text(text_values),
            vision=_read_vision(vision_values) if vision_values is not None else None,
            mm_tokens_per_image=_number(values, "mm_tokens_per_image", 256),
            boi_token_id=_either(values, "boi_token_index", "boi_token_id", 255999),
            eoi_token_id=_either(values, "eoi_token_index", "eoi_token_id", 256000),
            image_token_id=_either(values, "image_token_index", "image_token_id", 262144),
            bos_token_id=_either(values, "bos_token_id", "bos_token_id", text_values.get("bos_token_id", 2)),
            pad_token_id=_either(values, "pad_token_id", "pad_token_id", text_values.get("pad_token_id", 0)),
            eos_token_ids=_eos_ids(values.get("eos_token_id", text_values.get("eos_token_id"))),
            tie_word_embeddings=_switch(tied, "tie_word_embeddings", True),
            classes=_read_classes(values) if model_type == SHIELD else None,
            quantization=_read_quantization(values),
        )


SHIELD = "shieldgemma2"  # transformers' classifier: a whole Gemma 3 inside
_MODEL_TYPES = ("gemma3", "gemma3_text", SHIELD)
_TEXT_KEYS = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "query_pre_attn_scalar sliding_window sliding_window_pattern _sliding_window_pattern layer_types rope_theta "
    "rope_local_base_freq rope_global_base_freq rope_traditional rope_scaling rope_parameters rms_norm_eps "
    "max_position_embeddings hidden_activation attention_bias attn_logit_softcapping final_logit_softcapping "
    "use_bidirectional_attention tie_word_embeddings hidden_act".split()
)
_VISION_KEYS = frozenset(
    "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size layer_norm_eps "
    "hidden_act num_channels vision_use_head".split()
)
_TOP_KEYS = frozenset(
    "text_config vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index "
    "boi_token_id eoi_token_id image_token_id tie_word_embeddings yes_token_index no_token_index".split()
)


def _read_classes(values: Mapping[str, Any]) -> tuple[int, int]:
    """The ids of "Yes" and "No" (transformers 5.23, configuration_shieldgemma2.py)."""
    return _number(values, "yes_token_index", 10784), _number(values, "no_token_index", 3771)


def _read_text(values: Mapping[str, Any]) -> TextConfig:
    if (kind := values.get("model_type", "gemma3_text")) != "gemma3_text":
        raise ConfigError("text_config.model_type", got=repr(kind), want="'gemma3_text' (config.json)")
    # What the reference would compute differently, and we would not: refused, not ignored.
    _only(values, "hidden_activation", "gelu_pytorch_tanh")
    if values.get("hidden_activation") is None:  # the older name; beside the newer one nobody reads it
        _only(values, "hidden_act", "gelu_pytorch_tanh")
    _only(values, "attention_bias", False)
    _only(values, "attn_logit_softcapping", None)
    _only(values, "final_logit_softcapping", None)
    _only(values, "rope_traditional", False)
    layers = _number(values, "num_hidden_layers")
    _within("num_hidden_layers", layers)  # before as many are listed
    theta, scale, local_theta = _read_rope(values)
    bidirectional, window = _switch(values, "use_bidirectional_attention", False), _number(values, "sliding_window")
    _within("sliding_window", window)
    return TextConfig(
        vocab_size=_number(values, "vocab_size", 262208),
        hidden_size=_number(values, "hidden_size"),
        intermediate_size=_number(values, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=_number(values, "num_attention_heads", 8),
        num_key_value_heads=_number(values, "num_key_value_heads", 4),
        head_dim=_number(values, "head_dim", 256),
        query_pre_attn_scalar=_real(values, "query_pre_attn_scalar", 256),
        sliding_window=window // 2 + 1 if bidirectional else window,
        layer_types=_read_layer_types(values, layers),
        rope_theta=theta,
        rope_scale=scale,
        rope_local_theta=local_theta,
        rms_norm_eps=_real(values, "rms_norm_eps", 1e-6),
        max_position_embeddings=_number(values, "max_position_embeddings", 131072),
        bidirectional=bidirectional,
    )


def _read_quantization(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What MLX writes: bits, group_size and mode for all, and an entry, or false, by module name."""
    name = "quantization" if values.get("quantization") else "quantization_config"
    said = values.get(name)
    if not said and isinstance(said, dict | None):
        return None
    if not isinstance(said, Mapping):
        raise ConfigError(name, got=repr(said), want="an object (config.json)")
    method = said.get("quant_method", "mlx")
    if "bits" not in said or method != "mlx":
        raise ConfigError(
            "quantization_config",
            got=method if method != "mlx" else "no bits",
            want="MLX's own (group_size and bits), or none",
            do="convert the unquantised checkpoint instead",
        )
    _check_entry(name, said)
    for path, entry in said.items():
        if isinstance(entry, Mapping):
            _check_entry(f"{name}.{path}", entry)
        elif path not in _ENTRY and not isinstance(entry, bool | str | None):
            raise ConfigError(f"{name}.{path}", got=repr(entry), want="an object, or false (config.json)")
    return said


_ENTRY = ("bits", "group_size", "mode", "quantize_input")


def _check_entry(name: str, entry: Mapping[str, Any]) -> None:
    for key in ("bits", "group_size"):
        value = entry.get(key)
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise ConfigError(f"{name}.{key}", got=repr(value), want="a whole number (config.json)")
    if not isinstance(mode := entry.get("mode"), str | None):
        raise ConfigError(f"{name}.mode", got=repr(mode), want="a text (config.json)")
    _switch(entry, "quantize_input", False, f"{name}.")


def _read_layer_types(values: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """`layer_types` as given, else every `sliding_window_pattern`-th layer is global (6 when absent)."""
    if (types := values.get("layer_types")) is not None:
        if not isinstance(types, list | tuple):
            raise ConfigError("layer_types", got=repr(types), want="a list (config.json)")
        return tuple(str(kind) for kind in types)
    name = "sliding_window_pattern" if "sliding_window_pattern" in values else "_sliding_window_pattern"
    pattern = _number(values, name, 6)
    _at_least("sliding_window_pattern", pattern, 1)
    return tuple(LOCAL if (layer + 1) % pattern else GLOBAL for layer in range(layers))


def _read_rope(values: Mapping[str, Any]) -> tuple[float, float, float]:
    """(global theta, global scale, local theta) from either spelling.

    Old: rope_theta, rope_local_base_freq, rope_scaling {rope_type, factor}, the scaling for global layers only.
    New: rope_parameters {full_attention {rope_theta, rope_type, factor}, sliding_attention {…}}.
    """
    parameters = values.get("rope_parameters")
    if parameters is None:
        theta = _real(values, "rope_theta", _real(values, "rope_global_base_freq", 1_000_000.0))  # mlx-vlm's name
        local_theta = _real(values, "rope_local_base_freq", 10_000.0)
        return theta, _rope_scale(values.get("rope_scaling"), "rope_scaling"), local_theta
    if isinstance(parameters, Mapping) and parameters and not set(parameters) & {GLOBAL, LOCAL}:
        return _read_flat_rope(values, parameters)
    if not isinstance(parameters, Mapping) or set(parameters) - {GLOBAL, LOCAL}:
        raise ConfigError(
            "rope_parameters", got=repr(parameters), want=f"an object with {GLOBAL} and {LOCAL} (config.json)"
        )
    of_global, of_local = (parameters.get(kind) or {} for kind in (GLOBAL, LOCAL))
    for kind, one in ((GLOBAL, of_global), (LOCAL, of_local)):
        if not isinstance(one, Mapping):
            raise ConfigError(f"rope_parameters.{kind}", got=repr(one), want="an object (config.json)")
    if (scale := _rope_scale(of_local, f"rope_parameters.{LOCAL}")) != 1.0:
        raise ConfigError(f"rope_parameters.{LOCAL}.factor", got=scale, want="no scaling (config.json)")
    theta, local_theta = _real(of_global, "rope_theta", 1e6), _real(of_local, "rope_theta", 1e4)
    return theta, _rope_scale(of_global, f"rope_parameters.{GLOBAL}"), local_theta


_ROPE_KEYS = frozenset(("rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings"))


def _read_flat_rope(values: Mapping[str, Any], parameters: Mapping[str, Any]) -> tuple[float, float, float]:
    """`rope_parameters` without the two kinds of layers: the reference passes it over, so it may say nothing else."""
    used = _read_rope({name: value for name, value in values.items() if name != "rope_parameters"})
    flat = _real(parameters, "rope_theta", used[0]), _rope_scale(parameters, "rope_parameters")
    if flat != used[:2]:
        raise ConfigError(
            "rope_parameters",
            got=repr(dict(parameters)),
            want=f"an object with {GLOBAL} and {LOCAL} (config.json)",
            do="the reference reads nothing else",
        )
    return used


def _rope_scale(values: Any, name: str) -> float:
    if values is None:
        return 1.0
    if not isinstance(values, Mapping):
        raise ConfigError(name, got=repr(values), want="an object or null (config.json)")
    kind = values.get("rope_type", values.get("type", "default"))
    if unknown := set(values) - _ROPE_KEYS:
        raise ConfigError(f"{name}.{min(unknown)}", got="an unknown setting", want="rope_type and factor (config.json)")
    if kind == "default":
        return 1.0
    if not isinstance(kind, str) or kind != "linear":
        raise ConfigError(f"{name}.rope_type", got=repr(kind), want="'linear' or 'default' (config.json)")
    return _real(values, "factor")


def _read_vision(values: Mapping[str, Any]) -> VisionConfig:
    if (kind := values.get("model_type", "siglip_vision_model")) != "siglip_vision_model":
        raise ConfigError("vision_config.model_type", got=repr(kind), want="'siglip_vision_model' (config.json)")
    _refuse_unknown(values, _VISION_KEYS, "vision_config.")
    _only(values, "hidden_act", "gelu_pytorch_tanh")
    _only(values, "num_channels", 3)
    _only(values, "vision_use_head", False)
    return VisionConfig(
        hidden_size=_number(values, "hidden_size"),
        intermediate_size=_number(values, "intermediate_size"),
        num_hidden_layers=_number(values, "num_hidden_layers"),
        num_attention_heads=_number(values, "num_attention_heads"),
        image_size=_number(values, "image_size"),
        patch_size=_number(values, "patch_size"),
        layer_norm_eps=_real(values, "layer_norm_eps", 1e-6),
    )


def _refuse_unknown(values: Mapping[str, Any], known: frozenset[str], prefix: str) -> None:
    for name, value in values.items():
        if name not in known and _matters(str(name), value):
            raise ConfigError(
                f"{prefix}{name}",
                got=repr(value),
                want="no such setting (config.json)",
                do="ignoring it could change the answer",
            )


def _matters(name: str, value: Any) -> bool:
    """Whether a key that nobody here knows could change what is computed: by its words, and unless its value is off."""
    if name in _INERT or name.startswith("_") or value is None or value in (False, 0, "", [], {}):
        return False
    words = re.findall(r"[a-z]+|[0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    if _HARMLESS_WORDS.intersection(words):
        return False
    return not _SEMANTIC_WORDS.isdisjoint(words) or not _SEMANTIC_PAIRS.isdisjoint(pairwise(words))


def _only(values: Mapping[str, Any], name: str, want: object) -> None:
    """A setting that the reference computes and we do not: absent, null, or the one value that we do."""
    got = values.get(name)
    if got is not None and (got != want or isinstance(got, bool) != isinstance(want, bool)):
        raise ConfigError(name, got=json.dumps(got)[:80], want=f"{json.dumps(want)} (config.json)")


def _switch(values: Mapping[str, Any], name: str, default: bool, prefix: str = "") -> bool:
    value = values.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{prefix}{name}", got=repr(value), want="true or false (config.json)")
    return value


def _object(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = values[name]
    if not isinstance(value, Mapping):
        raise ConfigError(name, got=repr(value), want="an object (config.json)")
    return value


def _number(values: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = values.get(name)
    value = default if value is None else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(name, got="nothing" if value is None else repr(value), want="a whole number (config.json)")
    return value


def _real(values: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = values.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(name, got="nothing" if value is None else repr(value), want="a number (config.json)")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(name, got="more than a float can hold", want="a number (config.json)") from None


def _either(values: Mapping[str, Any], old: str, new: str, default: int) -> int:
    return _number(values, old if values.get(old) is not None else new, default)


def _eos_ids(value: Any) -> tuple[int, ...]:
    """Ids that end an answer. Gemma 3 ends a text with <eos> 1 and a turn with <end_of_turn> 106."""
    if value is None:
        return (1, 106)
    ids = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not ids or any(type(token) is not int or not 0 <= token < 1 << 31 for token in ids):
        raise ConfigError("eos_token_id", got=repr(value), want="an id or a list of ids (config.json)")
    return ids


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(name, got=value, want=f">= {least} (config.json)")


def _within(name: str, value: float, prefix: str = "") -> None:
    """Refuse a size that no model has."""
    low, high = BOUNDS[name]
    if not low <= value <= high:
        raise ConfigError(f"{prefix}{name}", got=value, want=f"{low:,} to {high:,} (config.json)")

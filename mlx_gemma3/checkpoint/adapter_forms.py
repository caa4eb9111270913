"""How programs write adapters: what adapter_config.json says, and what a tensor's name means.

    PEFT      base_model.model.M.lora_A.weight (r, in), lora_B (out, r), lora_magnitude_vector (out,)
              scale alpha / r, rsLoRA alpha / √r, each by the module's name (rank_pattern, alpha_pattern)
              target_parameters: the projector's matrix (in, out); its pair has its module's name, A (r, out)
    mlx-lm    M.lora_a (in, r), M.lora_b (r, out), M.m (out,); the scale as the config says it. mlx-vlm writes so too
    mlx-vlm   before 0.7: M.A (in, r), M.B (r, out); scale alpha / rank, as mlx-vlm 0.7 reads these

Sources: PEFT 0.21, tuners/lora/config.py and layer.py, utils/other.py (get_pattern_key); mlx-lm 0.32, tuner/utils.py;
mlx-vlm 0.7, trainer/peft/.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors import CheckpointError, ConfigError
from ..model.adapter import PROJECTOR
from .safetensors import TensorInfo

_MERGE = "merge it into the model with PEFT: merge_and_unload() and save_pretrained()"
# Settings of PEFT's LoraConfig that decide nothing of what is computed once the tensors are there.
_HARMLESS = frozenset(
    "peft_type peft_version task_type base_model_name_or_path revision inference_mode auto_mapping r lora_alpha "
    "lora_dropout target_modules exclude_modules layers_to_transform layers_pattern rank_pattern alpha_pattern "
    "use_rslora use_dora fan_in_fan_out init_lora_weights loftq_config eva_config corda_config lora_ga_config "
    "megatron_config megatron_core qalora_group_size ensure_weight_tying enable_lora merge_weights".split()
)
# Ways to begin that leave the model's own weights as they are. The others move a part of them into the adapter.
_BEGUN = (True, False, None, "gaussian", "eva", "orthogonal")


class Form(Protocol):
    """One way to write adapters, as one config has it."""

    name: str
    base: str  # the model that it was made for
    dora: bool
    turned: bool  # its matrices are (in, r) and (r, out)
    parts: Mapping[str, str]  # what "a", "b" and "m" are called
    projector: bool  # whether the projector's matrix is one of its matrices

    def parse(self, name: str) -> tuple[str, str]:
        """The module's name and the part, "a", "b" or "m", of a tensor. Raises CheckpointError: it is neither."""
        ...

    def scale(self, module: str, rank: int) -> float:
        """What the product is multiplied by. Raises ConfigError: the rank is not what the config says."""
        ...

    def rank_of(self, a: TensorInfo) -> int:
        """The rank by A's shape; 0 where it has none."""
        ...


class PEFTForm:
    """PEFT's."""

    name, turned = "PEFT", False
    parts: Mapping[str, str] = {"a": "lora_A", "b": "lora_B", "m": "lora_magnitude_vector"}
    _tensor = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B|magnitude_vector)(?:\.default)?(?:\.weight)?")

    def __init__(self, where: Path, config: Mapping[str, Any]) -> None:
        """
        Raises:
            ConfigError: another kind of adapter, a setting that is not computed here, or a value of a wrong type.
        """
        self.where = where
        if (kind := str(config["peft_type"]).upper()) != "LORA":
            raise ConfigError(f"{where}: peft_type", got=kind, want="LORA")
        saved = config.get("modules_to_save")
        if saved:
            raise ConfigError(
                f"{where}: modules_to_save",
                got=", ".join(map(str, saved)) if isinstance(saved, list) else saved,
                want="none: whole matrices cannot stand beside the model's",
                do=_MERGE,
            )
        self.projector = _means_projector(config.get("target_parameters"))
        harmless = _HARMLESS | {"target_parameters"} if self.projector else _HARMLESS
        for name, value in config.items():
            known = name in harmless or name.startswith("_") or name.endswith("_version")
            if not known and value and not (name == "bias" and value == "none"):
                raise ConfigError(
                    f"{where}: {name}", got=_short(value), want="none: it is not computed here", do=_MERGE
                )
        begun = config.get("init_lora_weights", True)
        if not any(begun is one or (isinstance(one, str) and begun == one) for one in _BEGUN):
            raise ConfigError(
                f"{where}: init_lora_weights",
                got=_short(begun),
                want="true, false, gaussian, eva or orthogonal",
                do="save it with path_initial_model_for_weight_conversion, or " + _MERGE,
            )
        self.base = _text(config.get("base_model_name_or_path"))
        self.dora, self.rslora = (_switch(where, config, name) for name in ("use_dora", "use_rslora"))
        self._rank, self._alpha = (_number(where, name, config.get(name, 8)) for name in ("r", "lora_alpha"))
        self._ranks, self._alphas = _patterns(where, config, "rank_pattern"), _patterns(where, config, "alpha_pattern")

    def parse(self, name: str) -> tuple[str, str]:
        """See Form."""
        if (found := self._tensor.fullmatch(name)) is not None and "lora_embedding" not in name:
            stem, _, parameter = PROJECTOR.rpartition(".")
            module = f"{found[1]}.{parameter}" if self.projector and found[1].endswith(stem) else found[1]
            return module, {"A": "a", "B": "b"}.get(found[2], "m")
        what = "an adapter of the embedding" if "lora_embedding" in name else "a whole tensor beside those of LoRA"
        raise CheckpointError(f"{self.where.parent}: {name}", got=what, want=", ".join(self.parts.values()), do=_MERGE)

    def rank_of(self, a: TensorInfo) -> int:
        """See Form."""
        return a.shape[0] if len(a.shape) == 2 else 0

    def scale(self, module: str, rank: int) -> float:
        """See Form. Of several patterns the first that the end of the name matches counts."""
        said, alpha = _first(self._ranks, module, self._rank), _first(self._alphas, module, self._alpha)
        if said != rank:
            raise ConfigError(
                f"{self.where}: rank of {module}", got=f"{said:g}", want=f"{rank}, which its tensors have"
            )
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


class MLXForm:
    """mlx-lm's, which mlx-vlm writes too, and what mlx-vlm wrote before."""

    turned, projector = True, False

    def __init__(self, where: Path, config: Mapping[str, Any]) -> None:
        """
        Raises:
            ConfigError: whole weights, no scale, or a value of a wrong type.
        """
        self.where = where
        parameters = config.get("lora_parameters")
        kind = config.get("fine_tune_type", "lora")
        self.base = _text(config.get("model"))
        if kind not in ("lora", "dora"):
            do = "it holds whole weights: mlx_lm.fuse writes the model" if kind == "full" else ""
            raise ConfigError(f"{where}: fine_tune_type", got=_short(kind), want="lora or dora", do=do)
        self.dora, legacy = kind == "dora", parameters is None and "rank" in config
        self.name = "mlx-vlm" if legacy else "mlx-lm"
        a, b, m = ("A", "B", "m") if legacy else ("lora_a", "lora_b", "m")
        self.parts: Mapping[str, str] = {"a": a, "b": b, "m": m}
        self._tensor = re.compile(rf"(.+)\.({a}|{b}|{m})")
        if legacy:
            self._rank = _number(where, "rank", config["rank"])
            self._scale = _number(where, "alpha", config.get("alpha", 0.1)) / self._rank
            return
        if not isinstance(parameters, Mapping) or "scale" not in parameters:
            got = "no scale" if isinstance(parameters, Mapping) else _short(parameters)
            raise ConfigError(f"{where}: lora_parameters", got=got, want="rank and scale, as mlx-lm writes them")
        self._scale = _number(where, "scale", parameters["scale"], least=-math.inf)
        self._rank = _number(where, "rank", parameters.get("rank", 0), least=0)

    def parse(self, name: str) -> tuple[str, str]:
        """See Form."""
        if (found := self._tensor.fullmatch(name)) is not None:
            return found[1], next(part for part, called in self.parts.items() if called == found[2])
        raise CheckpointError(
            f"{self.where.parent}: {name}", got="a whole tensor", want=", ".join(self.parts.values()),
            do="mlx_lm.fuse or mlx_vlm's fuse writes the model",
        )  # fmt: skip

    def rank_of(self, a: TensorInfo) -> int:
        """See Form."""
        return a.shape[1] if len(a.shape) == 2 else 0

    def scale(self, module: str, rank: int) -> float:
        """See Form."""
        if self._rank not in (0, rank):
            want = f"{rank}, which its tensors have"
            raise ConfigError(f"{self.where}: rank of {module}", got=f"{self._rank:g}", want=want)
        return self._scale


def _means_projector(targets: object) -> bool:
    """Whether PEFT would find the projector's matrix by each of these names, which are ends of whole ones."""
    whole = f".model.{PROJECTOR}"
    return isinstance(targets, list) and bool(targets) and all(whole.endswith(f".{name}") for name in targets)


def _first(patterns: Mapping[re.Pattern[str], float], module: str, otherwise: float) -> float:
    return next((value for pattern, value in patterns.items() if pattern.match(module)), otherwise)


def _patterns(where: Path, config: Mapping[str, Any], name: str) -> dict[re.Pattern[str], float]:
    """A table of regular expressions for the ends of names, in its order."""
    table = config.get(name) or {}
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: {name}", got=_short(table), want="an object of patterns and numbers")
    found = {}
    for pattern, value in table.items():
        try:
            found[re.compile(rf"(.*\.)?({pattern})$")] = _number(where, f"{name} {pattern}", value)
        except re.error as error:
            raise ConfigError(f"{where}: {name}", got=f"{pattern!r} ({error})", want="a regular expression") from None
    return found


def _number(where: Path, name: str, value: object, least: float = 1e-30) -> float:
    """A number; by default one above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30 or value < least:
        raise ConfigError(f"{where}: {name}", got=_short(value), want="a number" + (" above 0" if least > 0 else ""))
    return float(value)


def _switch(where: Path, config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name) or False
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: {name}", got=_short(value), want="true or false")
    return value


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"

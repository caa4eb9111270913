"""An adapter's folder → what it does to which matrices of a model, in the model's names.

Owns which folders are adapters, and the fit: every matrix is one of the model's, in its shape, and nothing else is
there. What its config.json says, and how its tensors are named, belongs to adapter_forms.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..boundary.reading import read_json
from ..config import Config
from ..errors import CheckpointError, ConfigError, SourceNotFound
from ..model.adapter import PROJECTOR, Adapter, LowRank
from ..model.gemma3 import Gemma3
from ..visible import listed
from .adapter_forms import Form, MLXForm, PEFTForm
from .safetensors import TensorInfo, canonical_name, is_vision, read_header

CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
MLX_WEIGHTS = ("adapters.safetensors", "weights.safetensors")  # mlx-lm's and mlx-vlm's; mlx-vlm's other name
_FLOATS = ("F32", "F16", "BF16")
_ADAPTED = ("language_model.layers.", "vision_tower.encoder.layers.")
_SIZE_OR_KIND = re.compile(r"(?<![a-z0-9])(270m|1b|4b|12b|27b|it|pt)(?![a-z0-9])")


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """An adapter that was read, and fits."""

    path: Path  # its folder
    form: str  # "PEFT", "mlx-lm" or "mlx-vlm"
    base: str  # the model that it says it was made for; often empty
    fingerprint: str  # of all that it does
    matrices: Adapter
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of its numbers in float32."""
        return sum(term.nbytes for term in self.matrices.values())


def read_adapter(path: str | Path, config: Config, *, model: str, text_only: bool = False) -> AdapterFile:
    """Read an adapter for a model: PEFT's LoRA, rsLoRA and DoRA, mlx-lm's and mlx-vlm's LoRA and DoRA.

    Args:
        path: its folder, or the safetensors file in it.
        config: of the model.
        model: its name, for errors.
        text_only: it is loaded without its tower: what is for the tower is left out.

    Raises:
        SourceNotFound: nothing is there.
        ConfigError: adapter_config.json is missing, wrong, or asks for what is not computed here.
        CheckpointError: damaged weights, or not for this model.
    """
    folder = _folder(path)
    form, weights = _form(folder, _read_config(folder))
    header = read_header(weights)
    tensors = _load(weights)
    found: dict[str, dict[str, str]] = {}  # module → part → name in the file
    names: dict[str, str] = {}  # module → as the file calls it
    for name in header:
        module, part = form.parse(name)
        path_in_model = canonical_name(f"{module}.weight").removesuffix(".weight")
        if part in found.setdefault(path_in_model, {}):
            raise CheckpointError(f"{weights}: {name}", got="a matrix that is there twice", want="each once")
        found[path_in_model][part], names[path_in_model] = name, module
    if not found:
        raise CheckpointError(f"{weights}", got="no matrices", want="those of an adapter")
    fit = _Fit(weights, config, model, form.base)
    matrices = {}
    for module in sorted(found, key=_natural):
        if is_vision(module) and text_only:
            continue
        infos = {part: header[name] for part, name in found[module].items()}
        fit.check(module, infos, form)
        scale = form.scale(names[module], form.rank_of(infos["a"]))
        matrices[module] = _term(weights, {part: tensors[name] for part, name in found[module].items()}, form, scale)
    return AdapterFile(
        path=folder,
        form=form.name,
        base=form.base,
        fingerprint=_fingerprint(folder / CONFIG, weights),
        matrices=matrices,
        notes=_other_base(folder.name, form.base, model),
    )


def _folder(path: str | Path) -> Path:
    try:
        found = Path(path).expanduser()
        if found.is_file() and found.suffix == ".safetensors":
            found = found.parent
        if found.is_dir():
            return found
        got = "a file" if found.exists() else "no such folder"
    except (OSError, RuntimeError, ValueError) as error:
        got = getattr(error, "strerror", None) or str(error)
    raise SourceNotFound(
        f"adapter {path}", got=got, want=f"a folder with {CONFIG}", do="one of the Hub is fetched with hf download"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file() and (folder / "config.json").is_file():
        raise ConfigError(f"adapter {folder}", got="a model (config.json)", want=f"an adapter ({CONFIG})")
    values = read_json(folder / CONFIG, ConfigError, want="what PEFT, mlx-lm or mlx-vlm write")
    if not isinstance(values, dict):
        raise ConfigError(f"{folder / CONFIG}", got=type(values).__name__, want="a JSON object")
    return values


def _form(folder: Path, config: Mapping[str, Any]) -> tuple[Form, Path]:
    """How to read it, and its weights."""
    where = folder / CONFIG
    if "peft_type" in config:
        form: Form = PEFTForm(where, config)
        names: tuple[str, ...] = (PEFT_WEIGHTS,)
    else:
        form, names = MLXForm(where, config), MLX_WEIGHTS
    for name in names:
        if (folder / name).is_file():
            return form, folder / name
    pickled = (folder / "adapter_model.bin").is_file()
    raise CheckpointError(
        f"adapter {folder}",
        got="weights in a pickled file, adapter_model.bin" if pickled else f"no {' or '.join(names)}",
        want=f"{names[0]} beside {CONFIG}",
        do="load it with PEFT and save it again: save_pretrained() writes it" if pickled else "",
    )


def _load(weights: Path) -> dict[str, mx.array]:
    try:
        arrays = mx.load(str(weights), format="safetensors")
    except RuntimeError as error:
        raise CheckpointError(f"{weights}", got=error, want="a safetensors file that MLX reads") from None
    assert isinstance(arrays, dict), type(arrays)
    return arrays


class _Fit:
    """Whether what a file holds is for this model."""

    def __init__(self, weights: Path, config: Config, model: str, base: str) -> None:
        self.weights, self.config, self.model = weights, config, model
        self.made_for = f"it was made for {base}" if base else ""
        self.shapes = _shapes(config)

    def check(self, module: str, infos: Mapping[str, TensorInfo], form: Form) -> None:
        """Raises CheckpointError: not a matrix of the model, not whole, or of another shape."""
        where = f"{self.weights}: {module}"
        if module not in self.shapes or (module == PROJECTOR and not form.projector):
            raise CheckpointError(where, got=self._other(module), want=self._want(), do=self.made_for)
        wanted = {"a", "b", "m"} if form.dora else {"a", "b"}
        if infos.keys() != wanted:
            raise CheckpointError(
                where,
                got=listed(infos[part].name.removeprefix("base_model.model.") for part in infos),
                want=f"{' and '.join(form.parts[part] for part in sorted(wanted))}, as {CONFIG} says",
            )
        out, width = self.shapes[module]
        rank = max(1, form.rank_of(infos["a"]))
        for part, shape in {"a": (rank, width), "b": (out, rank), "m": (out,)}.items():
            if part not in infos:
                continue
            info, want = infos[part], shape if part == "m" or not form.turned else shape[::-1]
            if info.dtype not in _FLOATS:
                raise CheckpointError(where, got=f"{form.parts[part]} in {info.dtype}", want=", ".join(_FLOATS))
            flat = part == "m" and sorted(info.shape) in ([1, out], [out])
            if not flat and info.shape != want:
                raise CheckpointError(
                    where, got=f"{form.parts[part]} of shape {info.shape}", want=f"{want} for {self.model}",
                    do=self.made_for,
                )  # fmt: skip

    def _other(self, module: str) -> str:
        if module == "lm_head" or module.endswith("embed_tokens"):
            return "an adapter of the vocabulary's matrix"
        return "a matrix of a vision tower" if is_vision(module) else "a matrix that the model has not"

    def _want(self) -> str:
        tower = " and of its tower" if self.config.vision is not None else ", which sees no pictures"
        return f"matrices of the {self.config.text.num_hidden_layers} layers of {self.model}{tower}"


def _shapes(config: Config) -> dict[str, tuple[int, int]]:
    """(out, in) of each matrix that an adapter may be for; of the projector's (in, out)."""
    model = Gemma3(config)
    found = {
        path: module.weight.shape
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.startswith(_ADAPTED)
    }
    if config.vision is not None:
        found[PROJECTOR] = model.multi_modal_projector.mm_input_projection_weight.shape
    return found


def _term(weights: Path, arrays: Mapping[str, mx.array], form: Form, scale: float) -> LowRank:
    values = {part: array.astype(mx.float32) for part, array in arrays.items()}
    a, b, m = values["a"], values["b"], values.get("m")
    if form.turned:
        a, b = mx.contiguous(a.T), mx.contiguous(b.T)
    term = LowRank(a, b * scale, None if m is None else m.flatten())
    finite = mx.stack([mx.isfinite(array).all() for array in (term.a, term.b, *([] if m is None else [m]))]).all()
    try:
        mx.eval(term.a, term.b, finite, *([] if term.magnitude is None else [term.magnitude]))
    except RuntimeError as error:
        raise CheckpointError(f"{weights}", got=error, want="a safetensors file that MLX reads") from None
    if not finite.item():
        raise CheckpointError(f"{weights}", got="NaN or infinity among its numbers", want="numbers")
    return term


def _natural(path: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in path.split(".")]


def _fingerprint(*paths: Path) -> str:
    """Of whole files: an adapter is small."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as file:
            digest.update(path.stat().st_size.to_bytes(8, "little"))
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _other_base(name: str, base: str, model: str) -> tuple[str, ...]:
    """A note where the names say that it was trained on another size or kind than the model is."""
    of_base, of_model = (set(_SIZE_OR_KIND.findall(one.lower().rpartition("/")[2])) for one in (base, model))
    for kind in ({"it", "pt"}, {"270m", "1b", "4b", "12b", "27b"}):
        if of_base & kind and of_model & kind and of_base & kind != of_model & kind:
            return (f"the adapter {name} says that it was trained on {base}, and this is {model}",)
    return ()

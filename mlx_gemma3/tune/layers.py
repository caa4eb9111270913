"""Which matrices of a model learn: mlx-lm's LoRA and DoRA layers in their places, all else frozen."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..config import Config
from ..errors import OptionError
from ..model.adapter import PROJECTOR
from ..model.gemma3 import Gemma3
from ..model.vision import PLAIN, Projector, TowerKernels

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
MATRICES = (*ATTENTION, *MLP)
LEARNT_PROJECTOR = "multi_modal_projector.matrix"  # the path of PROJECTOR in LearningProjector
_TOWER = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "out_proj", "up_proj": "fc1",
          "down_proj": "fc2"}  # fmt: skip
_PLACE = re.compile(r"(language_model|vision_tower\.encoder)\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)")


@dataclass(frozen=True)
class Shape:
    """What an adapter consists of.

    Args:
        kind: "lora" or "dora".
        rank: r.
        alpha: the product is multiplied by alpha / r.
        matrices: last names of the decoder's matrices, of MATRICES.
        layers: how many of the decoder's layers, from the last on; None for all.
        tower: the vision tower's matrices of the same parts too, in all its layers.
        projector: the matrix between tower and decoder too. LoRA only, as in PEFT.
    """

    kind: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    matrices: tuple[str, ...] = MATRICES
    layers: int | None = None
    tower: bool = False
    projector: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def modules(self, config: Config) -> list[str]:
        """The paths of the matrices that learn, in the model's order.

        Raises:
            OptionError: more layers than there are, a tower or projector that is not there.
        """
        count = config.text.num_hidden_layers
        if self.layers is not None and not 1 <= self.layers <= count:
            raise OptionError("layers", got=self.layers, want=f"1 to {count}, the layers of this model")
        if (self.tower or self.projector) and config.vision is None:
            what = "tower" if self.tower else "projector"
            raise OptionError(what, got="a checkpoint without a vision tower", want="one that sees pictures")
        found = [
            f"language_model.layers.{layer}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"
            for layer in range(count - (self.layers or count), count)
            for name in self.matrices
        ]
        if self.tower and config.vision is not None:
            names = [_TOWER[name] for name in self.matrices if name in _TOWER]
            found += [
                f"vision_tower.encoder.layers.{layer}.{'mlp' if name.startswith('fc') else 'self_attn'}.{name}"
                for layer in range(config.vision.num_hidden_layers)
                for name in names
            ]
        return [*found, PROJECTOR] if self.projector else found


class LearningProjector(nn.Module):
    """The projector with its matrix as a module, whose place mlx-lm's layer can take."""

    def __init__(self, base: Projector) -> None:
        super().__init__()
        self.base = base
        self.matrix = nn.Linear(1, 1, bias=False)
        self.matrix.weight = base.mm_input_projection_weight.T

    def __call__(self, x: mx.array, kernels: TowerKernels = PLAIN) -> mx.array:
        """See Projector."""
        return kernels.project(self, self.pool(x))

    def pool(self, x: mx.array) -> mx.array:
        """See Projector."""
        return self.base.pool(x)

    def project(self, rows: mx.array) -> mx.array:
        """See Projector."""
        out: mx.array = self.matrix(rows)
        return out


def insert(model: Gemma3, shape: Shape, seed: int) -> None:
    """Put the layers in, A drawn by the seed as mlx-lm draws it (uniform, 1 / √in), B zero; freeze all else."""
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear

    kind = DoRALinear if shape.kind == "dora" else LoRALinear
    modules = dict(model.named_modules())
    model.freeze()
    for number, path in enumerate(shape.modules(model.config)):
        if path == PROJECTOR:
            learning = LearningProjector(model.multi_modal_projector)
            learning.freeze()
            model.multi_modal_projector = modules["multi_modal_projector"] = learning
            path = LEARNT_PROJECTOR
            modules[path] = learning.matrix
        base = modules[path]
        made = kind.from_base(base, r=shape.rank, scale=shape.scale)
        width = base.scales.shape[1] * base.group_size if "scales" in base else base.weight.shape[1]
        draw = np.random.default_rng([seed, number])
        made.lora_a = mx.array(draw.uniform(-1, 1, (width, shape.rank)).astype(np.float32) / np.float32(width**0.5))
        made.lora_b = mx.zeros((shape.rank, base.weight.shape[0]))
        made.freeze()
        made.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False)
        parent, _, name = path.rpartition(".")
        modules[parent][name] = made


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """What learns, by path: "…q_proj.lora_a" (in, r), "….lora_b" (r, out), "….m" (out,), float32.

    The projector's are those of LEARNT_PROJECTOR.
    """
    return dict(tree_flatten(model.trainable_parameters()))


def silent(model: nn.Module) -> None:
    """Let the adapter do nothing, as before training: B is zero. For the reference of a preference."""
    put(model, {name: mx.zeros_like(value) for name, value in parameters(model).items() if name.endswith("lora_b")})


def put(model: nn.Module, values: Mapping[str, mx.array]) -> None:
    """Set some of what learns."""
    model.load_weights(list(values.items()), strict=False)


def layer_of(path: str) -> tuple[str, int, str]:
    """("language_model" or "vision_tower.encoder", the layer, the last name) of a matrix's path."""
    found = _PLACE.fullmatch(path)
    assert found is not None, path
    return found[1], int(found[2]), found[3]


def check_matrices(names: str | Sequence[str]) -> tuple[str, ...]:
    """The last names of matrices by what a person says: "all", "attention", "mlp", or names.

    Raises:
        OptionError: another name.
    """
    groups = {"all": MATRICES, "attention": ATTENTION, "mlp": MLP}
    found: list[str] = []
    for name in (names,) if isinstance(names, str) else names:
        for one in name.replace(",", " ").split():
            if one not in groups and one not in MATRICES:
                raise OptionError("matrices", got=repr(one), want=f"all, attention, mlp, or of {', '.join(MATRICES)}")
            found += groups.get(one, (one,))
    if not found:
        raise OptionError("matrices", got="none", want=f"all, attention, mlp, or of {', '.join(MATRICES)}")
    return tuple(name for name in MATRICES if name in found)

"""The graphs that a GPU is given hold nothing that Metal lacks or does badly; and the lint finds what is put in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from metal_lint import Kernels, lint, watched
from mlx.utils import tree_map
from random_model import random_model, tiny_config

from mlx_gemma3.generation.choice import Chooser, choose
from mlx_gemma3.generation.sampling import Sampling
from mlx_gemma3.model import fused, layers
from mlx_gemma3.model.attention import attend_all
from mlx_gemma3.model.context import Chunk, Step
from mlx_gemma3.model.runner import Runner
from mlx_gemma3.model.vision import TowerKernels

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles with it on a CPU")

LAYERS = 2
OUTSIDE = 5  # kernels of a step outside the layers: the embedding and its scale, the last norm, the head, as float32
WIDE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 4096,
}  # fmt: skip


def runner(*, bits: int | None = 4, dtype: mx.Dtype = mx.bfloat16, vision: bool = False) -> Runner:
    """As a GPU runs it; built where mx.fast is watched, since kernels are looked up then."""
    model = random_model(tiny_config(vision=vision, **WIDE))
    model.update(tree_map(lambda array: array.astype(dtype), model.parameters()))
    if bits is not None:
        nn.quantize(
            model, group_size=64, bits=bits,
            class_predicate=lambda path, module: "vision" not in path and isinstance(module, nn.Linear | nn.Embedding),
        )  # fmt: skip
    return Runner(model, fused.gpu_kernels(), fused.gpu_tower())


def built(make: Callable[[], Any]) -> Any:
    with watched([], mx.bfloat16):
        return make()


def step_of(made: Runner, rows: int) -> list[str]:
    """Findings in a step of so many rows."""
    packed = "scales" in made.model.language_model.embed_tokens  # a packed row is three, and unpacked
    most = OUTSIDE + 3 * packed + LAYERS * (17 + 3 * (rows - 1))
    return lint(
        lambda tokens: made.step(tokens, [made.make_caches() for _ in range(rows)]),
        mx.array([3] * rows), dtype=made.dtype, gelus=LAYERS, kernels=most,
    )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("bits", [None, 2, 3, 4, 5, 6, 8])
def test_a_step(bits: int | None, rows: int) -> None:
    assert step_of(built(lambda: runner(bits=bits)), rows) == []


@pytest.mark.parametrize("length", [2, 9, 512, 1024])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_a_prompt(length: int, dtype: mx.Dtype) -> None:
    made = built(lambda: runner(dtype=dtype))
    rows = mx.zeros((1, length, WIDE["hidden_size"]), dtype)

    def work(rows: mx.array) -> mx.array:
        hidden = made._decoder(rows, Chunk(length, made.make_caches()), last_only=False)
        return made.head(hidden[:, -1:])

    assert lint(work, rows, dtype=dtype, gelus=LAYERS) == []


def test_packed_keys_and_values() -> None:
    made = built(runner)
    found = lint(
        lambda tokens: made.step(tokens, [made.make_caches(kv_bits=8, local_kv_bits=4)]),
        mx.array([3]), dtype=made.dtype, gelus=LAYERS,
    )  # fmt: skip
    assert found == []


def tower_of(made: Runner) -> list[str]:
    layers = 2
    pixels = mx.zeros((1, 28, 28, 3))
    return lint(lambda pixels: made.model.vision_tower(pixels, made._tower), pixels, dtype=made.dtype, gelus=layers)


def heads_of_72(**kernels: Any) -> Runner:
    """A tower as SigLIP's: heads of 72."""
    config = tiny_config(**WIDE)
    object.__setattr__(config.vision, "hidden_size", 144)
    model = random_model(config)
    model.update(tree_map(lambda array: array.astype(mx.bfloat16), model.parameters()))
    tower = TowerKernels(**kernels) if kernels else fused.gpu_tower()
    return Runner(model, fused.gpu_kernels(), tower)


def test_the_tower() -> None:
    assert tower_of(built(heads_of_72)) == []


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0), Sampling(), Sampling(top_k=0, top_p=0.8, min_p=0.1)], ids=str
)
def test_the_sampler(sampling: Sampling) -> None:
    def work(logits: mx.array) -> list[mx.array]:
        return choose(logits, [Chooser(sampling, [1, 2])]).arrays

    assert lint(work, mx.random.normal((1, 300)), dtype=mx.float32) == []


# The lint finds each of these


def test_float64() -> None:
    def work(x: mx.array) -> mx.array:
        return (x.astype(mx.float64, stream=mx.cpu) * 2).astype(mx.float32)

    assert any("float64" in found for found in lint(work, mx.array([1.0]), dtype=mx.float32))


def test_a_head_of_72_padded_to_80() -> None:
    def padded(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        q, k, v = (mx.pad(x, [(0, 0), (0, 0), (0, 0), (0, 8)]) for x in (q, k, v))
        return attend_all(q, k, v, scale)[..., :72]

    found = tower_of(built(lambda: heads_of_72(attend=padded, gelu=fused.gpu_tower().gelu)))
    assert "attention: heads of 80: SigLIP's 72 has a kernel of its own" in found


@pytest.mark.parametrize("gelu", [layers.gelu_tanh, fused.gelu])
def test_an_eager_gelu(gelu: Callable[[mx.array], mx.array]) -> None:
    assert "a GELU that is not one kernel" in tower_of(built(lambda: heads_of_72(gelu=gelu)))


def test_float32_scales_with_bfloat16_rows() -> None:
    def make() -> Runner:
        made = runner()
        for _, module in made.model.named_modules():
            if "scales" in module:
                module.scales = module.scales.astype(mx.float32)
        return Runner(made.model, fused.gpu_kernels())

    found = step_of(built(make), 1)
    assert any("scales of mlx.core.float32, rows of mlx.core.bfloat16" in each for each in found)


def test_a_third_kernel_between_norm_and_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = fused.multiply
    monkeypatch.setattr(fused, "multiply", lambda x, matrix: multiply(mx.cummax(x, axis=-1), matrix))
    assert any("kernels, at most" in each for each in step_of(built(runner), 1))


def test_a_host_read_inside_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = Step.attend

    def reading(context: Step, q: mx.array, *rest: Any) -> mx.array:
        q.sum().item()
        return attend(context, q, *rest)

    monkeypatch.setattr(Step, "attend", reading)
    assert any(each.startswith("read on the host") for each in step_of(built(runner), 1))


def test_a_mask_of_another_dtype_and_bits_without_a_kernel() -> None:
    q = mx.zeros((1, 2, 16, 64), mx.bfloat16)

    def masked(x: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0, mask=mx.zeros((16, 16), mx.float32))

    assert lint(masked, q, dtype=mx.bfloat16) == ["attention: a mask of mlx.core.float32, queries of mlx.core.bfloat16"]
    found: list[str] = []
    with watched(found, mx.bfloat16), pytest.raises(ValueError):  # 7 bits: MLX itself refuses
        mx.quantized_matmul(q[0, 0], mx.zeros((8, 14), mx.uint32), mx.zeros((8, 1), mx.bfloat16), None, True, 64, 7)
    assert "packed product: no kernel affine_qmv for 7 bits in groups of 64" in found


def test_the_table_is_of_the_installed_mlx() -> None:
    from importlib.metadata import version

    assert Kernels.read().version == version("mlx"), "python bench/metal_table.py writes it anew"

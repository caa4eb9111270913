"""Packing: MLX's own layout, and smaller errors than rounding the scales after the codes were taken."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma3.checkpoint.entries import Packing
from mlx_gemma3.convert.packing import join_codes, pack
from mlx_gemma3.convert.recipe import MODES

AFFINE = [Packing(bits, group) for bits in MODES["affine"][0] for group in MODES["affine"][1]]


def matrix(rows: int = 24, width: int = 384) -> mx.array:
    return 0.02 * mx.random.normal((rows, width), key=mx.random.key(3))


def numbers(parts: tuple[mx.array, ...], packing: Packing) -> mx.array:
    weight, *others = parts
    scales, biases = (part.astype(mx.float32) for part in others)
    return mx.dequantize(weight, scales, biases, group_size=packing.group_size, bits=packing.bits)


def squared(parts: tuple[mx.array, ...], packing: Packing, x: mx.array) -> np.ndarray:
    """(R, G) the squared error of each group."""
    errors = np.array(numbers(parts, packing) - x)
    return np.square(errors.reshape(len(errors), -1, packing.group_size)).sum(axis=-1)


@pytest.mark.parametrize("bits", MODES["affine"][0])
def test_codes_are_joined_as_mlx_does(bits: int) -> None:
    weight, scales, biases = mx.quantize(matrix(), group_size=64, bits=bits)
    ones, zeros = mx.ones_like(scales), mx.zeros_like(biases)
    codes = mx.dequantize(weight, ones, zeros, group_size=64, bits=bits)
    assert mx.array_equal(join_codes(codes.astype(mx.uint32), bits), weight)


@pytest.mark.parametrize("packing", AFFINE, ids=str)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_codes_that_know_their_scales_lose_no_more(packing: Packing, dtype: mx.Dtype) -> None:
    x = matrix()
    weight, *others = mx.quantize(x, group_size=packing.group_size, bits=packing.bits)
    after = squared((weight, *(part.astype(dtype) for part in others)), packing, x)
    ours = pack(x, packing, dtype)
    searched = pack(x, packing, dtype, search=True)
    for parts in (ours, searched):
        assert [part.dtype for part in parts] == [mx.uint32, dtype, dtype]
        assert parts[0].shape == weight.shape and parts[1].shape == parts[2].shape == others[0].shape
    assert squared(ours, packing, x).sum() <= after.sum() * (1 + 1e-5)
    assert (squared(searched, packing, x) <= squared(ours, packing, x) * (1 + 1e-5)).all()  # group by group
    if packing.bits == 8 and dtype == mx.bfloat16:
        assert squared(ours, packing, x).sum() < 0.7 * after.sum()
    if packing.bits <= 4:
        assert squared(searched, packing, x).sum() < 0.95 * squared(ours, packing, x).sum()


@pytest.mark.parametrize("packing", [*AFFINE, Packing(4, 32, "mxfp4"), Packing(4, 16, "nvfp4")], ids=str)
def test_what_needs_no_rounding_is_mlx_own(packing: Packing) -> None:
    x = matrix()
    own = mx.quantize(x, group_size=packing.group_size, bits=packing.bits, mode=packing.mode)
    ours = pack(x, packing, mx.float32)
    assert len(own) == len(ours) and all(mx.array_equal(*pair) for pair in zip(own, ours, strict=True))


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_groups_of_one_number_keep_it(dtype: mx.Dtype, search: bool) -> None:
    x = mx.concatenate([mx.zeros((1, 64)), mx.full((1, 64), 0.5), mx.full((1, 64), -3.0), mx.full((1, 64), 1e-6)])
    packing = Packing(4, 32)
    found = numbers(pack(x, packing, dtype, search=search), packing)
    np.testing.assert_allclose(np.array(found), np.array(x), rtol=0, atol=1e-6)

"""ggml's blocks: every lossless type gives MLX the very numbers that the gguf package reads, the others nearly."""

from __future__ import annotations

from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
import tiny_gguf

from mlx_gemma3.checkpoint import gguf_blocks
from mlx_gemma3.checkpoint.entries import Packing
from mlx_gemma3.checkpoint.gguf_blocks import BlockType, block_type, empty_rows, pack_blocks, read_rows
from mlx_gemma3.errors import CheckpointError

EXACT = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5}
GROUPS_OF_16 = ("Q2_K", "Q3_K", "Q6_K")


def typed(kind: str) -> BlockType:
    return block_type(gguf.GGMLQuantizationType[kind].value)


def random_blocks(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Blocks with scales of both signs, some of them zero, subnormal or as large as a float16 gets."""
    random = np.random.default_rng(seed)
    size = random.standard_normal(count)
    size[:6] = 0.0, -0.0, 1e-5, -1e-5, 1e30, -1e30
    with np.errstate(over="ignore"):
        blocks = tiny_gguf.random_blocks(kind, size, random)
    for at in tiny_gguf._SCALES[kind][0]:
        scales = blocks[:, at : at + 2].copy().view(np.float16)
        blocks[:, at : at + 2] = np.clip(scales, -65504, 65504).view(np.uint8)
    return blocks


def package_floats(kind: str, blocks: np.ndarray) -> np.ndarray:
    """What the gguf package reads: (n, values) float32."""
    values: np.ndarray = gguf.quants.dequantize(blocks.reshape(1, -1), gguf.GGMLQuantizationType[kind])
    return values.reshape(len(blocks), -1)


def unpacked(parts: tuple[np.ndarray, ...] | list[mx.array], bits: int) -> np.ndarray:
    weight, scales, biases = (mx.array(part) for part in parts)
    assert (weight.dtype, scales.dtype, biases.dtype) == (mx.uint32, mx.float32, mx.float32)
    return np.array(mx.dequantize(weight, scales, biases, group_size=32, bits=bits))


@pytest.mark.parametrize("kind", EXACT)
def test_random_blocks_come_through_exactly(kind: str) -> None:
    blocks = random_blocks(kind, 3000)
    found = unpacked(pack_blocks(typed(kind), blocks), EXACT[kind])
    want = package_floats(kind, blocks)
    assert np.isfinite(want).all() and (want < 0).any() and (want > 0).any()
    assert np.count_nonzero(found != want) == 0


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_that_the_package_wrote_come_through_exactly(kind: str) -> None:
    values = np.random.default_rng(1).standard_normal((200, 320)).astype(np.float32)
    values[3], values[5] = 0, 1e-6  # a scale of zero, and one that is a subnormal float16
    blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).reshape(-1, typed(kind).nbytes)
    found = unpacked(pack_blocks(typed(kind), blocks), EXACT[kind])
    assert np.array_equal(found, package_floats(kind, blocks))
    rest = np.sqrt(np.mean((found.reshape(values.shape) - values)[6:] ** 2))
    assert rest < 0.2  # the numbers are where they belong, not only the same as elsewhere


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_scales_of_16_bits_round_nothing_where_there_is_one_a_block(kind: str) -> None:
    """d is a float16, and the bias a power of two times d."""
    blocks = random_blocks(kind, 500)[6:]
    weight, scales, biases = pack_blocks(typed(kind), blocks)
    rounded = [part.astype(np.float16).astype(np.float32) for part in (scales, biases)]
    assert np.array_equal(unpacked((weight, *rounded), EXACT[kind]), package_floats(kind, blocks))


@pytest.mark.parametrize("kind", GROUPS_OF_16)
def test_groups_of_16_are_packed_anew(kind: str) -> None:
    assert typed(kind).packing == Packing(8, 32) and not typed(kind).exact
    blocks = random_blocks(kind, 500)[6:]
    found, want = unpacked(pack_blocks(typed(kind), blocks), 8), package_floats(kind, blocks)
    groups = want.reshape(-1, 32)
    step = (groups.max(axis=1) - groups.min(axis=1)) / 255
    errors = np.abs(found - want).reshape(-1, 32).max(axis=1)
    assert (errors <= 1.01 * step).all() and errors.max() > 0  # MLX moves the grid so that zero is on it: up to a step


@pytest.mark.parametrize("kind", [*EXACT, "Q6_K"])
def test_a_product_with_the_packed_matrix_is_one_with_the_floats(kind: str) -> None:
    values = typed(kind).values
    blocks = random_blocks(kind, 6 + 8 * 1024 // values)[6:]
    x = np.random.default_rng(2).standard_normal((3, 1024)).astype(np.float32)
    bits = EXACT.get(kind, 8)
    parts = [mx.array(part).reshape(8, -1) for part in pack_blocks(typed(kind), blocks)]
    found = np.array(mx.quantized_matmul(mx.array(x), *parts, group_size=32, bits=bits))
    want = x @ package_floats(kind, blocks).reshape(8, 1024).T
    # float32 sums of 1024 products; Q6_K: half a step of 8 bits each.
    np.testing.assert_allclose(found, want, rtol=0, atol=(1e-5 if kind in EXACT else 1e-2) * np.abs(want).max())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "Q6_K"])
def test_rows_are_read_from_anywhere_in_pieces(
    kind: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, width, this = 40, 512, typed(kind)
    blocks = random_blocks(kind, 6 + rows * width // this.values)[6:]
    path = tmp_path / "blocks"
    path.write_bytes(b"header!" + blocks.tobytes())
    row_bytes = width // this.values * this.nbytes
    want = package_floats(kind, blocks).reshape(rows, width)

    def read(start: int, stop: int) -> np.ndarray:
        arrays = empty_rows(this, stop - start, width, packed=packed)
        read_rows(path, 7 + start * row_bytes, this, [np.asarray(array) for array in arrays], packed=packed)
        return unpacked(arrays, this.packing.bits) if packed and this.packing else np.array(arrays[0])

    whole = read(0, rows)
    monkeypatch.setattr(gguf_blocks, "_PIECE", 768)  # pieces end inside rows, the last one is short
    np.testing.assert_array_equal(read(0, rows), whole)
    for start, stop in ((3, 11), (39, 40)):
        np.testing.assert_array_equal(read(start, stop), whole[start:stop])
    if this.exact or not packed:
        np.testing.assert_array_equal(whole, want)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut off"):
        read(0, rows)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", mx.float32), ("F16", mx.float16), ("BF16", mx.uint16)])
def test_plain_numbers_stay_as_they_are(kind: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    assert typed(kind).packing is None
    values = np.random.default_rng(3).integers(0, 256, 6 * 64 * dtype.size, np.uint8)
    (tmp_path / "raw").write_bytes(values.tobytes())
    (array,) = empty_rows(typed(kind), 6, 64, packed=False)
    read_rows(tmp_path / "raw", 0, typed(kind), [np.asarray(array)], packed=False)
    assert array.dtype == dtype and np.array(array).tobytes() == values.tobytes()


@pytest.mark.parametrize(("number", "name"), [(15, "Q8_K"), (26, "I32"), (99, "99")])
def test_a_type_that_nobody_reads_is_named(number: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}$"):
        block_type(number)

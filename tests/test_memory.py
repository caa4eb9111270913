"""The arithmetic of memory against arrays that are really there: caches, loaded weights, measured peaks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_gguf
from memory_held import start_measuring
from mlx.utils import tree_flatten, tree_map
from random_model import random_model, tiny_config

from mlx_gemma3.checkpoint import memory
from mlx_gemma3.checkpoint.entries import Entry, Packing
from mlx_gemma3.checkpoint.load import load_model, open_checkpoint
from mlx_gemma3.checkpoint.memory import GIB, cache_bytes, estimate, loaded_bytes, planned_bytes
from mlx_gemma3.checkpoint.published import SIZES, size_in, size_of
from mlx_gemma3.checkpoint.source import resolve
from mlx_gemma3.checkpoint.weights import open_store
from mlx_gemma3.commands.fit import tokens_text
from mlx_gemma3.config import GLOBAL, LOCAL, Config
from mlx_gemma3.convert import convert
from mlx_gemma3.errors import OptionError
from mlx_gemma3.generation.prefill import usual_chunk
from mlx_gemma3.model.cache import Caches, WindowCache
from mlx_gemma3.model.chunks import chunk_size, score_bytes
from mlx_gemma3.model.gemma3 import Gemma3
from mlx_gemma3.model.runner import Runner

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "memory.md"
FULL = {name: config.text.max_position_embeddings for name, config in SIZES.items()}


def in_dtype(model: Gemma3, dtype: mx.Dtype) -> Gemma3:
    model.update(tree_map(lambda array: array.astype(dtype), model.parameters()))
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(("kv_bits", "local_kv_bits"), [(16, 16), (8, 16), (4, 16), (8, 8), (4, 4)])
def test_cache_bytes_are_those_of_filled_caches(dtype: mx.Dtype, kv_bits: int, local_kv_bits: int) -> None:
    bits = {"kv_bits": kv_bits, "local_kv_bits": local_kv_bits}
    config = tiny_config(vision=False, max_position_embeddings=2048, head_dim=64)
    caches = Gemma3(config).make_caches(**bits)
    for length in (1, 39, 216, 1, 343):  # 1, 40, 256, 257, 600 tokens: window 8, step 256
        for cache in caches:
            cache.append(mx.ones((1, 4, length, 64), dtype))
        mx.eval(caches.arrays)
        far, near = cache_bytes(config, caches.offset, dtype_bytes=dtype.size, **bits)
        assert far + near == caches.nbytes
        parts = [part for cache in caches if not isinstance(cache, WindowCache) for part in cache.parts]
        assert far == sum(part.nbytes for part in parts)


def test_4b_at_128k_has_the_promised_cache() -> None:
    """The promise, 2.6, 1.4 and 0.73 GiB, has the local layers packed too; in 16 bits these take 0.14 GiB alone."""
    promised = {16: 2.6, 8: 1.4, 4: 0.73}
    for bits, gib in promised.items():
        both = sum(cache_bytes(SIZES["4B"], FULL["4B"], kv_bits=bits, local_kv_bits=bits)) / GIB
        assert both == pytest.approx(gib, rel=0.05)
    plain_local = [sum(cache_bytes(SIZES["4B"], FULL["4B"], kv_bits=bits)) / GIB for bits in promised]
    assert plain_local == pytest.approx([2.641, 1.470, 0.845], abs=0.001)


def test_score_matrix_of_4b_at_128k() -> None:
    """4 GiB at chunk 2048, 1 GiB at 512; none where attention is fused, for 27B's heads of 128."""
    assert score_bytes(SIZES["4B"], FULL["4B"], 2048) == 4 * GIB
    assert score_bytes(SIZES["4B"], FULL["4B"], 512) == GIB
    assert score_bytes(SIZES["27B"], FULL["27B"], 2048) == 0
    assert score_bytes(SIZES["27B"], 1024, 512, kv_bits=8) == 32 * 1024 * 512 * 2  # nothing fused reads packed
    assert score_bytes(SIZES["27B"], 1024, 512, dtype_bytes=4, fused=False) == 32 * 1024 * 512 * 4


def test_where_long_chunks_have_no_scores_they_stay_long_but_for_the_last() -> None:
    """M5: 4B at the end of its context."""
    m5 = {"unfused": 1024, "fused_from": 1024}
    assert (
        chunk_size(SIZES["4B"], FULL["4B"], left=5000, **m5) == chunk_size(SIZES["4B"], 8192, left=1024, **m5) == 1024
    )
    assert chunk_size(SIZES["4B"], FULL["4B"], left=1023, **m5) == 512  # not fused
    assert chunk_size(SIZES["4B"], FULL["4B"], left=5000, kv_bits=8, **m5) == 512
    assert chunk_size(SIZES["4B"], FULL["4B"], left=5000, dtype_bytes=4, **m5) == 256
    assert chunk_size(SIZES["27B"], FULL["27B"], left=5000, **m5) == 2048
    runner: Any = SimpleNamespace(config=SIZES["4B"], dtype=mx.bfloat16, unfused_chunk=1024, fused_from=1024)
    caches = Caches(SIZES["4B"])
    for layer in caches:
        layer.offset = 130_000
    assert usual_chunk(runner, caches, FULL["4B"]) == 1024 and usual_chunk(runner, caches, 130_900) == 512


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_chunk_is_the_one_that_prefill_takes(size: str, dtype: mx.Dtype) -> None:
    unfused = 1024 if dtype == mx.bfloat16 else 512
    runner: Any = SimpleNamespace(config=SIZES[size], dtype=dtype, unfused_chunk=unfused, fused_from=0)
    for keys in (100, 4096, 32768, 131072):
        for bits, local in ((16, 16), (8, 16), (16, 8), (4, 4)):
            caches = Caches(SIZES[size], kv_bits=bits, local_kv_bits=local)
            found = chunk_size(
                SIZES[size], keys, kv_bits=bits, local_kv_bits=local, dtype_bytes=dtype.size, unfused=unfused
            )
            assert found == usual_chunk(runner, caches, keys)


@pytest.mark.parametrize(
    ("name", "gib", "macos", "tokens"),
    [("applegpu_g13g", 10.7, "15.5", 512), ("applegpu_g13s", 48, "15.5", 1024), ("applegpu_g17g", 10.7, "26.2", 1024),
     ("applegpu_g17g", 10.7, "26.1", 512), ("applegpu_g17p", 10.7, "26.4", 512), ("applegpu_g18p", 5.3, "27.0", 1024)],
)  # fmt: skip
def test_a_chunk_is_as_long_as_the_chip_and_its_memory_like(
    name: str, gib: float, macos: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = {
        "memory_size": int(1.5 * gib * GIB),
        "max_recommended_working_set_size": int(gib * GIB),
        "architecture": name,
    }
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda _: about)
    monkeypatch.setattr("platform.mac_ver", lambda: (macos, ("", "", ""), "arm64"))
    assert memory.this_machine().unfused == tokens


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kv_bits", memory.KV_BITS)
def test_the_chunk_keeps_the_scores_under_a_gibibyte(size: str, kv_bits: int) -> None:
    for context in (1024, 32768, FULL[size]):
        chunk = chunk_size(SIZES[size], context, kv_bits=kv_bits)
        assert score_bytes(SIZES[size], context, chunk, kv_bits=kv_bits) <= GIB


@pytest.mark.parametrize(("size", "kv_bits"), [("4B", 16), ("12B", 16), ("12B", 4), ("27B", 16), ("27B", 4)])
def test_no_read_on_the_way_to_a_context_needs_more_than_the_estimate(size: str, kv_bits: int) -> None:
    config, most = SIZES[size], 0
    for tokens in range(1024, FULL[size] + 1, 1024):
        chunk = min(tokens, chunk_size(config, tokens, kv_bits=kv_bits))
        most = max(most, memory.prefill_bytes(config, tokens, chunk, kv_bits=kv_bits))
        assert most <= estimate(config, 0, context=tokens, kv_bits=kv_bits).prefill < 1.1 * most


def resident(model: Gemma3) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


PACKINGS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "4 bits": {"bits": 4, "group_size": 64},
    "mixed": {"bits": 4, "group_size": 32, "language_model.embed_tokens": {"bits": 6, "group_size": 64}},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_loaded_bytes_are_those_of_the_loaded_folder(tmp_path: Path, packing: str, dtype: str) -> None:
    config, tensors = tiny.image_config(), tiny.random_tensors(tiny.image_config())
    how = PACKINGS[packing]
    stored = tiny.pack(tensors, how)[0] if how else tensors
    folder = tiny.write_folder(tmp_path / "model", config, stored, packing=how)
    assert_loaded(folder, dtype)


@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q8_0"])
def test_loaded_bytes_are_those_of_the_loaded_gguf(tmp_path: Path, kind: str) -> None:
    config, tensors = tiny.image_config(), tiny.random_tensors(tiny.image_config())
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", config, tensors, kind=kind)
    tiny_gguf.write_mmproj(tmp_path / "mmproj.gguf", config, tensors)
    assert_loaded(path, "bfloat16")


def test_types_that_mlx_can_only_round_are_floats_in_float32() -> None:
    entry = Entry("language_model.layers.0.mlp.up_proj.weight", (64, 256), "Q6_K", Packing(8, 32), nbytes=13440)
    numbers = 64 * 256
    assert loaded_bytes([entry], dtype_bytes=4) == 4 * numbers
    assert loaded_bytes([entry], dtype_bytes=2) == numbers + numbers // 32 * 4


def assert_loaded(path: Path, dtype: str) -> None:
    for text_only in (False, True):
        checkpoint = open_checkpoint(resolve(path), text_only=text_only)
        want = resident(load_model(checkpoint, dtype=dtype))
        size = 4 if dtype == "float32" else 2
        assert loaded_bytes(open_store(checkpoint).entries, dtype_bytes=size) == want


@pytest.mark.parametrize("bits", [8, 4])
def test_planned_bytes_are_those_of_the_converted_folder(tmp_path: Path, bits: int) -> None:
    config = tiny.image_config()
    folder = tiny.write_folder(tmp_path / "model", config, tiny.random_tensors(config))
    convert(folder, tmp_path / "out", bits=bits)
    want = resident(load_model(tmp_path / "out", dtype="bfloat16"))
    assert planned_bytes(Config.from_dict(config), bits) == want


def test_planned_bytes_of_the_published_sizes() -> None:
    assert planned_bytes(SIZES["27B"], 16) == 2 * 27_432_406_640
    small = SIZES["270M"]
    plain = 18 * (4 * 640 + 2 * 256) + 640  # the norms
    assert planned_bytes(small, 4) == (268_098_176 - plain) * 9 // 16 + plain * 2  # 4 bits and 32 / 64
    tower = replace(SIZES["4B"], vision=None)
    assert planned_bytes(SIZES["4B"], 4) - planned_bytes(tower, 4) == 2 * (4_300_079_472 - 3_880_263_168)


def test_sizes_know_themselves() -> None:
    assert [size_of(config) for config in SIZES.values()] == list(SIZES)
    assert size_of(replace(SIZES["12B"], vision=None)) == "12B" and size_of(tiny_config()) is None
    names = {"27b": "27B", "mlx-community/gemma-3-4b-it-8bit": "4B", "google/gemma-3-270m": "270M", "it-14b": None}
    assert {name: size_in(name) for name in names} == names
    counts = {name: sum(map(math.prod, memory.parameter_shapes(config).values())) for name, config in SIZES.items()}
    assert counts == {
        "270M": 268_098_176, "1B": 999_885_952, "4B": 4_300_079_472, "12B": 12_187_325_040, "27B": 27_432_406_640,
    }  # fmt: skip


on_the_cpu = pytest.mark.skipif(mx.metal.is_available(), reason="the bounds are of the CPU's unfused attention")


@on_the_cpu
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(
    "text",
    [
        {"num_attention_heads": 4, "head_dim": 128, "intermediate_size": 128},  # scores and heads decide
        {"num_attention_heads": 2, "head_dim": 16, "intermediate_size": 4096},  # the MLP does
        {"num_key_value_heads": 4, "head_dim": 64, "sliding_window": 64, "layer_types": [LOCAL] * 8},  # windows do
    ],
    ids=["heads", "mlp", "windows"],
)
def test_prefill_peak_is_inside_the_estimate(text: dict[str, Any], dtype: mx.Dtype) -> None:
    """Measured: the peak of the last chunk over what was there before. At most the estimate, and no less than half."""
    layers = text.get("layer_types", [LOCAL, GLOBAL, GLOBAL, LOCAL])
    text |= {"num_hidden_layers": len(layers), "layer_types": layers, "hidden_size": 64}
    config = tiny_config(vision=False, max_position_embeddings=4096, **text)
    model, chunk, context = in_dtype(random_model(config), dtype), 128, 512
    caches = model.make_caches()
    runner = Runner(model)
    runner.read(np.ones((1, context - chunk), np.int32), None, caches)
    mx.eval(caches.arrays)
    before = start_measuring()
    runner.read(np.ones((1, chunk), np.int32), None, caches)
    mx.eval(caches.arrays)
    peak = mx.get_peak_memory() - before
    need = memory.prefill_bytes(config, context, chunk, dtype_bytes=dtype.size, fused=False)
    grown = sum(cache_bytes(config, context, dtype_bytes=dtype.size)) * chunk // context
    assert need / 2 < peak <= need + grown


@on_the_cpu
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_vision_peak_is_inside_the_estimate(dtype: mx.Dtype) -> None:
    config = tiny_config()
    assert config.vision is not None
    vision = replace(config.vision, image_size=224, hidden_size=64, intermediate_size=240, num_attention_heads=4)
    config = replace(config, vision=vision)
    model = in_dtype(random_model(config), dtype)
    pixels = mx.zeros((1, 224, 224, 3))
    mx.eval(pixels)
    before = start_measuring()
    mx.eval(model.encode_images(pixels))
    peak, need = mx.get_peak_memory() - before, memory.vision_bytes(config, dtype_bytes=dtype.size, fused=False)
    assert need / 2 < peak <= need


def test_estimate_adds_up_and_counts_the_larger_working_memory() -> None:
    need = estimate(SIZES["4B"], 1000, context=4096)
    assert need.vision > need.prefill and need.working == need.vision
    assert need.total == 1000 + need.kv_global + need.kv_local + need.vision + need.logits + memory.OVERHEAD
    text = estimate(replace(SIZES["4B"], vision=None), 1000, context=4096)
    assert (text.vision, text.working) == (0, need.prefill)
    assert need.logits == 4 * 262208


@pytest.mark.parametrize("kv_bits", memory.KV_BITS)
def test_the_largest_context_is_the_last_that_fits(kv_bits: int) -> None:
    config, weights, budget = SIZES["4B"], planned_bytes(SIZES["4B"], 8), 7 * GIB
    longest = memory.largest_context(config, weights, budget, kv_bits=kv_bits)
    assert 0 < longest < FULL["4B"] and longest % 256 == 0
    totals = [estimate(config, weights, context=longest + more, kv_bits=kv_bits).total for more in (0, 256)]
    assert totals[0] <= budget < totals[1]
    assert memory.largest_context(config, weights, weights, kv_bits=kv_bits) == 0
    assert memory.largest_context(config, weights, 64 * GIB, kv_bits=kv_bits) == FULL["4B"]


def test_what_does_not_exist_is_refused() -> None:
    for options in (
        {"context": 0},
        {"context": 32769},
        {"context": 1, "kv_bits": 5},
        {"context": 1, "local_kv_bits": 2},
    ):
        with pytest.raises(OptionError):
            estimate(SIZES["1B"], 0, **options)
    with pytest.raises(OptionError, match="bits: got 7"):
        planned_bytes(SIZES["1B"], 7)
    for gib in (0, -1, math.nan, math.inf):
        with pytest.raises(OptionError, match="memory"):
            memory.other_mac(gib)


def test_other_macs_have_the_working_sets_that_were_seen() -> None:
    seen = {8: 5.33, 16: 10.67, 32: 21.33, 36: 27, 64: 48, 96: 72}
    assert {gib: round(memory.other_mac(gib).budget / GIB, 2) for gib in seen} == seen


def test_this_machine_by_metals_own_word_or_by_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    machine = memory.this_machine()
    assert 0 < machine.budget == machine.memory * 3 // 4 and machine.dtype_bytes == 4
    info = {"device_name": "Apple M9", "memory_size": 64 * GIB, "max_recommended_working_set_size": 50 * GIB}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda device: info)
    machine = memory.this_machine()
    assert (machine.name, machine.memory, machine.budget) == ("Apple M9", 64 * GIB, 50 * GIB)
    assert machine.dtype_bytes == 2


def gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def cache_table() -> str:
    lines = ["| size | context | layers, global + local | 16 | 8 | 4 | 8, local too | 4, local too |", "|" + "---|" * 8]
    for name, config in SIZES.items():
        far = config.text.layer_types.count(GLOBAL)
        for context in (4096, 32768, 131072):
            if context <= FULL[name]:
                pairs = [(16, 16), (8, 16), (4, 16), (8, 8), (4, 4)]
                cells = [gib(sum(cache_bytes(config, context, kv_bits=a, local_kv_bits=b))) for a, b in pairs]
                layers = f"{far} + {config.text.num_hidden_layers - far}"
                lines.append(f"| {name} | {context // 1024}k | {layers} | {' | '.join(cells)} |")
    return "\n".join(lines)


def weight_table() -> str:
    lines = ["| size | parameters | 16 bits | 8 | 6 | 4 | 4, words only |", "|" + "---|" * 7]
    for name, config in SIZES.items():
        count = sum(map(math.prod, memory.parameter_shapes(config).values()))
        cells = [gib(planned_bytes(config, bits)) for bits in (16, 8, 6, 4)]
        words = gib(planned_bytes(replace(config, vision=None), 4))
        lines.append(f"| {name} | {count:,} | {' | '.join(cells)} | {words} |")
    return "\n".join(lines)


def working_table() -> str:
    lines = ["| size | cache bits | at 8k (tokens at once) | at 32k | at 128k | a picture |", "|" + "---|" * 6]
    for name, config in SIZES.items():
        for bits in memory.KV_BITS[:2]:
            cells = []
            for context in (8192, 32768, 131072):
                if context <= FULL[name]:
                    chunk = chunk_size(config, context, kv_bits=bits)
                    cells.append(f"{gib(estimate(config, 0, context=context, kv_bits=bits).prefill)} ({chunk:,})")
                else:
                    cells.append("–")
            picture = gib(memory.vision_bytes(config)) if config.vision else "–"
            lines.append(f"| {name} | {bits} | {' | '.join(cells)} | {picture} |")
    return "\n".join(lines)


def mac_table() -> str:
    """The longest context at 8 and at 4 bits, cache in 16 and in 8."""
    columns = [(8, 16), (8, 8), (4, 16), (4, 8)]
    heads = [f"{bits} bits, cache {kv}" for bits, kv in columns]
    lines = [f"| memory | size | {' | '.join(heads)} |", "|" + "---|" * 6]
    for memory_gib in (8, 16, 24, 32, 64):
        budget = memory.other_mac(memory_gib).budget
        for name in ("4B", "12B", "27B"):
            found = [
                memory.largest_context(SIZES[name], planned_bytes(SIZES[name], bits), budget, kv_bits=kv)
                for bits, kv in columns
            ]
            if any(found):
                cells = [tokens_text(tokens) if tokens else "–" for tokens in found]
                lines.append(f"| {memory_gib} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def phone_table() -> str:
    """What is needed at 4 bits, cache in 8."""
    lines = ["| size | 4k tokens | 8k | 32k | 8k, words only |", "|" + "---|" * 5]
    for name in ("270M", "1B", "4B"):
        whole = SIZES[name]
        words = replace(whole, vision=None)
        asked = [(whole, 4096), (whole, 8192), (whole, 32768), (words, 8192)]
        totals = [estimate(each, planned_bytes(each, 4), context=context, kv_bits=8).total for each, context in asked]
        lines.append(f"| {name} | {' | '.join(map(gib, totals))} |")
    return "\n".join(lines)


@pytest.mark.parametrize("table", [cache_table, weight_table, working_table, mac_table, phone_table])
def test_the_document_says_what_the_code_computes(table: Any) -> None:
    assert table() in DOCUMENT.read_text(encoding="utf-8"), f"docs/memory.md needs\n{table()}"

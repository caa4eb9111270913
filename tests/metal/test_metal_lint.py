"""What a Mac would be asked to do, without a Mac: load, prompts, steps, pictures and choices, by Metal's rules.

metal_trace.py records it, metal_rules.py judges it. test_metal_lint_catches.py shows that each fault would be found.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_gguf
from metal_models import caches_after, empty_model, gpu_runner, on_gpu
from metal_rules import (
    PRODUCTS,
    FewBuffers,
    Stage,
    Table,
    check,
    command_buffers,
    outdated,
    too_many_dispatches,
    warn_of_few_buffers,
)
from metal_trace import Issued, Spec, Trace, kernels_of, without_storage
from mlx.utils import tree_flatten

from mlx_gemma3.checkpoint.load import load_model
from mlx_gemma3.checkpoint.packings import _MODES
from mlx_gemma3.checkpoint.published import SIZES
from mlx_gemma3.config import Config
from mlx_gemma3.generation import sampling
from mlx_gemma3.generation.batch import Batch, Row
from mlx_gemma3.generation.choice import Chooser, choose
from mlx_gemma3.generation.constraint import Constraint
from mlx_gemma3.generation.prefill import usual_chunk
from mlx_gemma3.generation.sampling import Sampling
from mlx_gemma3.model.device import compiled
from mlx_gemma3.model.runner import Runner, on_device

TABLE = Table.read()
VOCABULARY = 262_208  # with pictures; without, 262,144: a whole number of blocks
# Of a step: three gathers and an unpacking of the embedding's rows, its scale, the last norm, the head, logits' type.
OUTSIDE = 8

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="without it MLX compiles nothing on a CPU")


def pooling(config: Config) -> frozenset[tuple[int, ...]]:
    """What the projector computes in float32, once a picture: the mean of 16 rows, and its norm."""
    assert config.vision is not None
    grid, size, count = config.vision.grid, config.vision.hidden_size, config.mm_tokens_per_image
    side = round(count**0.5)
    step = grid // side
    pixels = (1, config.vision.image_size, config.vision.image_size, 3)
    cells = {(1, side, step, side, step, size), (1, side, 1, side, 1, size), (1, side, side, size), (1, count, size)}
    return frozenset({pixels, *cells})


def stage(runner: Runner, name: str, **settings: object) -> Stage:
    """What holds for all that goes through the decoder."""
    text = runner.config.text
    return Stage(name, text.vocab_size, gelus=text.num_hidden_layers, **settings)  # type: ignore[arg-type]


def test_the_table_of_kernels_is_as_new_as_mlx() -> None:
    if sentence := outdated(TABLE, mx.__version__):
        pytest.skip(sentence)


@pytest.mark.parametrize("mode", _MODES)
def test_every_packing_that_is_loaded_has_its_kernels(mode: str) -> None:
    many_bits, groups = _MODES[mode]
    functions = ("quantize", "dequantize", *PRODUCTS[True], *PRODUCTS[False])
    want = {
        f"{mode} {function} {dtype} {bits}/{group}"
        for function in functions
        for dtype in ("bfloat16_t", "float")
        for bits in many_bits
        for group in groups
    }
    assert not want - TABLE.names


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_loading(kind: str, tmp_path: Path) -> None:
    config, faults = tiny.image_config(hidden_size=64), list[str]()
    tensors = tiny.random_tensors(config)
    if kind == "folder":
        packing = {"bits": 4, "group_size": 32}
        packed = tiny.pack({name: values for name, values in tensors.items() if "language_model" in name}, packing)[0]
        source = tiny.write_folder(tmp_path / "model", config, {**tensors, **packed}, packing=packing)
    else:
        source = tiny_gguf.write_gguf(tmp_path / "model.gguf", config, tensors, kind="Q8_0")
        tiny_gguf.write_mmproj(tmp_path / "mmproj-model.gguf", config, tensors)
    load = Stage("load", 1 << 40)
    with Trace() as trace, on_gpu():
        trace.evaluated.append(lambda arrays: faults.extend(check(trace.graph(arrays), load, TABLE)))
        model = load_model(source)
        on_device(model)
    assert faults == []
    assert all(settings.get("stream") is None for settings in trace.loads) and bool(trace.loads) == (kind == "folder")
    floats = [array for _, array in tree_flatten(model.parameters()) if mx.issubdtype(array.dtype, mx.floating)]
    assert {array.dtype for array in floats} == {mx.bfloat16}


@pytest.mark.parametrize("before", [0, 3000])
@pytest.mark.parametrize(("size", "bits"), [("270M", 4), ("1B", None), ("4B", 4), ("27B", 4)])
def test_prompts(size: str, bits: int | None, before: int) -> None:
    with Trace() as trace:
        runner = gpu_runner(empty_model(SIZES[size], bits=bits))
        for length in (2, 9, 512, 1024):
            caches = caches_after(runner, before) if before else runner.make_caches()
            fused = "always" if length <= 8 or runner.config.text.head_dim <= 128 else "m5" if length >= 1024 else "no"
            with trace.lazily():
                hidden = runner.read([[5] * length], None, caches, last_only=True)
                logits = runner.head(hidden)
            graph = trace.graph(logits, caches.arrays)
            assert check(graph, stage(runner, f"prompt of {length} after {before}", fused=fused), TABLE) == []


def test_a_prompt_with_a_picture() -> None:
    ids = [2, *range(5, 30), 255_999, *[262_144] * 256, 256_000, *range(5, 50)]
    with Trace() as trace:
        runner = gpu_runner(empty_model(SIZES["4B"]))
        features = without_storage(Spec((1, 256, runner.config.text.hidden_size), mx.bfloat16))
        caches, spans = runner.make_caches(), [(27, 27 + 256)]
        with trace.lazily():
            hidden = runner.read([ids], features, caches, spans=spans)
        assert check(trace.graph(hidden, caches.arrays), stage(runner, "picture in a prompt"), TABLE) == []


@pytest.mark.parametrize("kv_bits", [16, 8, 4])
@pytest.mark.parametrize("size", ["4B", "27B"])
def test_the_last_chunk_of_a_very_long_prompt(size: str, kv_bits: int) -> None:
    with Trace() as trace:
        runner = gpu_runner(empty_model(SIZES[size]))
        context = runner.config.text.max_position_embeddings
        length = usual_chunk(runner, runner.make_caches(kv_bits=kv_bits), context)
        caches = caches_after(runner, context - length, kv_bits=kv_bits)
        with trace.lazily():
            hidden = runner.read([[5] * length], None, caches, last_only=True)
        assert check(trace.graph(hidden, caches.arrays), stage(runner, "128k"), TABLE) == []


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize(
    ("size", "bits", "kv_bits"), [("270M", 4, 16), ("1B", None, 16), ("4B", 4, 16), ("4B", 4, 8), ("27B", None, 16)]
)
def test_steps(size: str, bits: int | None, kv_bits: int, sequences: int) -> None:
    with Trace() as trace:
        runner = gpu_runner(empty_model(SIZES[size], bits=bits))
        rows = [caches_after(runner, 700 + 600 * row, kv_bits=kv_bits) for row in range(sequences)]
        with trace.lazily():
            logits = runner.step(mx.array([3] * sequences), rows)
        graph = trace.graph(logits, [caches.arrays for caches in rows])
    step = stage(runner, "step", sequences=sequences, decoding=True, fused="always")
    assert check(graph, step, TABLE) == []


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("size", ["270M", "4B"])
def test_a_step_is_17_dispatches_a_layer(size: str, sequences: int) -> None:
    with Trace(compiled=True) as trace:
        runner = gpu_runner(empty_model(SIZES[size]))
        rows = [caches_after(runner, 700) for _ in range(sequences)]
        with trace.lazily():
            logits = runner.step(mx.array([3] * sequences), rows)
        kernels = kernels_of(logits, [caches.arrays for caches in rows])
    layers = runner.config.text.num_hidden_layers
    assert too_many_dispatches(kernels, layers=layers, sequences=sequences, outside=OUTSIDE) is None
    assert sum(count for name, count in kernels.items() if "Sigmoid" in name) == layers


def test_the_host_is_not_asked_between_two_steps() -> None:
    """From the choice of a token to the issue of the next, through the loop that answers are written by."""
    with Trace() as trace:
        runner = gpu_runner(empty_model(SIZES["4B"]))
        rows = [Row(caches_after(runner, 700), Chooser(Sampling(seed=seed)), 9) for seed in (1, 2)]
        logits = without_storage(Spec((1, runner.config.text.vocab_size), mx.float32))
        batch = Batch(runner)
        for row in rows:
            batch.join(row, logits)
        with trace.lazily(), pytest.raises(Issued) as caught:
            batch.next()
        graph = trace.graph(list(caught.value.args))
    assert sum(node.name == "scaled_dot_product_attention" for node in graph.nodes) == 2 * 34
    one = stage(runner, "loop", sequences=2, decoding=True, fused="always")
    assert check(graph, one, TABLE) == []


def test_pictures() -> None:
    """Fails while the tower's GELU is eager and its heads of 72 are padded to 80."""
    with Trace() as trace:
        runner = gpu_runner(empty_model(SIZES["4B"]))
        vision = runner.config.vision
        assert vision is not None
        pixels = without_storage(Spec((1, vision.image_size, vision.image_size, 3), mx.float32))
        with trace.lazily():
            features = runner.encode_images(pixels)
        graph = trace.graph(features)
    tower = Stage(
        "tower",
        runner.config.text.vocab_size,
        fused="always",
        gelus=vision.num_hidden_layers,
        wide=pooling(runner.config),
    )
    assert not (faults := check(graph, tower, TABLE)), "\n".join(faults)
    assert not [node for node in graph.nodes if node.name == "Pad"]


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"temperature": 0.0}, 2048),
        ({}, 2048),
        ({"min_p": 0.1, "logprobs": 5, "top_k": 20}, 2048),
        ({"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5}, 2048),
        ({"logit_bias": {7: 2.0}, "top_p": 1.0}, 2048),
        ({"top_k": 0}, VOCABULARY),  # what is asked for is the order of all
    ],
)
def test_choices(settings: dict[str, object], most: int, sequences: int) -> None:
    with Trace() as trace:
        logits = without_storage(Spec((sequences, VOCABULARY), mx.float32))
        mx.eval(logits)
        choosers = [Chooser(Sampling(seed=seed, **settings), [4, 5]) for seed in range(sequences)]  # type: ignore[arg-type]
        with trace.lazily(), on_gpu() as patch:
            patch.setattr(sampling, "_draw", compiled(sampling._draw.__wrapped__))
            chosen = choose(logits, choosers)
            again = choose(logits, choosers)  # with what the first choice left behind
        graph = trace.graph(chosen.arrays, again.arrays)
    assert check(graph, Stage("choice", VOCABULARY, sequences, decoding=True, sorted=most), TABLE) == []


def test_a_draw_is_few_kernels() -> None:
    """Three rounds of maxima, order and gathering, and the draw: 30 dispatches, 39 before."""
    logits, chooser = mx.zeros((1, VOCABULARY)), Chooser(Sampling(seed=1))
    with on_gpu() as patch:
        patch.setattr(sampling, "_draw", compiled(sampling._draw.__wrapped__))
        found = kernels_of(choose(logits, [chooser]).arrays)
    assert sum(found.values()) <= 30, found


def test_a_choice_under_a_constraint() -> None:
    class Even(Constraint):
        def allowed(self) -> np.ndarray:
            return np.full(VOCABULARY // 32, 0x55555555, dtype=np.uint32)

        def accept(self, token: int) -> None:
            """Anything."""

    with Trace() as trace:
        logits = without_storage(Spec((1, VOCABULARY), mx.float32))
        chooser = Chooser(Sampling(seed=1), constraint=Even())
        with trace.lazily(), on_gpu() as patch:
            patch.setattr(sampling, "_draw", compiled(sampling._draw.__wrapped__))
            chosen = choose(logits, [chooser])
        graph = trace.graph(chosen.arrays)
    assert check(graph, Stage("choice", VOCABULARY, decoding=True), TABLE) == []


def test_command_buffers_of_a_step() -> None:
    """Below 12 the host may run ahead of what its caches are written by (rule 7): 270M and 1B are warned of."""
    counts = {}
    for size in ("270M", "1B", "4B", "12B"):
        with Trace() as trace:
            runner = gpu_runner(empty_model(SIZES[size]))
            caches = caches_after(runner, 700)
            with trace.lazily():
                logits = runner.step(mx.array([3]), [caches])
            graph = trace.graph(logits, caches.arrays)
        counts[size] = command_buffers(graph), command_buffers(graph, operations=50, mebi=50)
    few = [size for size, (_, fewest) in counts.items() if fewest < 12]
    assert few == ["270M", "1B"], counts
    for size in few:
        with pytest.warns(FewBuffers, match=f"rule 7: {size}"):
            warn_of_few_buffers(size, counts[size][1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_few_buffers("4B", counts["4B"][1])

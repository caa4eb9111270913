"""`bench` as a person types it, the bytes of a step against a count by hand, and memory that stays where it is."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import random_model
import tiny
import typer
from memory_held import start_measuring
from typer.testing import CliRunner

from mlx_gemma3.checkpoint.load import load_model, open_checkpoint
from mlx_gemma3.checkpoint.memory import planned_bytes
from mlx_gemma3.checkpoint.published import SIZES
from mlx_gemma3.checkpoint.source import resolve
from mlx_gemma3.checkpoint.weights import open_store
from mlx_gemma3.commands.bench import bench, parse_sizes
from mlx_gemma3.errors import Gemma3Error, OptionError, OutputError
from mlx_gemma3.generation.batch import decode
from mlx_gemma3.generation.prefill import prefill
from mlx_gemma3.generation.sampling import Sampling
from mlx_gemma3.measure import benchmark, roofline
from mlx_gemma3.measure.benchmark import Plan, measure, measure_decoding, random_ids
from mlx_gemma3.measure.roofline import Bandwidth, published, step_kv_bytes, step_weight_bytes
from mlx_gemma3.model.cache import Caches
from mlx_gemma3.model.gemma3 import Gemma3
from mlx_gemma3.model.runner import Runner, on_device

Run = Callable[..., str]
QUICK = ("--prompt-tokens", "9,5", "--context", "3,40", "--tokens", "6", "--repeat", "2", "--quiet")
SPEED = 4e9  # bytes a second that the tests' machine is said to read


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "bandwidth", lambda: Bandwidth("a test", SPEED, "published"))


@pytest.fixture
def run() -> Run:
    """What the command writes to standard output; its error, raised, when there is one."""
    app = typer.Typer()
    app.command()(bench)

    def call(*words: object) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words])
        if result.exception is not None:
            raise result.exception
        return result.stdout

    return call


def test_the_json_has_every_figure_and_they_agree(chat_folder: Path, run: Run) -> None:
    about = json.loads(run("-m", chat_folder, *QUICK, "--batch", 2, "--images", 2, "--json"))
    assert about["model"] == str(chat_folder) and about["size"] is None and about["dtype"] == "float32"
    assert set(about["versions"]) == {"mlx", "mlx-gemma3"} and about["load_seconds"] > 0
    assert about["machine"]["backend"] and about["machine"]["mlx"] == about["versions"]["mlx"]
    assert about["bandwidth"] == {"device": "a test", "bytes_per_second": SPEED, "source": "published"}
    assert [row["tokens"] for row in about["prompts"]] == [5, 9]
    assert [row["context"] for row in about["decoding"]] == [3, 40]
    assert about["pictures"]["count"] == 2
    assert list(about["sampling"]) == ["greedy", "top-k 64, top-p 0.95", "min-p 0.05"]
    for spread in spreads(about):
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    for row in about["prompts"]:  # the first token comes after the prompt is read
        assert row["first_token_seconds"]["high"] > row["tokens"] / row["tokens_per_second"]["high"]
    for row in about["decoding"]:
        steps = row["tokens_per_second"]["median"] / 2
        assert row["bandwidth_share"] == pytest.approx((row["weight_bytes"] + row["kv_bytes"]) * steps / SPEED)
    for row in (*about["prompts"], *about["decoding"], about["pictures"]):
        assert row["peak_memory"] > about["weights"] > 0


def spreads(about: Any) -> Iterator[dict[str, float]]:
    if isinstance(about, dict):
        if set(about) == {"median", "low", "high"}:
            yield about
        for value in about.values():
            yield from spreads(value)
    if isinstance(about, list):
        for value in about:
            yield from spreads(value)


def test_the_table_has_a_line_for_each_figure(text_folder: Path, run: Run) -> None:
    lines = run("-m", text_folder, *QUICK).splitlines()
    starts = [line.split()[0] for line in lines if line]
    assert starts[0] == "chip"
    figures = starts[starts.index("load") + 1 :]
    assert figures == ["memory", "prompt", "5", "9", "decode", "3", "40", "sampling", "greedy", "top-k", "min-p"]
    assert "memory bandwidth 4 GB/s, published" in lines
    assert all(re.search(r"\(\S+ to \S+\)", line) for line in lines if line[:1].isspace() or "top-k" in line)


def test_without_sizes_it_takes_what_the_model_has_positions_for(tmp_path: Path) -> None:
    config = tiny.text_config(max_position_embeddings=200)
    checkpoint = open_checkpoint(resolve(tiny.write_folder(tmp_path, config, tiny.random_tensors(config))))
    plan = Plan(tokens=9).fitted(checkpoint)
    assert (plan.prompts, plan.contexts, plan.images) == ((100,), (100,), 0)
    config = tiny.text_config(max_position_embeddings=2048)
    checkpoint = open_checkpoint(resolve(tiny.write_folder(tmp_path, config, tiny.random_tensors(config))))
    assert Plan().fitted(checkpoint).contexts == (512,)


@pytest.mark.parametrize("packing", [None, {"bits": 4, "group_size": 32}])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_of_a_step_are_the_arrays_that_it_reads(
    tmp_path: Path, packing: dict[str, Any] | None, tied: bool
) -> None:
    """Counted on the loaded model: every array of the decoder; of an embedding that is not the head, its rows."""
    config = tiny.image_config() | {"tie_word_embeddings": tied}
    tensors: Any = tiny.random_tensors(config)
    if packing:
        words = {name: values for name, values in tensors.items() if "vision" not in name and "projector" not in name}
        tensors = tensors | tiny.pack(words, packing)[0]
    folder = tiny.write_folder(tmp_path, config, tensors, packing=packing)
    checkpoint = open_checkpoint(resolve(folder))
    model = load_model(checkpoint, dtype="float32")
    embedding = nbytes(model.language_model.embed_tokens)
    want = nbytes(model.language_model) + 3 * embedding // 512  # a row for each of 3 tokens, of 512 in all
    want += 0 if tied else nbytes(model.lm_head) - embedding
    entries = open_store(checkpoint).entries
    assert step_weight_bytes(entries, checkpoint.config, batch=3, dtype_bytes=4) == want


def nbytes(module: Any) -> int:
    from mlx.utils import tree_flatten

    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))


def test_the_table_of_published_sizes_is_what_the_code_counts() -> None:
    page = (Path(__file__).parent.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    told = [line.split("|")[1:-1] for line in page.split("roofline -->")[1].splitlines() if line.startswith("| ")][1:]
    want = []
    for size, config in SIZES.items():
        words = replace(config, vision=None)
        weights = [planned_bytes(words, bits) for bits in (16, 8, 4)]
        kv = step_kv_bytes(words, 4096, kv_bits=16, dtype_bytes=2)
        tokens = [speed * 1e9 / (weights[2] + kv) for speed in (100, 273, 546, 819)]
        want.append(
            [size, *(f"{each / 1e9:.3f}" for each in weights), f"{kv / 1e6:.1f}", *(f"{t:.0f}" for t in tokens)]
        )
    assert [[cell.strip() for cell in row] for row in told] == want


@pytest.mark.parametrize(
    ("depth", "kv_bits", "want"),
    [
        # 8 layers, the sixth global, window 16; a row is 2 * 2 heads * 64 numbers = 1024 bytes of float32
        (9, 16, 8 * 10 * 1024),
        (99, 16, (7 * 16 + 100) * 1024),
        (99, 8, 7 * 16 * 1024 + 100 * (256 + 4 * 8)),  # a byte a number; 4 groups, a scale and a bias of 4 bytes each
        (99, 4, 7 * 16 * 1024 + 100 * (128 + 4 * 8)),
    ],
)
def test_keys_and_values_of_a_step(depth: int, kv_bits: int, want: int) -> None:
    config = random_model.tiny_config(num_key_value_heads=2, head_dim=64, sliding_window=16)
    assert step_kv_bytes(config, depth, kv_bits=kv_bits, dtype_bytes=4) == want
    caches = Gemma3(config).make_caches(kv_bits=kv_bits)
    for layer in caches:  # the rows that a step is given once `depth` tokens are held
        layer.append(mx.zeros((1, 4, depth, 64)))
    given = sum(part.nbytes for layer in caches for part in layer.append(mx.zeros((1, 4, 1, 64))))
    assert given == want


def test_the_bandwidth_of_a_chip_and_of_a_machine_that_is_in_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    assert published("Apple M2 Ultra", 192 * gib) == 800e9
    assert (published("Apple M4 Max", 36 * gib), published("Apple M4 Max", 128 * gib)) == (410e9, 546e9)
    assert published("AMD EPYC", 8 * gib) is None
    monkeypatch.setattr(roofline, "_COPY", 8 << 20)
    found = roofline.bandwidth()
    if mx.default_device().type == mx.DeviceType.cpu:
        assert found.source == "measured with a copy" and 1e8 < found.bytes_per_second < 1e13


def test_decoding_goes_back_to_its_depth_and_steps_are_counted_alike_for_rows_together() -> None:
    for tokens, batch in ((5, 1), (30, 3)):  # 30 is more than the slack of a window of 8
        steps: list[int] = []

        class Counted(Runner):
            def step(self, tokens: mx.array, rows: Sequence[Caches]) -> mx.array:
                assert tokens.shape == (batch,) == (len(rows),)  # noqa: B023
                steps.append(rows[0].offset)  # noqa: B023
                return super().step(tokens, rows)

        runner = Counted(random_model.random_model(random_model.tiny_config()))
        spread, peak = measure_decoding(runner, 20, tokens=tokens, batch=batch, repeat=2)
        once = list(range(20, 20 + tokens))
        assert steps == [*range(20, 20 + min(tokens, 4)), *once, *once]
        assert spread.low > 0 and peak > 0


def test_random_ids_hold_no_image_token() -> None:
    runner = Runner(random_model.random_model(random_model.tiny_config()))
    ids = random_ids(runner, 500, 2)
    assert ids.shape == (2, 500) and len(np.unique(ids)) == 63 and random_model.IMAGE not in ids


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--prompt-tokens", "0"), "--prompt-tokens: got '0'"),
        (("--context", "512,abc"), "--context: got '512,abc'"),
        (("--context", "2k"), "context: got 2048, want at most 959 here, the model has 1024 positions"),
        (("--prompt-tokens", "2000"), "prompt tokens: got 2000, want at most 1024"),
        (("--tokens", "0"), "tokens: got 0, want >= 1"),
        (("--tokens", "5000"), "tokens: got 5000"),
        (("--batch", "0"), "batch: got 0, want >= 1"),
        (("--repeat", "-1"), "repeat: got -1, want >= 1"),
        (("--images", "-1"), "images: got -1, want >= 0"),
        (("--images", "1"), "images: got 1, want 0; this checkpoint is text-only"),
        (("--kv-bits", "5"), "kv bits: got 5, want 16, 8 or 4"),
        (("--kv-bits", "8"), "kv bits: got 8, want 16, since head_dim 32"),
        (("--dtype", "float16"), "dtype: got 'float16'"),
        (("--plot", "x.pdf"), "plot: got 'x.pdf'"),
    ],
)
def test_bad_values_are_one_line(text_folder: Path, run: Run, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(Gemma3Error, match=re.escape(said)) as caught:
        run("-m", text_folder, *words)
    assert isinstance(caught.value, OptionError) and "\n" not in str(caught.value)


def test_sizes_as_a_person_writes_them() -> None:
    assert parse_sizes("--context", "4k, 512,512") == (512, 4096)
    assert parse_sizes("--context", None) is None


def test_a_plot_needs_matplotlib_and_says_so_before_any_work(text_folder: Path, tmp_path: Path, run: Run) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        patch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(OptionError, match=r"matplotlib is not installed; pip install 'mlx-gemma3\[plot\]'"):
            run("-m", "nothing/like-it", "--plot", tmp_path / "x.png")
    pytest.importorskip("matplotlib")
    out = tmp_path / "bench.svg"
    run("-m", text_folder, *QUICK, "--plot", out)
    assert "decoding" in out.read_text(encoding="utf-8") and [path.name for path in tmp_path.iterdir()] == [out.name]
    with pytest.raises(OutputError, match="no such folder"):
        run("-m", text_folder, *QUICK, "--plot", tmp_path / "none" / "x.png")


def test_measuring_loads_once_and_says_what_it_does(text_folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    plan = Plan(prompts=(4,), contexts=(3,), tokens=2, repeat=1)
    measure(text_folder, plan, progress=lambda what, done, total: told.append((what, done, total)))
    assert told == [
        ("loading", 0, 0),
        ("prompt of 4 tokens", 0, 3),
        ("decoding after 3 tokens", 1, 3),
        ("sampling", 2, 3),
    ]


STEPS = 100


def growth(runner: Runner, held: Callable[[Any], Any]) -> tuple[int, int]:
    """(growth of the memory's peak over 100 decode steps, bytes of the caches); `held` sees the caches each step."""
    caches = runner.make_caches()
    prompt = [int(token) for token in np.random.default_rng(0).integers(4, 58, 130)]
    logits = prefill(runner, prompt, caches)
    steps = decode(runner, logits, caches, sampling=Sampling(temperature=0), max_tokens=STEPS)
    kept = None
    for _ in range(10):  # all that a step needs was allocated once
        next(steps)
    before = start_measuring()
    for _ in steps:
        kept = held(caches)
    mx.synchronize()
    del kept
    return mx.get_peak_memory() - before, caches.nbytes


@pytest.mark.parametrize("fused", [False, True])
def test_memory_is_flat_over_a_hundred_steps_and_a_held_reference_shows(fused: bool) -> None:
    """130 + 100 tokens fit into the first 256 rows of a global layer, and into the buffer of a window of 128."""
    config = random_model.tiny_config(
        vision=False, sliding_window=128, head_dim=64, num_key_value_heads=4, hidden_size=16, intermediate_size=16
    )
    model = random_model.random_model(config)
    runner = on_device(model) if fused else Runner(model)
    flat, size = growth(runner, lambda caches: None)
    copied, _ = growth(runner, lambda caches: [array[...] for array in caches.arrays])
    assert flat < size / 8, (flat, size)
    assert copied > size / 2, (copied, size)

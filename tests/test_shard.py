"""A model over several machines is the same model: logits, what each machine holds, what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_adapter
import tiny_gguf
from machines import together
from memory_held import start_measuring
from mlx.utils import tree_flatten

from mlx_gemma3.checkpoint.adapter import read_adapter
from mlx_gemma3.checkpoint.load import load_model, open_checkpoint
from mlx_gemma3.checkpoint.memory import loaded_bytes, planned_bytes, share_of, share_of_entries
from mlx_gemma3.checkpoint.published import SIZES
from mlx_gemma3.checkpoint.safetensors import locate
from mlx_gemma3.checkpoint.source import resolve
from mlx_gemma3.checkpoint.weights import open_store
from mlx_gemma3.commands.program import run
from mlx_gemma3.errors import OptionError
from mlx_gemma3.measure.fits import fitting
from mlx_gemma3.model.adapter import own_terms
from mlx_gemma3.model.context import Chunk
from mlx_gemma3.model.fused import gpu_kernels
from mlx_gemma3.model.gemma3 import Gemma3
from mlx_gemma3.model.runner import Runner, on_device
from mlx_gemma3.model.shard import WHOLE, Shard, fitting_machines

NEAR = 1e-4  # of float32 sums in another order; the bound is 1e-3
PLAIN, FOUR, EIGHT = None, {"bits": 4, "group_size": 32}, {"bits": 8, "group_size": 32}
IDS = np.random.default_rng(0).integers(3, 499, (1, 40)).astype(np.int32)
IDS[0, 10:14] = 502  # a picture
PIXELS = np.random.default_rng(1).uniform(-1, 1, (1, 56, 56, 3)).astype(np.float32)


def written(folder: Path, packing: dict | None = None, **changes: object) -> Path:
    """A checkpoint with pictures."""
    tied = {"tie_word_embeddings": changes.pop("tie_word_embeddings", True)}
    config = tiny.image_config(num_hidden_layers=6, **changes) | tied
    tensors = tiny.random_tensors(config, seed=4)
    return tiny.write_folder(folder, config, tiny.pack(tensors, packing)[0] if packing else tensors, packing=packing)


def features(model: Gemma3) -> mx.array:
    rows = model.encode_images(PIXELS)
    mx.eval(rows)
    return rows


def read_and_step(runner: Runner, pictures: mx.array, adapter: str | None = None, **bits: int) -> list[np.ndarray]:
    """Logits of a prompt with a picture, in two chunks, and of four tokens after it, two sequences at a time."""
    first, second = (runner.make_caches(adapter=adapter, **bits) for _ in range(2))
    found = [np.array(runner.head(runner.read(IDS[:, :20], pictures, first)))]
    found.append(np.array(runner.head(runner.read(IDS[:, 20:], None, first, last_only=True))))
    runner.read(IDS[:, 20:33], None, second)
    tokens = mx.array([7, 9])
    for _ in range(4):
        logits = runner.step(tokens, [first, second])
        found.append(np.array(logits))
        tokens = logits.argmax(axis=-1)
    return found


def far(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    assert [x.argmax(-1).tolist() for x in found] == [x.argmax(-1).tolist() for x in wanted]
    return max(float(np.abs(one - other).max()) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("packing", "bits", "changes"),
    [
        (PLAIN, {}, {}),
        (FOUR, {}, {}),
        (EIGHT, {}, {}),
        (PLAIN, {"kv_bits": 8, "local_kv_bits": 4}, {"head_dim": 64}),
        (PLAIN, {}, {"num_key_value_heads": 1}),  # as of 270M and 1B
        (PLAIN, {}, {"vocab_size": 511}),  # divides among nobody: whole everywhere
        (FOUR, {}, {"tie_word_embeddings": False}),
    ],
    ids=["plain", "4 bits", "8 bits", "packed caches", "one kv head", "odd vocabulary", "own head"],
)
def test_logits_are_those_of_one_machine(
    tmp_path: Path, size: int, packing: dict | None, bits: dict[str, int], changes: dict[str, object]
) -> None:
    folder = written(tmp_path / "model", packing, **changes)
    whole = load_model(folder, dtype="float32")
    pictures = features(whole)
    wanted = read_and_step(on_device(load_model(folder, dtype="float32")), pictures, **bits)

    def work(shard: Shard) -> list[np.ndarray]:
        return read_and_step(on_device(load_model(folder, dtype="float32", shard=shard)), pictures, **bits)

    for found in together(size, work):
        assert far(found, wanted) < NEAR


def test_plain_modules_and_a_gpus_kernels_are_cut_as_the_cpus(tmp_path: Path) -> None:
    folder = written(tmp_path / "model")
    whole = load_model(folder, dtype="float32")
    pictures = features(whole)
    wanted = np.array(whole(IDS, PIXELS))

    def work(shard: Shard) -> list[np.ndarray]:
        model = load_model(folder, dtype="float32", shard=shard)
        rows, blocks = model.embed(IDS, pictures)
        plain = model.head(model.language_model(rows, Chunk(IDS.shape[1], None, blocks)))
        runner = Runner(model, gpu_kernels(compiled=False))
        return [np.array(plain), np.array(runner.head(runner.read(IDS, pictures, runner.make_caches())))]

    for found in together(2, work):
        assert far(found, [wanted, wanted]) < NEAR


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_cut_with_the_model(tmp_path: Path, dora: bool) -> None:
    folder = written(tmp_path / "model")
    path = tiny_adapter.write(tmp_path / "adapter", tiny.image_config(num_hidden_layers=6), dora=dora)
    whole = load_model(folder, dtype="float32")
    terms, pictures = read_adapter(path, whole.config, model="tiny").matrices, features(whole)

    def work(shard: Shard) -> list[np.ndarray]:
        runner = on_device(load_model(folder, dtype="float32", shard=shard))
        runner.add_adapter("a", own_terms(terms, runner.config.text, shard))
        return read_and_step(runner, pictures, "a")

    (wanted,) = [work(WHOLE)]
    for found in together(2, work):
        assert far(found, wanted) < NEAR


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_gguf_files_are_cut_too(tmp_path: Path, kind: str) -> None:
    config = tiny.text_config()
    path = tiny_gguf.write_gguf(tmp_path / "model.gguf", config, tiny.random_tensors(config, seed=4), kind=kind)

    def work(shard: Shard) -> list[np.ndarray]:
        runner = on_device(load_model(path, dtype="float32", shard=shard))
        return [np.array(runner.head(runner.read(IDS, None, runner.make_caches(), spans=())))]

    wanted = work(WHOLE)
    for found in together(2, work):
        assert far(found, wanted) < NEAR


@pytest.mark.parametrize("packing", [PLAIN, FOUR])
@pytest.mark.parametrize("size", [2, 4])
def test_a_machine_holds_its_part_and_what_is_said_to_be_repeated(
    tmp_path: Path, size: int, packing: dict | None
) -> None:
    folder = written(tmp_path / "model", packing, hidden_size=256, intermediate_size=512)

    def measured(shard: Shard) -> Counter[str]:
        """Bytes by what becomes of them."""
        counts: Counter[str] = Counter()
        before = start_measuring()
        model = load_model(folder, dtype="float32", shard=shard)
        mx.eval(model.parameters())
        for name, array in tree_flatten(model.parameters()):
            kind = "tower" if name.startswith(("vision_tower", "multi_modal")) else "norms"
            if kind == "norms" and "norm" not in name:
                kind = "kv" if "k_proj" in name or "v_proj" in name else "matrices"
            counts[kind] += array.nbytes
        assert 0 <= mx.get_active_memory() - before - counts.total() < 100_000  # masks, rounding up to pages
        return counts

    whole = measured(WHOLE)
    for rank in range(size):
        part = measured(Shard(rank, size))
        assert part["matrices"] * size == whole["matrices"]
        assert part["kv"] == whole["kv"] // min(size, 2)  # two key-value heads
        assert part["norms"] == whole["norms"] and part["tower"] == (whole["tower"] if rank == 0 else 0)


def test_only_the_bytes_of_a_part_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another machine holds may be missing from the file, as long as the file is as long as it says."""
    folder = written(tmp_path / "model")
    file = folder / "model.safetensors"
    model = load_model(folder, dtype="float32", shard=Shard(0, 2))
    wanted = {name: np.array(x) for name, x in tree_flatten(model.parameters())}
    places = locate(folder, model.config)
    raw = bytearray(file.read_bytes())
    cut = 0
    for name, place in places.items():
        info = place.info
        part = Shard(1, 2).cut(name, info.shape, model.config.text)
        if part is not None:
            mark = np.frombuffer(raw, np.uint8, info.stop - info.start, info.start).reshape(*info.shape, -1)
            mark[part[1] if part[0] == 0 else (slice(None), part[1])] = 0xFF
            cut += 1
    assert cut == 1 + 6 * 7
    file.write_bytes(raw)
    again = load_model(folder, dtype="float32", shard=Shard(0, 2))
    for name, x in tree_flatten(again.parameters()):
        assert np.array_equal(np.array(x), wanted[name]), name


def test_numbers_of_machines_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", {"bits": 4, "group_size": 64})
    with pytest.raises(OptionError, match=r"machines: got 3, want 1 or 2 or 4; the model has 4 query heads"):
        load_model(folder, shard=Shard(0, 3))
    with pytest.raises(OptionError, match=r"machines: got 4, want a number that divides the 2 columns of .*down_proj"):
        load_model(folder, shard=Shard(0, 4))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("270M", [1, 2, 4]), ("4B", [1, 2, 4, 8]), ("12B", [1, 2, 4, 8, 16]), ("27B", [1, 2, 4, 8, 16])],
)
def test_published_sizes_divide(name: str, wanted: list[int]) -> None:
    assert fitting_machines(SIZES[name]) == wanted


@pytest.mark.parametrize("packing", [PLAIN, FOUR])
def test_the_arithmetic_of_memory_is_what_the_first_machine_holds(tmp_path: Path, packing: dict | None) -> None:
    folder = written(tmp_path / "model", packing)
    checkpoint = open_checkpoint(resolve(folder))
    for size in (2, 4):
        held = tree_flatten(load_model(folder, dtype="float32", shard=Shard(0, size)).parameters())
        entries = share_of_entries(open_store(checkpoint).entries, checkpoint.config, size)
        assert loaded_bytes(entries, dtype_bytes=4) == sum(array.nbytes for _, array in held)
        if packing is None:
            assert planned_bytes(checkpoint.config, 16, dtype_bytes=4, machines=size) == loaded_bytes(
                entries, dtype_bytes=4
            )
        text = share_of(checkpoint.config, size).text
        caches = load_model(folder, dtype="float32", shard=Shard(0, size)).language_model.layers[0].self_attn
        assert (text.num_attention_heads, text.num_key_value_heads) == (caches.heads, caches.kv_heads)


def test_fit_says_what_several_machines_have_room_for() -> None:
    def ask(model: str | None, memory: float, machines: int) -> dict:
        return fitting(
            model,
            context=None,
            kv_bits=16,
            local_kv_bits=16,
            bits=16,
            memory=memory,
            text_only=False,
            machines=machines,
        )

    assert [ask("27b", 48, machines)["fits"] for machines in (1, 2)] == [False, True]
    assert [row["size"] for row in ask(None, 48, 8)["sizes"]] == ["4B", "12B", "27B"]
    with pytest.raises(OptionError, match="machines: got 3, want 1 or 2 or 4 or 8"):
        ask("4b", 48, 3)
    with pytest.raises(OptionError, match="--machines: got 7, want 1 or 2 or 4 for 270M"):
        ask(None, 48, 7)


def test_a_command_for_one_machine_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setattr("sys.argv", ["mlx-gemma3", "evaluate", "demo", "--text", "x"])
    assert run() == 1
    assert "mlx-gemma3: evaluate: got several machines (mlx.launch), want one" in capsys.readouterr().err

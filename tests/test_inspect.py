"""`inspect` and `fit` as a person types them: text, JSON, and one line for what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny
import tiny_gguf
import tiny_tokenizer
import typer
from memory_held import start_measuring
from typer.testing import CliRunner

from mlx_gemma3.checkpoint import memory
from mlx_gemma3.checkpoint.memory import GIB
from mlx_gemma3.checkpoint.published import SIZES
from mlx_gemma3.commands.fit import fit, parse_context
from mlx_gemma3.commands.inspect import inspect
from mlx_gemma3.errors import Gemma3Error, OptionError, SourceNotFound

PACKING = {
    "bits": 4,
    "group_size": 32,
    "language_model.embed_tokens": {"bits": 8, "group_size": 32},
    "language_model.layers.3.mlp.down_proj": {"bits": 6, "group_size": 64},
    "language_model.layers.4.mlp.down_proj": {"bits": 6, "group_size": 64},
    "language_model.layers.7.mlp.down_proj": {"bits": 6, "group_size": 64},
}
Run = Callable[..., str]


@pytest.fixture
def run() -> Run:
    """What a command writes to standard output; its error, raised, when there is one."""
    app = typer.Typer()
    app.command()(inspect)
    app.command()(fit)

    def run(*words: str | Path) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        if done.exception is not None:
            raise done.exception
        return done.stdout

    return run


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model with pictures, most of it in 4 bits."""
    config = tiny.image_config()
    folder = tmp_path_factory.mktemp("packed") / "tiny-it-4bit"
    tiny.write_folder(folder, config, tiny.pack(tiny.random_tensors(config), PACKING)[0], packing=PACKING)
    tiny_tokenizer.write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("…", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny.text_config()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return tiny_gguf.write_gguf(path, config, tiny.random_tensors(config), kind="Q8_0")


def about(run: Run, *words: str | Path) -> dict[str, Any]:
    return json.loads(run(*words, "--json"))


def parts_of(found: dict[str, Any], key: str) -> dict[str, Any]:
    return {row["part"]: row[key] for row in found["parts"]}


def test_a_plain_base_checkpoint(run: Run, text_folder: Path) -> None:
    found = about(run, "inspect", text_folder)
    assert (found["format"], found["size"], found["chat"], found["context"]) == ("safetensors", None, False, 1024)
    assert found["pictures"] is None and found["chat_template"] is None
    assert found["layers"] == {"count": 8, "global": [5], "local": 7, "window": 16}
    count = sum(map(math.prod, tiny.tensor_shapes(tiny.text_config()).values()))
    assert (found["parameters"], found["bytes"], found["bits_per_weight"]) == (count, 4 * count, 32)
    assert found["matrices"] == {"usual": "F32", "others": {}}
    assert parts_of(found, "parameters") == {
        "embed_tokens": 512 * 64,
        "attention": 8 * (2 * 64 * 128 + 2 * 64 * 64),
        "mlp": 8 * 3 * 64 * 128,
        "norms": 8 * (4 * 64 + 2 * 32) + 64,
    }
    assert found["tokenizer"] == {"file": "tokenizer.model", "vocabulary": 512}
    assert found["generation"] == tiny.GENERATION


def test_a_packed_chat_checkpoint_with_pictures(run: Run, packed_folder: Path) -> None:
    found = about(run, "inspect", packed_folder)
    assert found["chat"] and found["chat_template"] == "chat_template.jinja"
    assert found["pictures"] == {"pixels": 56, "tokens": 4}
    assert found["matrices"] == {
        "usual": "4 bits, groups of 32",
        "others": {
            "8 bits, groups of 32": ["language_model.embed_tokens"],
            "6 bits, groups of 64": ["language_model.layers.3-4,7.mlp.down_proj"],
            "F32": ["vision_tower.encoder.layers.0-1.mlp.fc2"],  # its width 80 divides by no group
        },
    }
    stored = parts_of(found, "stored")
    assert stored["mlp"] == {"4 bits, groups of 32": 21 * 8192, "6 bits, groups of 64": 3 * 8192}
    assert stored["embed_tokens"] == {"8 bits, groups of 32": 512 * 64} and stored["norms"].keys() == {"F32"}
    assert parts_of(found, "bytes")["embed_tokens"] == 512 * 64 + 512 * 64 // 32 * 8  # float32 scales and biases
    assert 0 < (packed_folder / "model.safetensors").stat().st_size - found["bytes"] < 40_000  # the header


def test_an_unpacked_tower_is_one_line(run: Run, tmp_path: Path) -> None:
    config, packing = tiny.image_config(), {"bits": 8, "group_size": 32}
    tensors = tiny.random_tensors(config)
    tower = {name.removesuffix(".weight"): False for name in tensors if name.startswith("vision_tower.")}
    packed, _ = tiny.pack(tensors, packing | tower)
    folder = tiny.write_folder(tmp_path / "m", config, packed, packing=packing)
    assert about(run, "inspect", folder)["matrices"] == {
        "usual": "8 bits, groups of 32",
        "others": {"F32": ["vision_tower"]},
    }


def test_a_gguf(run: Run, gguf_file: Path) -> None:
    found = about(run, "inspect", gguf_file)
    assert (found["format"], found["chat"], found["pictures"]) == ("gguf", False, None)
    assert found["matrices"] == {"usual": "Q8_0", "others": {}}
    assert parts_of(found, "stored")["attention"] == {"Q8_0": 8 * 24576}
    assert parts_of(found, "bytes")["attention"] == 8 * 24576 // 32 * 34
    assert found["tokenizer"] is None  # its names are no SentencePiece vocabulary
    with_tower = tiny.image_config()
    folder = gguf_file.parent / "pictures"
    tensors = tiny.random_tensors(with_tower)
    path = tiny_gguf.write_gguf(folder / "model.gguf", with_tower, tensors, kind="Q4_0")
    tiny_gguf.write_mmproj(folder / "mmproj.gguf", with_tower, tensors)
    found = about(run, "inspect", path)
    assert found["pictures"] == {"pixels": 56, "tokens": 4} and "vision_tower" in parts_of(found, "stored")


def test_memory_is_the_estimate_at_contexts_up_to_the_models(run: Run, packed_folder: Path) -> None:
    rows = about(run, "inspect", packed_folder)["memory"]
    assert [(row["context"], row["kv_bits"]) for row in rows] == [(1024, 16), (1024, 8), (1024, 4)]
    assert rows[0]["kv"] > rows[1]["kv"] > rows[2]["kv"]
    assert all(row["total"] > row["weights"] + row["kv"] for row in rows)


def test_the_text_says_what_the_json_says(run: Run, packed_folder: Path) -> None:
    lines = run("inspect", packed_folder).splitlines()
    facts = dict(line.split(None, 1) for line in lines[1:8])
    assert lines[0] == str(packed_folder)
    assert facts["model"] == "Gemma 3 of another size, chat, safetensors"
    assert facts["context"] == "1,024 tokens" and facts["pictures"] == "56 x 56 pixels, 4 tokens each"
    assert facts["layers"] == "8: 1 global, 7 local with a window of 16"
    assert "generation     do_sample true, top_k 64" in lines
    assert "  6 bits, groups of 64: language_model.layers.3-4,7.mlp.down_proj" in lines
    row = next(line for line in lines if line.startswith("embed_tokens"))
    assert row.split() == ["embed_tokens", "32,768", "40.00", "KiB", "8", "bits,", "groups", "of", "32"]


def test_27b_is_inspected_without_reading_a_weight(run: Run, tmp_path: Path) -> None:
    """A 54.9 GB file of headers and a hole: 27B in bfloat16, and nothing in memory afterwards."""
    folder = tmp_path / "gemma-3-27b-it"
    write_hollow_27b(folder)
    before = start_measuring()
    found = about(run, "inspect", folder)
    assert mx.get_peak_memory() - before < 1 << 20
    assert (found["size"], found["parameters"], found["bits_per_weight"]) == ("27B", 27_432_406_640, 16)
    assert [row["context"] for row in found["memory"]][::3] == [4096, 32768, 131072]
    assert found["memory"][0]["weights"] == 2 * 27_432_406_640
    fits = about(run, "fit", folder, "--memory", "64")
    assert not fits["fits"] and fits["bits"] is None and fits["parts"]["weights"] == 2 * 27_432_406_640
    assert about(run, "fit", folder, "--memory", "64", "--bits", "8")["fits"]


def write_hollow_27b(folder: Path) -> None:
    text = {
        "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168, "sliding_window": 1024,
        "vocab_size": 262208,
    }  # fmt: skip
    vision = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 896, "patch_size": 14,
    }  # fmt: skip
    config = {"model_type": "gemma3", "text_config": text, "vision_config": vision}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    end, header = 0, {}
    for name, shape in tiny.tensor_shapes(config).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)


def test_contexts_are_numbers_or_thousands() -> None:
    assert [parse_context(text) for text in ("32768", "32,768", "128k", "4K", " 1k ")] == [
        32768,
        32768,
        131072,
        4096,
        1024,
    ]
    for text in ("", "k", "0", "-4", "1m", "12.5k", "3,2", "４"):
        with pytest.raises(OptionError, match="--context"):
            parse_context(text)


# What fits when somebody buys a Mac: the longest context of each size in 16, 8 and 4 bits, cache in 16.
LONGEST = {
    "8": {"270M": [32, 32, 32], "1B": [32, 32, 32], "4B": [0, 0, 55], "12B": [0, 0, 0], "27B": [0, 0, 0]},
    "16": {"270M": [32, 32, 32], "1B": [32, 32, 32], "4B": [59, 128, 128], "12B": [0, 0, 25], "27B": [0, 0, 0]},
    "64": {"270M": [32, 32, 32], "1B": [32, 32, 32], "4B": [128] * 3, "12B": [128] * 3, "27B": [0, 128, 128]},
}


@pytest.mark.parametrize("gib", LONGEST)
def test_all_sizes_on_macs_of_8_16_and_64(run: Run, gib: str) -> None:
    found = about(run, "fit", "--memory", gib)
    got: dict[str, list[int]] = {}
    for row in found["sizes"]:
        got.setdefault(row["size"], []).append(row["largest_context"] // 1024)
    assert got == LONGEST[gib]
    lines = run("fit", "--memory", gib).splitlines()
    cells = lines[-1].split()
    assert len(lines) == 2 + 1 + len(SIZES) and cells[0] == "27B"
    assert cells[1::2] == ["51.10", "27.52", "14.94"]
    assert cells[2::2] == [f"{each}k" if each else "-" for each in LONGEST[gib]["27B"]]


def test_all_sizes_with_a_context_say_yes_or_no(run: Run) -> None:
    rows = about(run, "fit", "--memory", "16", "--context", "64k", "--bits", "4")["sizes"]
    assert {row["size"]: row["fits"] for row in rows} == {
        "270M": False, "1B": False, "4B": True, "12B": False, "27B": False,
    }  # fmt: skip
    lines = run("fit", "--memory", "16", "--context", "64k", "--bits", "4").splitlines()
    assert "yes, 128k" in lines[5] and "no, 32k" in lines[3]


@pytest.mark.parametrize(
    ("words", "fits", "bits"),
    [
        (("4b", "--memory", "8"), True, 4),
        (("4b", "--memory", "8", "--bits", "8"), False, 8),
        (("gemma-3-4b-it", "--memory", "16"), True, 16),
        (("google/gemma-3-12b-it", "--memory", "16"), True, 4),
        (("12b", "--memory", "16", "--context", "128k"), False, 4),
        (("27b", "--memory", "16"), False, 4),
        (("27B", "--memory", "64", "--context", "128k"), True, 8),
    ],
)
def test_the_verdict(run: Run, words: tuple[str, ...], fits: bool, bits: int) -> None:
    """Without --bits the most that fit, of 16, 8 and 4; the least when none does."""
    found = about(run, "fit", *words)
    assert (found["fits"], found["bits"]) == (fits, bits)
    parts = found["parts"]
    added = sum(parts[key] for key in ("weights", "kv_global", "kv_local", "working", "logits", "overhead"))
    assert found["total"] == added and fits == (added <= found["machine"]["budget"])
    assert fits == (found["largest_context"] >= found["context"])
    verdict = next(line for line in run("fit", *words).splitlines() if "to spare" in line or "too much" in line)
    assert ("does not fit" in verdict) != fits


def test_the_arithmetic_is_shown(run: Run) -> None:
    lines = run("fit", "27b", "--context", "128k", "--kv-bits", "8", "--memory", "36").splitlines()
    assert lines[0].startswith("a Mac, 36.00 GiB of memory: 27.00 GiB for the model")
    assert "global layers    5.31  10 layers x 2 x 16 heads x 128 x 131,072 tokens, 8 bits and scales" in lines
    assert "local layers     0.51  52 layers x 2 x 16 heads x 128 x 1,279 tokens, 16 bits" in lines
    far, near = memory.cache_bytes(SIZES["27B"], 131072, kv_bits=8)
    assert (f"{far / GIB:.2f}", f"{near / GIB:.2f}") == ("5.31", "0.51")


def test_what_would_fit_instead(run: Run) -> None:
    def advice(*words: str) -> list[str]:
        lines = run("fit", *words).splitlines()
        return [line for line in lines if line.startswith(("would fit", "nothing", "smaller"))]

    one = advice("4b", "--memory", "16", "--bits", "16", "--context", "96k")
    assert one[:-1] == ["would fit: --kv-bits 4", "would fit: --bits 8", "would fit: --bits 4"]
    assert one[-1].startswith("would fit: --context ")
    both = advice("27b", "--memory", "32", "--bits", "8", "--context", "128k")
    assert both == ["would fit: --bits 4 --kv-bits 4", "smaller: 12B in 4 bits fits"]
    assert advice("27b", "--memory", "16") == ["nothing of this size would", "smaller: 12B in 4 bits fits"]
    assert advice("270m", "--memory", "0.5") == ["nothing of this size would"]
    assert advice("4b", "--memory", "64") == []
    # Advice that is taken helps.
    context = one[-1].rpartition(" ")[2]
    assert about(run, "fit", "4b", "--memory", "16", "--bits", "16", "--context", context)["fits"]
    assert about(run, "fit", "27b", "--memory", "32", "--bits", "4", "--kv-bits", "4", "--context", "128k")["fits"]


def test_a_checkpoint_on_disk_counts_as_it_is(run: Run, packed_folder: Path, gguf_file: Path) -> None:
    found = about(run, "fit", packed_folder, "--memory", "8")
    assert (found["bits"], found["context"], found["fits"]) == (None, 1024, True)
    assert found["parts"]["weights"] == about(run, "inspect", packed_folder)["memory"][0]["weights"]
    text = about(run, "fit", packed_folder, "--memory", "8", "--text-only")
    assert text["parts"]["vision"] == 0 and text["parts"]["weights"] < found["parts"]["weights"]
    assert "as stored" in run("fit", gguf_file, "--memory", "8")


def test_without_a_mac_the_activations_are_float32(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    found = about(run, "fit", "270m", "--bits", "16")
    assert found["parts"]["weights"] == 4 * 268_098_176 and not found["machine"]["metal"]
    assert "32 bits" in run("fit", "270m", "--bits", "16")


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (("inspect", "no-such-folder/"), SourceNotFound, "no-such-folder"),
        (("fit", "14b"), SourceNotFound, "no size in the name"),
        (("fit", "--kv-bits", "5"), OptionError, "--kv-bits: got 5"),
        (("fit", "--bits", "7"), OptionError, "--bits: got 7"),
        (("fit", "--memory", "0"), OptionError, "memory: got 0"),
        (("fit", "--memory", "nan"), OptionError, "memory: got nan"),
        (("fit", "4b", "--context", "many"), OptionError, "--context: got 'many'"),
        (("fit", "1b", "--context", "64k"), OptionError, "context: got 65536, want 1 to 32768"),
    ],
)
def test_what_is_wrong_is_one_line(run: Run, words: tuple[str, ...], error: type[Gemma3Error], says: str) -> None:
    with pytest.raises(error) as caught:
        run(*words)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("bits", "gib"), [("16", 2.6), ("8", 1.4), ("4", 0.73)])
def test_local_layers_can_be_packed_too(run: Run, bits: str, gib: float) -> None:
    words = ["4b", "--memory", "64", "--context", "128k", "--kv-bits", bits, "--local-kv-bits", bits]
    parts = about(run, "fit", *words)["parts"]
    assert (parts["kv_global"] + parts["kv_local"]) / 2**30 == pytest.approx(gib, rel=0.05)
    assert about(run, "fit", *words[:-2])["parts"]["kv_local"] == pytest.approx(29 * 2 * 4 * 256 * 1279 * 2)

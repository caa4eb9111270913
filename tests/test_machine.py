"""What `inspect --machine` and `bench` say of a machine, for Macs that are not here, and MLX's choice of a kernel."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
import typer
from typer.testing import CliRunner

from mlx_gemma3.checkpoint.published import SIZES
from mlx_gemma3.commands.inspect import inspect
from mlx_gemma3.errors import OptionError
from mlx_gemma3.measure.machine import machine
from mlx_gemma3.model.attention_path import FUSED, NEURAL, TWO_PASS, UNFUSED, VECTOR, Gpu, attention_path

GIB = 1 << 30
M1 = Gpu("applegpu_g13g", (14, 5))
M4, M4_MAX = Gpu("applegpu_g16g", (15, 3)), Gpu("applegpu_g16s", (15, 3))
M5 = Gpu("applegpu_g17g", (26, 2))
Run = Callable[..., str]


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Be the Mac with this GPU."""

    def become(gpu: Gpu, name: str, memory: int, working: float) -> None:
        info = {
            "device_name": name,
            "architecture": gpu.architecture,
            "memory_size": memory * GIB,
            "max_recommended_working_set_size": int(working * GIB),
        }
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "device_info", lambda _: info)
        monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.DeviceType.gpu))
        monkeypatch.setattr(platform, "mac_ver", lambda: (".".join(map(str, gpu.macos)), ("", "", ""), "arm64"))

    return become


@pytest.fixture
def run() -> Run:
    app = typer.Typer()
    app.command()(inspect)

    def call(*words: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        if done.exception is not None:
            raise done.exception
        return done.stdout

    return call


@pytest.mark.parametrize(
    ("gpu", "queries", "keys", "mask", "path"),
    [
        (M1, 1, 1, None, VECTOR),
        (M1, 1, 4095, None, VECTOR),
        (M1, 1, 4096, None, TWO_PASS),  # several query heads a key head
        (M4_MAX, 1, 1023, None, VECTOR),
        (M4_MAX, 1, 1024, None, TWO_PASS),
        (M1, 8, 4096, "array", TWO_PASS),
        (M1, 8, 7, "causal", UNFUSED),
        (M1, 9, 9, "causal", UNFUSED),
        (M1, 2047, 2047, "causal", UNFUSED),
        (M1, 2048, 2048, "causal", FUSED),
        (M1, 2048, 2048, "array", UNFUSED),
        (M1, 2048, 4096, "causal", UNFUSED),
        (M5, 1023, 8192, "causal", UNFUSED),
        (M5, 1024, 8192, "causal", NEURAL),
        (M5, 1024, 2047, "array", NEURAL),
        (M5, 1024, 8192, None, UNFUSED),
        (M5, 2048, 1024, "causal", UNFUSED),
    ],
)
def test_heads_of_256(gpu: Gpu, queries: int, keys: int, mask: Any, path: str) -> None:
    assert attention_path(gpu, heads=8, kv_heads=4, head_dim=256, queries=queries, keys=keys, mask=mask) == path


@pytest.mark.parametrize(
    ("gpu", "changes", "path"),
    [
        (M4, {}, FUSED),
        (M5, {}, NEURAL),
        (M5, {"float32": True}, FUSED),
        (Gpu(M5.architecture, M5.macos, tf32=True), {"float32": True}, NEURAL),
        (Gpu(M5.architecture, (26, 1)), {}, FUSED),
        (Gpu("applegpu_g17p", M5.macos), {}, FUSED),
        (Gpu("applegpu_g18p", M5.macos), {}, NEURAL),
        (M5, {"kv_bits": 8}, UNFUSED),
        (M4, {"head_dim": 72}, FUSED),
        (M5, {"head_dim": 72}, NEURAL),
        (M4, {"head_dim": 112}, UNFUSED),
        (M4, {"queries": 1, "head_dim": 72}, UNFUSED),  # no vector kernel
        (M4, {"queries": 4, "heads": 32, "kv_heads": 2}, UNFUSED),  # 64 rows
        (M4, {"queries": 2, "heads": 32, "kv_heads": 2}, VECTOR),
        (M4, {"queries": 1, "keys": 4096, "kv_heads": 32}, VECTOR),  # a key head for each
    ],
)
def test_other_heads_and_what_changes_the_path(gpu: Gpu, changes: dict[str, Any], path: str) -> None:
    given: dict[str, Any] = {"heads": 32, "kv_heads": 16, "head_dim": 128, "queries": 512, "keys": 1024, "mask": None}
    assert attention_path(gpu, **{**given, **changes}) == path


def paths(about: dict[str, Any], model: str, layer: str, context: int | None, *, step: bool = False) -> tuple[int, str]:
    """(queries, path) of the one row."""
    (row,) = (
        row
        for row in about["attention"]
        if (row["model"], row["layer"], row["context"], row["queries"] == 1) == (model, layer, context, step)
    )
    return row["queries"], row["path"]


def test_a_mac_with_m1(mac: Callable[..., None]) -> None:
    mac(M1, "Apple M1", 8, 5.3)
    about = machine()
    assert (about["chip"], about["system"], about["backend"]) == ("Apple M1", "macOS 14.5", "Metal")
    assert (about["memory"], about["working_set"], about["wired"]) == (8 * GIB, int(5.3 * GIB), 0)
    assert paths(about, "270M", "global", 8192, step=True) == (1, TWO_PASS)
    assert paths(about, "4B", "local", 8192) == (512, UNFUSED)
    assert paths(about, "27B", "global", 131072) == (2048, FUSED)
    assert paths(about, "4B", "tower", None) == (4096, FUSED)
    assert not any(row["model"] == "1B" and row["context"] == 131072 for row in about["attention"])


def test_a_mac_with_m4_max_and_one_with_m5(mac: Callable[..., None]) -> None:
    mac(M4_MAX, "Apple M4 Max", 64, 48)
    about = machine()
    assert about["wired"] == 64 * GIB - int(64 * GIB * 0.35) and not about["neural_accelerators"]
    assert paths(about, "1B", "local", 8192, step=True) == (1, VECTOR)
    assert paths(about, "4B", "local", 8192, step=True) == (1, TWO_PASS)
    assert paths(about, "4B", "global", 8192) == (1024, UNFUSED)
    mac(M5, "Apple M5", 24, 16)
    about = machine()
    assert about["neural_accelerators"]
    assert paths(about, "4B", "local", 8192) == (1024, NEURAL)
    assert paths(about, "4B", "global", 512) == (512, UNFUSED)
    assert paths(machine(SIZES["4B"], dtype_bytes=4), "4B", "global", 8192) == (1024, UNFUSED)
    packed = machine(SIZES["4B"], kv_bits=8)
    assert paths(packed, "4B", "global", 8192, step=True) == (1, UNFUSED)
    assert paths(packed, "4B", "local", 8192, step=True) == (1, VECTOR)


def test_the_table_of_a_mac(mac: Callable[..., None], run: Run) -> None:
    mac(M5, "Apple M5", 24, 16)
    lines = run("--machine").splitlines()
    assert lines[0].split() == ["chip", "Apple", "M5,", "applegpu_g17g"]
    assert "working set  16.00 GiB, what Metal recommends at most" in lines
    assert "TF32         off: float32 stays float32" in lines
    (tower,) = (line for line in lines if line.startswith("tower"))
    assert tower.split("  ")[-1].strip() == NEURAL and "4B, 12B, 27B" in tower and "4,096" in tower
    steps = [line for line in lines if line.startswith("global") and "2-pass" in line]
    assert [line.count("2-pass") for line in steps] == [1, 2]


def test_the_cpu_says_so_and_the_json_is_the_same(run: Run) -> None:
    if mx.metal.is_available():
        pytest.skip("of a machine without Metal")
    lines = run("--machine").splitlines()
    assert "attention    CPU: numpy" in lines and len(lines) == 8
    about = json.loads(run("--machine", "--json"))
    assert about == machine() and about["attention"] == [] and about["working_set"] is None
    assert about["chip"] in lines[0] and about["memory"] > GIB


def test_a_checkpoint_and_the_machine_together(mac: Callable[..., None], text_folder: Path, run: Run) -> None:
    mac(M4, "Apple M4", 16, 10.67)
    about = json.loads(run(text_folder, "--machine", "--json"))
    assert about["layers"] and {row["model"] for row in about["machine"]["attention"]} == {"this model"}
    assert "machine" not in json.loads(run(text_folder, "--json"))
    assert any(line.startswith("chip") for line in run(text_folder, "--machine").splitlines())


def test_without_a_checkpoint_and_without_machine_it_is_one_sentence(run: Run) -> None:
    with pytest.raises(OptionError, match="--machine"):
        run()


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False), ("no", False), ("2", True)])
def test_tf32_is_read_as_mlx_reads_it(value: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_ENABLE_TF32", value)
    assert machine()["tf32"] is on

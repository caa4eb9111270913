"""What a Mac's GPU needs of us: freed buffers, wired memory, float32, kernels built early, errors."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from endless import endless
from worker_process import Worker

import mlx_gemma3 as g3
from mlx_gemma3.boundary.system import check_system
from mlx_gemma3.errors import DeviceError, DeviceLost
from mlx_gemma3.generation import batch, prefill
from mlx_gemma3.model import device
from mlx_gemma3.model.runner import Runner
from mlx_gemma3.runtime import loading

GIB = 1 << 30


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Mac of 64 GiB with macOS 15; every limit that was set is in `.limits`."""
    about = SimpleNamespace(memory=64 * GIB, working=48 * GIB, macos="15.3", limits=[], limit=0)

    def set_limit(limit: int) -> int:
        before, about.limit = about.limit, limit
        about.limits.append(limit)
        return int(before)

    def info(_: Any) -> dict[str, Any]:
        return {"memory_size": about.memory, "max_recommended_working_set_size": about.working}

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", info)
    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    monkeypatch.setattr(platform, "mac_ver", lambda: (about.macos, ("", "", ""), "arm64"))
    return about


def test_what_engines_wire_is_their_sum_and_given_back(mac: SimpleNamespace) -> None:
    mac.limit = 7
    device.wire(1, 5 * GIB)
    device.wire(2, 9 * GIB)
    device.unwire(1)
    device.unwire(1)
    device.unwire(2)
    assert mac.limits == [5 * GIB, 14 * GIB, 9 * GIB, 7]


@pytest.mark.parametrize(
    ("memory", "working", "most"),
    [(64, 48, 64 * 0.65), (16, 10.67, 8), (8, 5.3, 0), (512, 384, 512 * 0.65), (128, 60, 60)],
)
def test_the_system_keeps_enough(memory: float, working: float, most: float, mac: SimpleNamespace) -> None:
    mac.memory, mac.working = int(memory * GIB), int(working * GIB)
    device.wire(1, 1000 * GIB)
    device.unwire(1)
    assert mac.limits[0] == pytest.approx(most * GIB, abs=2)


def test_before_macos_15_and_without_metal_nothing_is_wired(
    mac: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    mac.macos = "14.7"
    device.wire(1, GIB)
    mac.macos = "15.0"
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    device.wire(1, GIB)
    device.unwire(1)
    assert mac.limits == []


def test_an_engine_wires_its_weights_and_caches_until_it_is_closed(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired: dict[int, int] = {}
    monkeypatch.setattr("mlx_gemma3.runtime.thread.wire", wired.__setitem__)
    monkeypatch.setattr("mlx_gemma3.runtime.thread.unwire", wired.pop)
    with g3.load(base_folder) as engine:
        engine.generate("the", max_tokens=1)
        (nbytes,) = wired.values()
        assert nbytes > engine.about["weights_bytes"] + device.WORK_BYTES
    assert wired == {}


@pytest.fixture
def base_folder(text_folder: Path, tmp_path: Path) -> Path:
    return endless(text_folder, tmp_path / "endless")


def test_freed_buffers_go_after_each_chunk_and_now_and_then_while_writing(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[str] = []
    for name, module in (("chunk", prefill), ("step", batch), ("load", loading)):
        monkeypatch.setattr(module, "release", lambda name=name: released.append(name))
    limits: list[int] = []
    monkeypatch.setattr(mx, "set_cache_limit", limits.append)
    with g3.load(base_folder, speculation=False) as engine:
        assert released == ["load"] and limits == [engine._thread._scheduler.budget // 8]
        engine.generate("the " * 100, max_tokens=600, temperature=1.0, raw=True)
        assert (released.count("chunk"), released.count("step")) == (1, 2)
        runner = engine._thread._scheduler.runner
        engine._thread.call(lambda _: prefill.prefill(runner, [5] * 40, runner.make_caches(), chunk=8))
        assert released.count("chunk") == 6


def test_the_queue_of_the_engines_thread_is_freed_in_that_thread(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[int] = []
    with g3.load(base_folder) as engine:
        ident = engine._thread.call(lambda _: threading.get_ident())
        monkeypatch.setattr(mx, "clear_streams", lambda: freed.append(threading.get_ident()))
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert freed == [ident]


@pytest.mark.parametrize(
    ("version", "wheel", "refused"),
    [("26.0", 26, True), ("26.1", 26, True), ("26.0.1", 26, True), ("26.2", 26, False), ("26.1", 15, False),
     ("15.5", 15, False), ("27.0", 26, False)],
)  # fmt: skip
def test_the_wheel_of_macos_26_is_refused_before_26_2(
    version: str, wheel: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_system.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: (version, ("", "", ""), "arm64"))
    tag = f"Wheel-Version: 1.0\nTag: py3-none-macosx_{wheel}_0_arm64\n"
    monkeypatch.setattr(metadata, "distribution", lambda _: SimpleNamespace(read_text=lambda _: tag))
    if refused:
        with pytest.raises(DeviceError, match=r"macOS 26\.[01].*update macOS"):
            check_system()
    else:
        check_system()


@pytest.mark.parametrize(("given", "found"), [(None, "0"), ("1", "1")])
def test_float32_is_float32_unless_the_user_says_otherwise(given: str | None, found: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MLX_ENABLE_TF32"}
    environment |= {"MLX_ENABLE_TF32": given} if given else {}
    code = "import os, mlx_gemma3; print(os.environ['MLX_ENABLE_TF32'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == found


def test_warming_up_reads_as_a_users_prompt_does(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    pictures: list[Any] = []
    read, encode = Runner.read, Runner.encode_images

    def reading(runner: Runner, tokens: Any, *rest: Any, **named: Any) -> mx.array:
        lengths.append(tokens.shape[1])
        return read(runner, tokens, *rest, **named)

    def encoding(runner: Runner, pixels: mx.array) -> mx.array:
        pictures.append(pixels.shape)
        return encode(runner, pixels)

    with g3.load(chat_folder) as engine:
        runner, loaded = engine._thread._scheduler.runner, engine._thread.loaded
        monkeypatch.setattr(runner, "ahead", True)
        monkeypatch.setattr(Runner, "read", reading)
        monkeypatch.setattr(Runner, "encode_images", encoding)
        engine._thread.call(lambda _: loading.warm_up(loaded, runner))
    assert lengths == [64] and pictures == [(1, 56, 56, 3)]


class Failing:
    """Lets the next work of the GPU fail as Metal does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0

        def failing(work: Any) -> Any:
            def fails(*given: Any, **options: Any) -> mx.array:
                if self.left:
                    self.left -= 1
                    raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")
                return work(*given, **options)

            return fails

        for name in ("read", "step"):
            monkeypatch.setattr(Runner, name, failing(getattr(Runner, name)))


def test_one_error_of_the_gpu_ends_an_answer_and_two_in_a_row_the_engine(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(monkeypatch)
    with g3.load(base_folder) as engine:
        for _ in range(2):  # not in a row
            failing.left = 1
            with pytest.raises(DeviceError, match="Insufficient Memory"):
                engine.generate("the", max_tokens=4)
            assert len(engine.generate("the", max_tokens=4).tokens) == 4
        failing.left = 2
        with pytest.raises(DeviceError):
            engine.generate("the", max_tokens=4)
        with pytest.raises(DeviceError):
            engine.generate("the", max_tokens=4)
        for _ in range(2):
            with pytest.raises(DeviceLost, match="in a new process"):
                engine.generate("the", max_tokens=4)
        with pytest.raises(DeviceLost):
            engine.session()


def test_caches_that_an_error_of_the_gpu_left_half_written_are_dropped(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(monkeypatch)
    with g3.load(chat_folder) as engine:
        session, options = engine.session(), {"max_tokens": 4, "temperature": 0.0}
        session.send("the", **options).reply
        before = session._conversation.timeline
        engine.generate("the model", **options)
        pool = engine._thread._scheduler.pool
        for ask in (session.send, engine.stream):
            failing.left, held = 1, list(pool.timelines)
            with pytest.raises(DeviceError):
                ask("another", **options).reply
            assert set(pool.timelines) <= set(held)
            engine.generate("again", **options)
        assert session._conversation.timeline is not before
        assert len(session.messages) == 2


WORKER = """
import sys
from mlx_gemma3.model.runner import Runner
def fails(*given, **options): raise RuntimeError("[METAL] Command buffer execution failed")
Runner.step = Runner.read = fails
sys.argv = ["mlx-gemma3", "worker"]
from mlx_gemma3.cli import main
main()
"""


def test_a_worker_ends_with_the_gpu(chat_folder: Path) -> None:
    with Worker(command=(sys.executable, "-c", WORKER)) as worker:
        worker.ask({"id": 0, "op": "load", "model": str(chat_folder)})
        request = {"op": "generate", "prompt": "the", "options": {"max_tokens": 3}}
        codes = [worker.ask({"id": number, **request})["code"] for number in range(1, 4)]
        assert codes == ["device", "device", "device_lost"]
        assert worker.process.wait(20) == 1

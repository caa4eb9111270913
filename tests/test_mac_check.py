"""`make mac-check`: how its checks are judged, that none stops another, and lines of it that only a Mac runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mac_check
import mlx.core as mx
import pytest
from endless import endless
from mac import here, judge, memory, right, speed
from mac.judge import FAILED, OK, SKIPPED, Outcome, Report, Settings, Skipped, attempt, run_all, written

from mlx_gemma3.model.attention_path import FUSED, UNFUSED

ROOT = Path(__file__).resolve().parents[1]

CHECKS = """
import os, sys, time
from mac.judge import Skipped
def good(report): report.at_most("an error", 0.5, 1.0, "s"); print("said on stdout")
def wrong(report): report.at_most("an error", 2.0, 1.0, "s"); report.expect(False, "a token", got=3, want=4)
def raises(report): report.note("before"); raise ValueError("in two\\nlines")
def skips(report): raise Skipped("no such chip")
def crashes(report): print("[METAL] a sad end", file=sys.stderr, flush=True); os.abort()
def leaves(report): os._exit(0)
def hangs(report): os.system("sleep 60")
def settings(report): report.expect(report.settings.quick and report.settings.peers == "p", "settings", got=0, want=1)
"""
HEAD = "what and when"


@pytest.fixture
def checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of checks that end in every way."""
    (tmp_path / "ways_to_end.py").write_text(CHECKS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import ways_to_end

    yield ways_to_end
    del sys.modules["ways_to_end"]


def test_every_end_is_told_and_none_stops_the_others(
    checks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["wrong", "raises", "crashes", "leaves", "hangs", "skips", "settings", "good"]
    place, settings = tmp_path / "found.txt", Settings(quick=True, peers="p")
    status = run_all([(name, getattr(checks, name)) for name in names], place, HEAD, settings=settings, seconds=5)
    assert status == 1
    lines = place.read_text(encoding="utf-8").splitlines()
    assert lines[:3] == [HEAD, "2 ok, 5 FAILED, 1 skipped", ""]
    assert lines[3:11] == [
        "wrong: FAILED (an error: got 2 s, want at most 1; a token: got 3, want 4)",
        "raises: FAILED (an error: got ValueError: in two lines, want none)",
        "crashes: FAILED (its process: got exit -6, [METAL] a sad end, want an outcome)",
        "leaves: FAILED (its process: got exit 0, nothing on stderr, want an outcome)",
        "hangs: FAILED (time: got no end, want one within 5 s)",
        "skips: skipped (no such chip)",
        "settings: ok",
        "good: ok",
    ]
    assert "    an error: 0.5 s (at most 1)" in lines and "    before" in lines
    assert "said on stdout" not in "\n".join(lines)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in lines[11:] if line] == printed


def test_all_well_is_exit_0_and_skipping_is_well(checks: Any, tmp_path: Path) -> None:
    some = [("good", checks.good), ("skips", checks.skips)]
    assert run_all(some, tmp_path / "found.txt", HEAD, settings=Settings(), seconds=60) == 0


def test_the_file_is_whole_after_each_check(checks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, seen = tmp_path / "found.txt", []
    run = judge.run

    def watching(name: str, *given: Any, **options: Any) -> Outcome:
        seen.append(place.read_text(encoding="utf-8").splitlines()[3:6] if place.exists() else [])
        assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".writing")] == []
        return run(name, *given, **options)

    monkeypatch.setattr(judge, "run", watching)
    some = [("raises", checks.raises), ("good", checks.good)]
    run_all(some, place, HEAD, settings=Settings(), seconds=60)
    failed = "raises: FAILED (an error: got ValueError: in two lines, want none)"
    assert seen == [[], [failed, "good: not ended", ""]]
    assert place.read_text(encoding="utf-8").splitlines()[3:5] == [failed, "good: ok"]


def test_a_bound_is_a_bound_and_nan_is_above_it() -> None:
    report = Report()
    report.at_most("a", 1.0, 1.0)
    assert report.failures == []
    report.at_most("b", float("nan"), 1.0)
    report.at_most("c", 1.0000001, 1.0)
    assert [failure.split(":")[0] for failure in report.failures] == ["b", "c"]


def test_what_failed_before_a_check_skipped_the_rest_is_a_failure() -> None:
    def check(report: Report) -> None:
        report.expect(False, "it", got=1, want=2)
        raise Skipped("the rest needs Metal")

    report = Report()
    assert attempt(check, report) == (FAILED, "it: got 1, want 2")
    assert report.lines == ["the rest was skipped: the rest needs Metal"]
    assert attempt(lambda report: None, Report()) == (OK, "")


def test_the_command_names_its_file_and_its_exit_is_1_when_something_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "mac_check.py"), "--only", "machine"]
    for tf32, status in (("0", 0), ("1", 1)):
        place = tmp_path / f"found-{tf32}.txt"
        environment = {**os.environ, "MLX_ENABLE_TF32": tf32}
        done = subprocess.run([*command, "--out", str(place)], capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stderr) == (status, "")
        assert done.stdout.splitlines()[-1] == str(place)
        text = place.read_text(encoding="utf-8")
        assert text.startswith("mac-check, ") and ("machine: FAILED (MLX_ENABLE_TF32" in text) is bool(status)
    done = subprocess.run([*command[:-1], "nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and "no such check: nothing" in done.stderr


def test_goldens_pass_here_and_a_wrong_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [
        (kind, name, right.golden.load_case(kind, name)) for kind, name in (("text", "short"), ("image", "image_first"))
    ]
    monkeypatch.setattr(right, "cases", lambda: some)
    for check in (right.goldens_float32, right.goldens_pictures, right.rope):
        assert attempt(check, Report()) == (OK, "")
    monkeypatch.setattr(right.golden, "difference", lambda *given: 2e-3)
    monkeypatch.setattr(right, "virtual", lambda: False)
    status, why = attempt(right.goldens_float32, Report())
    assert status == FAILED and "a logit, without caches" in why
    monkeypatch.setattr(right, "virtual", lambda: True)
    assert attempt(right.goldens_float32, Report())[0] == OK  # its own tolerance
    assert attempt(right.goldens_pictures, Report())[0] == FAILED


def test_a_position_that_is_off_by_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(right, "POSITIONS", (8_192,))
    rotate = right.Rope.__call__
    monkeypatch.setattr(right.Rope, "__call__", lambda self, x, offset: rotate(self, x, offset + 1))
    report = Report()
    assert attempt(right.rope, report)[0] == FAILED and len(report.failures) == 4


def test_the_path_of_attention_is_told_by_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU every path is unfused, so a table that says so is right, and one that says fused is not."""
    if mx.metal.is_available():
        pytest.skip("of a machine without kernels for attention")
    monkeypatch.setattr(right, "need_metal", lambda why: None)
    row = {"model": "4B", "layer": "global", "queries": 64, "keys": 512, "mask": "causal", "path": UNFUSED}
    rows = [row, {**row, "mask": "array", "layer": "local"}, {**row, "queries": 1}, {**row, "layer": "tower"}]
    monkeypatch.setattr(right, "machine", lambda: {"attention": rows})
    report = Report()
    assert attempt(right.attention_paths, report) == (OK, "") and len(report.lines) == 3
    row["path"] = FUSED
    status, why = attempt(right.attention_paths, Report())
    assert status == FAILED and why.startswith("attention of 4B, global, 64 queries, 512 keys: got ")


def test_wired_memory_is_looked_at_before_during_and_after(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 5

    def set_limit(new: int) -> int:
        nonlocal limit
        before, limit = limit, new
        return before

    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    for name, value in (("may_wire", lambda: True), ("most_wired", lambda: 1 << 40), ("need_real", lambda: None)):
        monkeypatch.setattr(memory, name, value)
    monkeypatch.setattr(memory, "REAL", str(base))
    for name in ("wire", "unwire"):
        monkeypatch.setattr(f"mlx_gemma3.runtime.thread.{name}", lambda *given: None)
    assert attempt(memory.wired, Report())[0] == FAILED  # 5 bytes, and the weights are more
    monkeypatch.setattr("mlx_gemma3.runtime.thread.wire", lambda owner, nbytes: set_limit(nbytes))
    monkeypatch.setattr("mlx_gemma3.runtime.thread.unwire", lambda owner: set_limit(5))
    assert attempt(memory.wired, Report()) == (OK, "")
    monkeypatch.setattr("mlx_gemma3.runtime.thread.unwire", lambda owner: set_limit(6))
    assert attempt(memory.wired, Report()) == (FAILED, "wired after close: got 6, want 5")


@pytest.fixture
def base(text_folder: Path, tmp_path: Path) -> Path:
    return endless(text_folder, tmp_path / "endless")


def test_too_many_kernels_a_step_fail_on_metal(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, outside = 8, 8
    for name, value in (("REAL", str(base)), ("need_real", lambda: None), ("metal", lambda: True)):
        monkeypatch.setattr(speed, name, value)
    for more, want in ((0, OK), (1, FAILED)):
        monkeypatch.setattr(speed, "drawn", lambda output, more=more: Counter(Matmul=17 * layers + outside + more))
        assert attempt(speed.kernels, Report())[0] == want


def test_kernels_are_counted_without_views() -> None:
    rows = mx.zeros((4, 6))
    assert speed.drawn((rows.T @ rows).reshape(-1) + 1) == {"Matmul": 1, "Add": 1}


def test_a_slow_first_prompt_fails_on_metal(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    took = iter([3.0, 1.0, 1.0, 1.2, 1.0, 1.0, 3.0, 1.0, 1.0, 1.3, 1.0, 1.0])
    for name, value in (("REAL", str(base)), ("need_real", lambda: None), ("metal", lambda: True)):
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(speed, "first_token", lambda engine, number: next(took))
    report = Report()
    assert attempt(speed.warm_up, report) == (OK, "")
    assert report.lines[1] == "after warming up: 1200, 1000, 1000 ms"
    status, why = attempt(speed.warm_up, Report())
    assert (status, why) == (FAILED, "the first prompt after the second: got 0.3 s, want at most 0.25")


def test_decoding_by_command_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, tuple[int, ...], str]] = []

    def decoding(source: str, depths: tuple[int, ...], operations: str) -> list[float]:
        given.append((source, depths, operations))
        return [100.0 + int(operations or 40) for _ in depths]

    monkeypatch.setattr(speed, "decoding", decoding)
    report = Report(Settings(quick=True))
    speed.command_buffers(report, "other", (16, 64))
    assert given == [("other", (16,), ""), ("other", (16,), "12"), ("other", (16,), "80")]
    assert report.lines[0] == "unset  16: 140 tokens/s"
    assert report.lines[-1] == "at 16 tokens 80 is best: +28.6% over unset"
    speed.command_buffers(report, "other", (16, 64))
    assert given[-1] == ("other", (16,), "80")
    speed.command_buffers(Report(), "other", (16, 64))
    assert given[6:] == [("other", (16, 64), operations) for operations in ("", "12", "24", "40", "80")]


def test_decoding_is_measured_in_a_process_with_its_setting(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, environments = subprocess.run, []

    def watching(*given: Any, **options: Any) -> Any:
        environments.append(options["env"].get("MLX_MAX_OPS_PER_BUFFER"))
        return run(*given, **options)

    monkeypatch.setattr(speed.subprocess, "run", watching)
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "7")
    assert all(rate > 0 for rate in speed.decoding(str(base), (16, 32), "12"))
    with pytest.raises(RuntimeError, match=r"bench: .*context"):
        speed.decoding(str(base), (10_000_000,), "")
    assert environments == ["12", None]


def test_slow_beside_a_peer_fails_on_metal_only(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"mlx-gemma3": {"prompt": 80.0, "decode": 95.0}, "mlx-lm": {"prompt": 100.0, "decode": 100.0}}

    def words(who: str, *_: object) -> dict[str, float]:
        if who not in figures:
            raise RuntimeError("ModuleNotFoundError: mlx_vlm")
        return figures[who]

    monkeypatch.setattr(speed, "words", words)
    monkeypatch.setattr(speed, "need_real", lambda: None)
    monkeypatch.setattr(speed, "g3", SimpleNamespace(convert=lambda *given, **options: None))
    monkeypatch.setattr(speed, "versions", lambda python: "mlx-lm 1.0")
    for metal, want in ((False, OK), (True, FAILED)):
        monkeypatch.setattr(speed, "metal", lambda metal=metal: metal)
        report = Report(Settings(peers=sys.executable))
        status, why = attempt(speed.peers, report)
        assert status == want and why == ("prompt beside mlx-lm: got 0.80, want at least 0.9" if metal else "")
        assert report.lines[-1] == "decode: mlx-gemma3 95.0, mlx-lm 100.0 tokens/s"
        assert "mlx-vlm: skipped, it does not run here: ModuleNotFoundError: mlx_vlm" in report.lines


@pytest.mark.slow
def test_peers_that_cannot_be_installed_are_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    monkeypatch.setattr(speed, "PEERS", ("no-such-package-of-mlx",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(Skipped, match="could not be installed: ERROR: No matching distribution"):
        speed.installed()
    with pytest.raises(Skipped, match="PackageNotFoundError: No package metadata was found for no-such-package-of-mlx"):
        speed.versions(sys.executable)


def test_a_headline_has_the_reason_and_the_summary_counts() -> None:
    outcomes = [Outcome("a", OK), Outcome("b", SKIPPED, "no Metal here")]
    assert [outcome.headline for outcome in outcomes] == ["a: ok", "b: skipped (no Metal here)"]
    assert written(HEAD, outcomes, ["c"]).splitlines()[1:6] == [
        "1 ok, 0 FAILED, 1 skipped", "", "a: ok", "b: skipped (no Metal here)", "c: not ended",
    ]  # fmt: skip


def test_the_real_model_is_asked_for_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here.importlib.util, "find_spec", lambda name: None)
    assert attempt(right.real_tokens, Report()) == (SKIPPED, "the extra 270m is not installed")
    assert set(mac_check.CHECKS) >= {"machine", "goldens-float32", "rope", "tokens", "peak-memory", "peers"}

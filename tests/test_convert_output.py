"""Where a converted folder may come to stand, who else may be there, and what is left when the program is ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer
from slowed import slowed

import mlx_gemma3 as g3
from mlx_gemma3.convert import converter, output
from mlx_gemma3.errors import OutputError

COMMAND = [sys.executable, "-W", "error", "-m", "mlx_gemma3.cli", "convert"]
# Writes so slowly that a signal comes in the middle, however busy the machine.
SLOW = slowed("mlx_gemma3.convert.writer", "Shard.write", 0.05)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something when the folder is all but ready."""
    write = converter.write_card

    def then(*given: object) -> None:
        write(*given)  # type: ignore[arg-type]
        act()

    monkeypatch.setattr(converter, "write_card", then)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("empty", [False, True])
def test_a_folder_that_comes_meanwhile_is_replaced_only_when_told(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, overwrite: bool, empty: bool
) -> None:
    out = tmp_path / "out"

    def somebody() -> None:
        out.mkdir()
        if not empty:
            (out / "precious").write_text("x")

    meanwhile(monkeypatch, somebody)
    if overwrite or empty:
        g3.convert(chat_folder, out, overwrite=overwrite)
        assert (out / "config.json").exists() and not (out / "precious").exists()
    else:
        with pytest.raises(OutputError, match=r"meanwhile.*--overwrite"):
            g3.convert(chat_folder, out)
        assert names(out) == ["precious"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_or_link_that_comes_meanwhile_stays(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, *, overwrite: bool
) -> None:
    out, there = tmp_path / "out", tmp_path / "there"
    there.mkdir()
    (there / "precious").write_text("x")
    meanwhile(monkeypatch, lambda: out.symlink_to(there) if kind == "link" else out.write_text("x"))
    with pytest.raises(OutputError):
        g3.convert(chat_folder, out, overwrite=overwrite)
    assert names(tmp_path) == ["out", "there"] and names(there) == ["precious"]


def test_of_two_at_once_one_is_told(chat_folder: Path, tmp_path: Path) -> None:
    words = [*COMMAND, str(chat_folder), str(tmp_path / "out"), "--quiet"]
    running = [subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(3)]
    ends = [(process.communicate(timeout=120)[1].decode(), process.returncode) for process in running]
    assert sorted(status for _, status in ends) == [0, 1, 1]
    assert all("--overwrite" in error for error, status in ends if status)
    assert names(tmp_path) == ["out"] and g3.load_model(tmp_path / "out")


def test_two_that_overwrite_leave_one_whole_folder(chat_folder: Path, tmp_path: Path) -> None:
    words = [*COMMAND, str(chat_folder), str(tmp_path / "out"), "--quiet", "--overwrite"]
    running = [subprocess.Popen(words, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert names(tmp_path) == ["out"] and g3.load_model(tmp_path / "out")


def test_the_source_is_never_the_place_nor_in_it(chat_folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(chat_folder, tmp_path / "r" / "q")
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in source.iterdir():
        (linked / path.name).symlink_to(path)
    (tmp_path / "link").symlink_to("r")
    before = names(source)
    pairs = [(source, source), (source, tmp_path / "r"), (source, source / "out"), (linked, tmp_path / "r")]
    for given, out in [*pairs, (linked, source), (source, tmp_path / "link"), (source, tmp_path / "link" / "q")]:
        with pytest.raises(OutputError, match="source"):
            g3.convert(given, out, overwrite=True)
        assert names(source) == before, out


def test_a_link_is_followed_and_the_folder_one_is_in_refused(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("there")
    g3.convert(chat_folder, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "config.json").exists()
    here = tmp_path / "around" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for out in (".", "..", str(tmp_path / "around"), "", "/", "~nobody-of-that-name/x", "a\0b"):
        with pytest.raises(OutputError) as caught:
            g3.convert(chat_folder, out, overwrite=True)
        assert "\n" not in str(caught.value)
    assert names(here) == []


def test_a_name_that_is_not_utf8(chat_folder: Path, tmp_path: Path) -> None:
    out = os.fsencode(tmp_path) + b"/o\xfe"
    done = subprocess.run([*COMMAND, str(chat_folder), out], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"") and b"bits a weight" in done.stdout
    assert "o\\xfe" in Path(os.fsdecode(out), "README.md").read_text()


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = tiny.text_config(hidden_size=512, intermediate_size=2048, num_hidden_layers=24)
    source = tiny.write_folder(tmp_path_factory.mktemp("slow") / "source", values, tiny.random_tensors(values))
    tiny_tokenizer.write_tokenizer(source)
    return source


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_an_end_from_outside_leaves_nothing(slow_source: Path, tmp_path: Path, number: int) -> None:
    words = [sys.executable, "-W", "error", "-c", SLOW, "convert", str(slow_source), str(tmp_path / "out")]
    words += ["--preset", "small", "--quiet"]
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not list(tmp_path.glob(".out.*/*.safetensors")):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(number)
    error = child.communicate(timeout=60)[1]
    if number == signal.SIGKILL:
        [left] = tmp_path.iterdir()
        replaced = tmp_path / left.name.replace("converting", "replaced")
        replaced.mkdir()  # as if killed between the two renames
        (replaced / "precious").write_text("x")
        (tmp_path / ".out.1234.converting").mkdir()  # no name of ours
        with pytest.raises(OutputError), output.new_folder(tmp_path / "out", nbytes=1 << 60, overwrite=True):
            pass
        assert names(tmp_path) == [".out.1234.converting", "out"] and names(tmp_path / "out") == ["precious"]
    else:
        assert (child.returncode, error) == (128 + number, b"") and not names(tmp_path)


def test_what_is_in_work_is_not_cleared(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output.new_folder(out, nbytes=0, overwrite=False) as first:
        (first / "a").write_text("x")
        with output.new_folder(out, nbytes=0, overwrite=False) as second:
            assert names(first) == ["a"] and first != second
            (second / "b").write_text("x")
        shutil.rmtree(out)
    assert names(out) == ["a"] and names(tmp_path) == ["out"]

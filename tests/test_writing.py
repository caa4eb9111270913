"""Files that appear whole or not at all: what is a place for one, what killed processes leave, who may replace what."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from mlx_gemma3.boundary import writing
from mlx_gemma3.boundary.reading import NotRegular
from mlx_gemma3.errors import OutputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x"
    writing.write_whole(path, b"one")
    assert path.read_bytes() == b"one" and path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(KeyError), writing.replacing(path) as file:
        file.write(b"two")
        assert path.read_bytes() == b"one"
        raise KeyError
    assert path.read_bytes() == b"one" and names(path.parent) == ["x"]


def test_a_link_is_followed_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to("there")
    writing.write_whole(link, b"new")
    assert link.is_symlink() and (tmp_path / "there").read_bytes() == b"new"
    writing.write_whole(link, b"own", follow=False)
    assert not link.is_symlink() and (tmp_path / "there").read_bytes() == b"new" and link.read_bytes() == b"own"
    hanging = tmp_path / "hanging"
    hanging.symlink_to("not-yet")
    writing.write_whole(hanging, b"made")
    assert hanging.is_symlink() and (tmp_path / "not-yet").read_bytes() == b"made"


def test_what_is_no_place_for_a_file_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").write_text("x")
    wrong = [tmp_path, tmp_path / "pipe", Path("/dev/null"), tmp_path / "circle", tmp_path / "file" / "x"]
    for path in [*wrong, tmp_path / ("x" * 300), "~nobody-of-that-name/x", tmp_path / "a\0b", Path("/proc/x")]:
        with pytest.raises(OutputError) as caught:
            writing.check_writable(path)
        assert "\n" not in str(caught.value)
        with pytest.raises(OSError):
            writing.write_whole(path, b"x")
    with pytest.raises(NotRegular, match="a pipe"):
        writing.destination(tmp_path / "pipe")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert writing.check_writable("~/deep/x") == tmp_path / "deep" / "x"
    assert names(tmp_path) == ["circle", "file", "pipe"]


def test_a_full_disk_is_called_that() -> None:
    assert "no space left" in str(writing.refusal("x", OSError(28, "No space left on device")))


WRITE = """
import sys
from mlx_gemma3.boundary import writing
with writing.replacing(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    children = [
        subprocess.Popen([sys.executable, "-c", WRITE, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    others = [".x.writing", ".x.0123.writing", "x.0123456789abcdef.writing"]
    for name in others:
        (tmp_path / name).write_text("somebody's")
    (tmp_path / ".y.0123456789abcdef.writing").symlink_to("x")
    assert len(names(tmp_path)) == 6
    children[0].send_signal(signal.SIGKILL)
    children[0].wait()
    writing.write_whole(path, b"mine")
    assert len(names(tmp_path)) == 6, "the living one's file stays, the dead one's went"
    children[1].communicate(b"")
    assert path.read_bytes() == b"half"
    assert names(tmp_path) == sorted([*others, ".y.0123456789abcdef.writing", "x"])
    for child in children:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.close()
        child.stdout.close()


@pytest.mark.parametrize("links", [True, False])
def test_what_stands_there_is_checked_at_the_rename(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:  # as on exFAT

        def link(*_: object) -> None:
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    path, seen = tmp_path / "x", []

    def check(standing: BinaryIO | None) -> None:
        seen.append(None if standing is None else standing.read())
        if seen[-1] is None and len(seen) == 1:
            path.write_bytes(b"came in between")
        if seen[-1] == b"stop":
            raise ValueError

    with writing.replacing(path, check=check) as file:
        file.write(b"stop")
    assert seen == [None, b"came in between"] and path.read_bytes() == b"stop"
    with pytest.raises(ValueError), writing.replacing(path, check=check) as file:
        file.write(b"more")
    assert path.read_bytes() == b"stop" and names(tmp_path) == ["x"]


def test_a_file_that_somebody_holds_locked_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    monkeypatch.setattr(writing, "PATIENCE", 0.05)
    with path.open("rb") as held:
        writing.lock(held)
        with pytest.raises(BlockingIOError), writing.replacing(path, check=lambda _: None) as file:
            file.write(b"new")
    assert path.read_bytes() == b"old"

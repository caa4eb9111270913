"""Where files of this package's own go, also for a user without a home: the cache costs time, never an answer."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_gemma3.boundary.paths import cache_folder, data_folder, temporary_folder

WITHOUT_HOME = """
import os, pwd, sys
def nobody(_): raise KeyError("nobody")
pwd.getpwuid = nobody
for name in ("HOME", "MLX_GEMMA3_CACHE", "XDG_CACHE_HOME", "XDG_DATA_HOME"): os.environ.pop(name, None)
from mlx_gemma3.cli import main
main()
"""


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No HOME and no passwd entry; the system's temporary folder is a new one."""

    def nobody(_: int) -> None:
        raise KeyError("nobody")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("HOME", "MLX_GEMMA3_CACHE", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_without_a_home_there_is_a_temporary_folder_of_this_user_alone(
    homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = homeless / f"mlx-gemma3-{os.getuid()}"
    assert cache_folder() == data_folder() == folder and folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("MLX_GEMMA3_CACHE", "~nobody-of-this-name/cache")
    assert cache_folder() == folder


def test_a_folder_that_others_can_write_is_not_believed(homeless: Path) -> None:
    folder = homeless / f"mlx-gemma3-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    assert str(temporary_folder()).startswith(os.devnull)
    folder.rmdir()
    (homeless / "elsewhere").mkdir()
    folder.symlink_to(homeless / "elsewhere")
    assert str(temporary_folder()).startswith(os.devnull)


def test_every_command_runs_without_a_home(chat_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    for words in (
        ("generate", "-m", chat_folder, "--max-tokens", "1", "hi"), ("inspect", chat_folder), ("fit", "4b"),
        ("chat", "-m", chat_folder, "-q"), ("generate", "-m", "~nobody-of-this-name/x", "hi"), ("fit", "~nobody/x"),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", WITHOUT_HOME, *map(str, words)], stdin=subprocess.DEVNULL,
            env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=60, cwd=tmp_path,
        )  # fmt: skip
        wrong = any(str(word).startswith("~") for word in words)
        assert done.returncode == wrong and done.stderr.count("\n") == wrong, done
    assert not (tmp_path / "~").exists()

"""The scripts of examples/swift: what they tell of Python, and their errors. `make swift-test` runs the Swift code."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SWIFT = Path(__file__).resolve().parent.parent / "examples" / "swift"


def call(script: str, *arguments: str, programs: Path, **environment: str) -> tuple[int, str]:
    """Exit status and standard error of a script that finds only these programs."""
    bash = shutil.which("bash")
    assert bash is not None
    ended = subprocess.run(
        [bash, str(SWIFT / script), *arguments],
        env={"PATH": str(programs), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return ended.returncode, ended.stderr


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of programs without swift."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("bash", "dirname", "id", "ls", "uname"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return folder


def put(folder: Path, name: str, script: str) -> None:
    """A program of our own in place of the real one."""
    path = folder / name
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_settings_name_this_python_and_this_checkout() -> None:
    ended = subprocess.run([sys.executable, str(SWIFT / "python_settings.py")], capture_output=True, text=True)
    if "has no shared library" in ended.stderr:
        assert ended.returncode == 1 and ended.stderr.count("\n") == 1
        return
    words = [shlex.split(line) for line in ended.stdout.splitlines()]
    assert all(word[0] == "export" and len(word) == 2 for word in words)
    settings = dict(word[1].split("=", 1) for word in words)
    assert Path(settings["PYTHON_LIBRARY"]).is_file()
    assert settings["PYTHONHOME"] == sys.base_prefix
    code = "import mlx_gemma3, numpy; print(mlx_gemma3.__file__)"
    environment = {**os.environ, **settings}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/")
    assert found.stdout.strip() == str(SWIFT.parent.parent / "mlx_gemma3" / "__init__.py"), found.stderr


def test_run_without_swift_says_what_to_do(programs: Path) -> None:
    status, said = call("run", "python3", "test", programs=programs)
    assert status == 1 and said.count("\n") == 1
    assert "no swift" in said and "examples/swift/linux" in said


@pytest.mark.parametrize(
    ("program", "script", "environment", "words"),
    [
        ("uname", "echo Darwin", {}, "Darwin, not Linux"),
        ("id", 'if [ "$1" = -u ]; then echo 1000; else echo anna; fi', {}, "user anna, want root"),
        ("debootstrap", "", {"SWIFT_ROOT": "FULL"}, "a folder with other things in it"),
        ("debootstrap", "", {"SWIFT_ROOT": "/nowhere", "PYTHONKIT": "/nowhere"}, "without Package.swift"),
        ("unshare", "exit 1", {"SWIFT_ROOT": "/nowhere"}, "mounts are not allowed here"),
    ],
)
def test_linux_says_in_one_sentence_what_is_missing(
    programs: Path, program: str, script: str, environment: dict[str, str], words: str
) -> None:
    put(programs, "uname", "echo Linux")
    put(programs, "id", "echo 0")
    if program == "unshare":
        put(programs, "debootstrap", "")
    put(programs, program, script)
    if environment.get("SWIFT_ROOT") == "FULL":
        environment = environment | {"SWIFT_ROOT": str(programs)}
    status, said = call("linux", "test", programs=programs, **environment)
    assert status == 1 and said.count("\n") == 1
    assert words in said, said

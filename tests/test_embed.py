"""Inside another program: a C host that loads libpython at run time, as PythonKit does (embed/host.c)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from PIL import Image

HERE = Path(__file__).parent
FLAGS = ["-Wall", "-Wextra", "-Werror", "-g", "-O1", "-fno-omit-frame-pointer"]
# The C++ runtime must be there before AddressSanitizer looks for it: MLX brings it later.
SANITIZER = ["-fsanitize=address", *(["-Wl,--no-as-needed", "-lstdc++"] if sys.platform == "linux" else [])]


def libpython() -> Path:
    """The shared library of this Python. Skips where there is none."""
    names = [sysconfig.get_config_var(name) for name in ("INSTSONAME", "LDLIBRARY")]
    folders = [sysconfig.get_config_var(name) for name in ("LIBDIR", "PYTHONFRAMEWORKPREFIX")]
    found = [Path(folder) / name for folder in folders if folder for name in names if name]
    path = next((path for path in found if path.is_file() and path.suffix != ".a"), None)
    if path is None:
        pytest.skip(f"Python {sys.version.split()[0]} here has no shared library")
    return path


def build(folder: Path, *flags: str) -> Path | None:
    """The host, compiled; None when the compiler will not have these flags."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    host = folder / f"host{len(flags)}"
    command = ["cc", *FLAGS, "-o", str(host), str(HERE / "embed" / "host.c"), *flags, "-lpthread"]
    command += ["-ldl"] if sys.platform == "linux" else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and not flags:
        raise AssertionError(done.stderr)
    return None if done.returncode else host


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    host = build(tmp_path_factory.mktemp("plain"))
    assert host is not None
    return host


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Path:
    """With AddressSanitizer where the compiler has it."""
    return build(tmp_path_factory.mktemp("checked"), *SANITIZER) or plain


def run(host: Path, model: Path, folder: Path, requests: int, ending: str, *, seed: int = 1) -> dict[str, int]:
    """Run the host with 8 threads. Returns its counts; fails on anything it says on stderr."""
    picture = folder / "red.png"
    Image.new("RGB", (60, 60), "red").save(picture)
    paths = [str(HERE.parent), *(path for path in sys.path if path and Path(path).is_dir())]
    environment = os.environ | {
        "PYTHONHOME": sys.base_prefix,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONMALLOC": "malloc",  # so that the sanitizer sees every object
        "ASAN_OPTIONS": "quarantine_size_mb=8:detect_leaks=" + str(int(sys.platform == "linux")),
        "LSAN_OPTIONS": f"print_suppressions=0:suppressions={HERE / 'embed' / 'leaks.txt'}",
    }
    environment.pop("LD_PRELOAD", None)  # the sanitizer wants to be the first library
    if b"__asan" not in host.read_bytes():
        del environment["PYTHONMALLOC"]
    command = [str(host), str(libpython()), str(model), str(picture), str(requests), "8", str(seed), ending]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-3000:]
    counts: dict[str, int] = json.loads(done.stdout)
    kinds = ("read", "cancelled", "dropped", "wrong_picture", "wrong_option")
    assert counts["requests"] == requests == sum(counts[kind] for kind in kinds)
    assert counts["read"] and counts["cancelled"] + counts["dropped"]
    return counts


@pytest.mark.parametrize(
    ("ending", "requests"), [pytest.param("close", 50, marks=pytest.mark.slow), ("finalize", 24), ("leave", 24)]
)
def test_eight_threads_of_a_host_lose_nothing_whatever_the_end(
    checked: Path, chat_folder: Path, tmp_path: Path, ending: str, requests: int
) -> None:
    run(checked, chat_folder, tmp_path, requests, ending)


@pytest.mark.slow
def test_a_thousand_requests_break_no_memory(checked: Path, chat_folder: Path, tmp_path: Path) -> None:
    run(checked, chat_folder, tmp_path, 1000, "close", seed=2)


@pytest.mark.slow
def test_a_thousand_requests_need_no_more_memory_than_two_hundred(
    plain: Path, chat_folder: Path, tmp_path: Path
) -> None:
    counts = run(plain, chat_folder, tmp_path, 1000, "close", seed=3)
    # 2 to 4 MiB after 1,000 requests, and no more after 3,000: what allocators keep.
    assert counts["end_bytes"] - counts["warm_bytes"] < 6 << 20, counts

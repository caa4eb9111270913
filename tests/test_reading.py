"""Files that a person named: only regular ones are opened; JSON within bounds."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mlx_gemma3.boundary.reading import NotRegular, open_regular, parse_json, read_json
from mlx_gemma3.errors import ConfigError


def test_only_regular_files_are_opened_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"abc"
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for name, kind in (("pipe", "a pipe"), (".", "a folder")):
            with pytest.raises(NotRegular) as caught:
                open_regular(tmp_path / name)
            assert caught.value.strerror == kind
        with pytest.raises(OSError):
            open_regular(tmp_path / "socket")
    with pytest.raises(NotRegular, match="a device"):
        open_regular("/dev/zero")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"[" * 200_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"1e400", "beyond what a float can hold"),
        (b"[NaN]", "NaN, which is no JSON"),
        (b'"\\ud800"', "half of a surrogate pair"),
        (b'{"\\uDC00": 1}', "half of a surrogate pair"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b"1" * 5000, "4300 digits"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_is_refused(raw: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(ConfigError, match=message):
        read_json(tmp_path / "x.json", ConfigError)


def test_json_that_is_read() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1, 1.5, "\\ud83d\\ude00"]}', "x", ConfigError) == {"a": [1, 1.5, "😀"]}


def test_a_file_over_its_bound_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b" " * (3 << 20) + b"{}")
    with pytest.raises(ConfigError, match="more than 2 MB"):
        read_json(tmp_path / "x.json", ConfigError, most=2 << 20)
    assert read_json(tmp_path / "x.json", ConfigError) == {}
    with pytest.raises(ConfigError, match="no such file"):
        read_json(tmp_path / "y.json", ConfigError)

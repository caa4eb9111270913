"""Pictures by address: what is read, and one clear error within the bounds for all that servers do wrong."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from picture_server import serving
from PIL import Image

from mlx_gemma3.errors import Gemma3Error, ImageError, PromptError
from mlx_gemma3.prompt import address
from mlx_gemma3.prompt.address import fetch, opened
from mlx_gemma3.prompt.images import load_image


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), "purple").save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = png()
ENCODED = base64.b64encode(PICTURE).decode()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(PICTURE) as url:
        yield url


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("path", ["good.png", "good?size=large#here", "unmeasured", "moved"])
def test_a_picture_is_fetched(server: str, path: str) -> None:
    seen: list[tuple[str, int, int]] = []
    assert fetch(f"{server}/{path}", lambda *step: seen.append(step)) == PICTURE
    assert seen[0] == ("download", 0, 0) and {stage for stage, _, _ in seen} == {"download"}


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("loop", "more than 5 redirects"),
        ("astray", "redirected to file:"),
        ("missing", "the server answers 404"),
        ("short", "broke off"),
        ("no-number", "could not be fetched"),
        ("large", "too large: want at most 20 MB"),
        ("endless", "too large: want at most 20 MB"),
        ("nonsense", "could not be fetched"),
        ("slow", "within 1 seconds"),
        ("slow-head", "within 1 seconds"),
        ("silent", "nothing came for 0.5 seconds"),
        ("page", "this is a page, not a picture"),
        ("empty", "0 bytes"),
        ("long", "damaged or incomplete PNG"),
    ],
)
def test_what_servers_do_wrong(server: str, path: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "READ_SECONDS", 0.5)
    monkeypatch.setattr(address, "TOTAL_SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(ImageError, match=why) as caught:
        content, name = opened(f"{server}/{path}?key=secret")
        load_image(content, name=name)
    assert time.monotonic() - began < 4
    assert f"{server}/{path}" in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:1/a.png", "https://no-such-host.invalid/a.png", "http://[::1/a.png", "http://a b/", "http://"],
)
def test_places_that_are_none(url: str) -> None:
    with pytest.raises(ImageError, match="could not be fetched"):
        fetch(url)


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "not a proxy", "http://127.0.0.1:1"])
def test_proxies_that_are_none(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(ImageError, match="could not be fetched") as caught:
        fetch("http://192.0.2.1/a.png")
    assert "\n" not in str(caught.value)


def test_https_does_not_lead_to_http() -> None:
    def following(location: str) -> str:
        url = address._library().URL("https://example.org/a.png")
        return address._following(url, SimpleNamespace(headers={"location": location}), "picture")

    with pytest.raises(ImageError, match=r"from https to http://example\.org/a\.png"):
        following("http://example.org/a.png")
    assert following("//example.com/b.png") == "https://example.com/b.png"


def test_whoever_waits_can_stop(server: str) -> None:
    began = time.monotonic()

    def stop(stage: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(f"{server}/slow", stop)
    assert time.monotonic() - began < 2
    for thread in threading.enumerate():
        if thread.name == "mlx-gemma3 picture":
            thread.join(2)
            assert not thread.is_alive(), "the download goes on"


def test_other_ways_to_say_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a b.png"
    path.write_bytes(PICTURE)
    monkeypatch.setenv("HOME", str(tmp_path))
    unpadded = base64.urlsafe_b64encode(PICTURE).decode().rstrip("=")
    for source in (
        str(path), "~/a b.png", path.as_uri(), f"file://localhost{path.as_posix().replace(' ', '%20')}",
        f"data:image/png;base64,{ENCODED}", f"DATA:;BASE64,{unpadded}", ENCODED, unpadded,
        base64.encodebytes(PICTURE).decode(), path, PICTURE, "file://~/a%20b.png",
    ):  # fmt: skip
        content, name = opened(source)
        assert load_image(content, name=name).size == (50, 40), source
    for wrong in (
        "", "ftp://example.org/a.png", "s3://bucket/a.png", "file://elsewhere/a.png", "data:image/png",
        "data:image/png;base64,!!",
    ):  # fmt: skip
        with pytest.raises(PromptError) as caught:
            opened(wrong)
        assert len(str(caught.value)) < 600
    for missing in ("C:/a.png", "A" * 5000, ENCODED[:30]):
        with pytest.raises(ImageError):
            load_image(opened(missing)[0])


def test_a_long_address_is_one_short_sentence() -> None:
    with pytest.raises(Gemma3Error) as caught:
        opened("https://" + "a" * 100_000 + "/\x1b[31m.png")
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


def test_nothing_is_imported_where_there_is_no_address() -> None:
    program = (
        "import sys; from mlx_gemma3.prompt.address import opened; opened('a.png'); opened('data:;base64,YQ==');"
        "print([name for name in sys.modules if name.startswith(('httpx', 'huggingface_hub', 'PIL'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

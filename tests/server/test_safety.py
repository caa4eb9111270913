"""Who is let in, and what is refused: keys, names, origins, sizes, pictures from where a server must not look."""

from __future__ import annotations

import base64
import http.server
import ipaddress
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serving import PICTURE, QUESTION, Server, serving

from mlx_gemma3.errors import Gemma3Error, ImageError, OptionError
from mlx_gemma3.prompt import address
from mlx_gemma3.server import pictures
from mlx_gemma3.server.settings import Settings

CHAT = "/v1/chat/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
WITH_NAME = {"models": ("demo",)}


def showing(url: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 2}


def test_only_this_machines_name_is_answered_to(server: Server) -> None:
    for host in ("evil.example", "evil.example:80", "", "127.0.0.1.evil.example", "[::2]", "localhost.evil"):
        status, told = server.ask("/v1/models", headers={"Host": host})
        assert status == 403 and "Host" in told["error"]["message"], host
    for host in ("localhost", f"127.0.0.1:{server.port}", "[::1]:9"):
        assert server.ask("/v1/models", headers={"Host": host})[0] == 200


def test_pages_of_others_may_not_ask(server: Server) -> None:
    for origin in ("https://evil.example", "null", f"http://127.0.0.1:{server.port + 1}", "http://127.0.0.1"):
        status, told = server.ask(CHAT, HI, headers={"Origin": origin, "Content-Type": "text/plain"})
        assert status == 403 and "Origin" in told["error"]["message"], origin
        assert "access-control-allow-origin" not in {name.lower() for name in server.headers}
    own = f"http://127.0.0.1:{server.port}"
    assert server.ask(CHAT, HI, headers={"Origin": own})[0] == 200


@pytest.fixture(scope="module")
def strict() -> Iterator[Server]:
    arguments = ("--api-key", "first", "--api-key", "second", "--allow-origin", "https://app.example")
    with serving("-m", "demo", *arguments, "--max-body", "1", "--max-images", "2", "--log-prompts") as running:
        yield running


def test_keys(strict: Server) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "first"}, {"x-api-key": "firs"}):
        for path in ("/v1/models", "/metrics", "/api/tags", "/v1/messages"):
            status, told = strict.ask(path, headers=headers)
            assert status == 401 and "API key" in str(told["error"]) and strict.headers["www-authenticate"]
    assert strict.ask("/v1/models", headers={"Authorization": "Bearer second"})[0] == 200
    assert strict.ask("/api/tags", headers={"x-api-key": "first"})[0] == 200
    assert strict.ask("/health")[0] == 200


def test_cors_with_a_named_origin(strict: Server) -> None:
    asked = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    status, _ = strict.ask(CHAT, method="OPTIONS", headers=asked)
    told = {name.lower(): value for name, value in strict.headers.items()}
    assert status == 200 and told["access-control-allow-origin"] == "https://app.example"
    assert "authorization" in told["access-control-allow-headers"].lower()
    status, _ = strict.ask(CHAT, HI, headers={"Origin": "https://app.example", "Authorization": "Bearer first"})
    assert status == 200
    assert strict.ask(CHAT, HI, headers={"Origin": "https://other.example", "Authorization": "Bearer first"})[0] == 403


def test_sizes_and_what_is_written_to_the_log(strict: Server) -> None:
    key = {"Authorization": "Bearer first"}
    large = {"messages": [{"role": "user", "content": "a" * (1 << 20)}]}
    status, told = strict.ask(CHAT, large, headers=key)
    assert status == 413 and "--max-body" in told["error"]["message"]
    data = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
    three = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": data}] * 3}]}
    status, told = strict.ask(CHAT, three, headers=key)
    assert status == 400 and "at most 2" in told["error"]["message"]
    assert strict.ask(CHAT, {"messages": [{"role": "user", "content": "a secret"}]}, headers=key)[0] == 200
    assert strict.ask(CHAT, showing(data), headers=key)[0] == 200
    said = [line for line in strict.lines if line.startswith('{"prompt"')]
    assert any("a secret" in line for line in said) and f"{PICTURE.stat().st_size} bytes" in said[-1]


def test_nothing_of_a_prompt_is_logged(server: Server) -> None:
    assert server.ask(CHAT, {"messages": [{"role": "user", "content": "a secret"}], "max_tokens": 1})[0] == 200
    assert server.ask("/v1/\x1b[31m%0Asecret?q=secret".replace("\x1b", "%1b"))[0] == 404
    assert any("POST /v1/chat/completions 200" in line for line in server.lines)
    assert not any("a secret" in line or "q=secret" in line or "\x1b" in line for line in server.lines)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"[" * 100_000, b'{"messages": NaN}', b"\xff\xfe", b'"text"', b'{"messages":[1]}',
                b'{"messages":[{"role":"user","content":"\\ud800"}],"max_tokens":1e99}', b'{"temperature":NaN}'],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/api/chat", "/v1/completions", "/v1/responses"])
def test_what_is_no_request(server: Server, path: str, content: bytes) -> None:
    status, told = server.ask(path, content)
    assert status == 400 or (path == "/api/chat" and content == b'{"temperature":NaN}')
    assert "\n" not in str(told["error"]) and "Traceback" not in str(told)


def test_too_many_wait() -> None:
    with serving("-m", "demo", "--parallel", "1", "--queue", "0") as running:
        found: list[int] = []

        def ask() -> None:
            found.append(running.ask("/v1/completions", {"prompt": "one", "max_tokens": 200, "temperature": 1})[0])

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(found) == {200, 429} and running.ask(CHAT, HI)[0] == 200
        statuses: list[Any] = []
        while 429 not in statuses:
            threads = [threading.Thread(target=ask) for _ in range(6)]
            for thread in threads:
                thread.start()
            statuses.append(running.ask(CHAT, HI)[0])
            told = running.headers
            for thread in threads:
                thread.join()
            if statuses[-1] == 429:
                assert told["retry-after"] == "5"


def hostile() -> list[str]:
    """Addresses that lead to this machine or its network, in the forms that there are."""
    hosts = [
        "127.0.0.1", "127.1", "127.0.0.53", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001",
        "0.0.0.0", "0", "localhost", "LOCALHOST", "localhost.", "10.0.0.1", "10.255.255.255", "172.16.0.1",
        "172.31.255.1", "192.168.0.1", "192.168.255.254", "169.254.169.254", "2852039166", "0xa9fea9fe", "100.64.0.1",
        "224.0.0.1", "239.1.2.3", "240.0.0.1", "255.255.255.255", "192.0.0.1", "198.18.0.1", "192.0.2.1",
        "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::ffff:10.0.0.1]",
        "[::ffff:a9fe:a9fe]", "[fe80::1]", "[fc00::1]", "[fd12:3456::1]", "[ff02::1]", "[64:ff9b::7f00:1]",
        "[64:ff9b::a9fe:a9fe]", "[2002:7f00:1::]", "[2002:a00:1::1]", "[2001:db8::1]", "[fec0::1]", "[100::1]",
    ]  # fmt: skip
    schemes = [f"{scheme}://{host}/a.png" for host in hosts for scheme in ("http", "https")]
    others = [
        "file:///etc/passwd", "file://localhost/etc/passwd", "FILE:///etc/passwd", "/etc/passwd", "../../etc/passwd",
        "ftp://example.org/a.png", "gopher://127.0.0.1/", "http://user:pass@127.0.0.1/a.png", "http://127.0.0.1:22/",
        "http://[::1]:6379/", "http:///a.png", "http://", "data:image/png,", "javascript:alert(1)", "~/photo.png",
    ]  # fmt: skip
    return [*schemes, *others]


def test_a_hundred_hostile_addresses(server: Server) -> None:
    urls = hostile()
    assert len(urls) > 100
    for url in urls:
        status, told = server.ask(CHAT, showing(url))
        assert status == 400 and "\n" not in told["error"]["message"], (url, told)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """A web server that is taken for one of the public network, by the names good.test and others."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            seen.append(f"{self.headers['Host']}{self.path}")
            kind, _, rest = self.path[1:].partition("/")
            if kind == "to":
                self.send_response(302)
                self.send_header("Location", rest)
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            try:
                if kind == "picture":
                    self.wfile.write(PICTURE.read_bytes())
                while kind in ("endless", "slow"):
                    self.wfile.write(b"x" * (1 << 20 if kind == "endless" else 1))
                    if kind == "slow":
                        time.sleep(0.1)
            except OSError:
                pass

    seen: list[str] = []
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    port = running.server_address[1]
    resolve = socket.getaddrinfo
    answers = {"good.test": ["93.184.216.34"], "bad.test": ["10.1.2.3"], "both.test": ["93.184.216.34", "127.0.0.1"]}

    def getaddrinfo(host: Any, port: Any, *args: Any, **named: Any) -> Any:
        if host in answers:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in answers[host]]
        if host == "flips.test":  # another answer each time it is asked
            answers["flips.test"] = ["127.0.0.1"]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", port))]
        return resolve(host, port, *args, **named)

    connect = socket.create_connection
    went: list[str] = []

    def create_connection(to: tuple[str, int], *args: Any, **named: Any) -> socket.socket:
        went.append(to[0])
        return connect(("127.0.0.1", port), *args, **named) if to[0] == "93.184.216.34" else connect(to, *args, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "create_connection", create_connection)

    def fetch(url: str) -> Any:
        seen.clear()
        went.clear()
        try:
            made = pictures.fetched(showing(url)["messages"], Settings(**WITH_NAME), lambda: True)
            return made[0]["content"][0]["image"]
        except Gemma3Error as error:
            assert all(ipaddress.ip_address(one).is_global for one in went), went
            return error

    yield fetch
    running.shutdown()
    running.server_close()


def test_names_and_redirects(web: Callable[[str], Any]) -> None:
    picture = PICTURE.read_bytes()
    assert web("http://good.test/picture/a.png") == picture
    assert web("http://good.test/to//to//picture/") == picture
    assert web("http://flips.test/picture/") == picture  # connected to what was checked
    for url in (
        "http://bad.test/picture/", "http://both.test/picture/", "http://good.test/to/http://127.0.0.1/",
        "http://good.test/to/http://bad.test/picture/", "http://good.test/to/http://2130706433/",
        "http://good.test/to/http://[::ffff:127.0.0.1]/", "http://good.test/to/http://localhost/",
        "http://good.test/to/file:///etc/passwd", "http://good.test/to/ftp://good.test/a",
        "http://good.test/to//to//to//to//picture/", "http://nowhere.invalid/a.png",
    ):  # fmt: skip
        assert isinstance(web(url), Gemma3Error), url


def test_endless_and_slow_bodies(web: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = web("http://good.test/endless/")
    assert isinstance(found, ImageError) and "20 MB" in str(found)
    monkeypatch.setattr(address, "TOTAL_SECONDS", 1.0)
    found = web("http://good.test/slow/")
    assert isinstance(found, ImageError) and "within 1 seconds" in str(found)


def test_private_addresses_when_they_are_allowed(web: Callable[[str], Any]) -> None:
    settings = Settings(**WITH_NAME, allow_private_addresses=True)
    with pytest.raises(ImageError, match="could not be fetched"):  # nobody listens there
        pictures.fetched(showing("http://127.0.0.1:9/a.png")["messages"], settings, lambda: True)
    with pytest.raises(Gemma3Error, match="reads no files"):
        pictures.fetched(showing("file:///etc/passwd")["messages"], settings, lambda: True)


def test_who_goes_away_ends_the_download(web: Callable[[str], Any]) -> None:
    with pytest.raises(Gemma3Error, match="went away"):
        pictures.fetched(showing("http://good.test/slow/")["messages"], Settings(**WITH_NAME), lambda: False)


def test_other_hosts_need_a_key() -> None:
    with pytest.raises(OptionError, match="--api-key"):
        Settings(models=("demo",), host="0.0.0.0")
    for more in ({"api_keys": ("a",)}, {"no_auth": True}):
        assert not Settings(models=("demo",), host="::", **more).loopback  # type: ignore[arg-type]
    for host in ("127.0.0.1", "::1", "[::1]", "localhost", "127.3.2.1"):
        assert Settings(models=("demo",), host=host).loopback
    command = [sys.executable, "-m", "mlx_gemma3.cli", "serve", "-m", "demo", "--host", "0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("mlx-gemma3: --host: got 0.0.0.0 without a key")

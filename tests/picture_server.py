"""A web server on 127.0.0.1 that serves a picture in every way in which servers do, good and bad."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = b"<!DOCTYPE html><html><body>Not here.</body></html>"


@contextmanager
def serving(picture: bytes) -> Iterator[str]:
    """The server's address while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):
                getattr(self, self.path.partition("?")[0].strip("/").replace("-", "_").partition(".")[0])()

        def _head(self, status: int = 200, length: int | None = None, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()

        def good(self) -> None:
            self._head(length=len(picture), Content_Type="text/plain")  # what it is, its bytes say
            self.wfile.write(picture)

        def unmeasured(self) -> None:
            self._head()
            self.wfile.write(picture)

        def moved(self) -> None:
            self._head(302, 0, Location="/moved-again")

        def moved_again(self) -> None:
            self._head(307, 0, Location="good.png")

        def loop(self) -> None:
            self._head(301, 0, Location="/loop")

        def astray(self) -> None:
            self._head(302, 0, Location="file:///etc/passwd")

        def missing(self) -> None:
            self._head(404, len(PAGE))
            self.wfile.write(PAGE)

        def page(self) -> None:
            self._head(length=len(PAGE), Content_Type="image/png")
            self.wfile.write(PAGE)

        def empty(self) -> None:
            self._head(length=0)

        def short(self) -> None:
            self._head(length=len(picture) + 100)
            self.wfile.write(picture)

        def long(self) -> None:
            self._head(length=len(picture) // 2)
            self.wfile.write(picture)

        def no_number(self) -> None:
            self._head(Content_Length="many")
            self.wfile.write(picture)

        def large(self) -> None:
            self._head(length=10**12)

        def endless(self) -> None:
            self._head()
            while True:
                self.wfile.write(bytes(1 << 20))

        def slow(self) -> None:
            self._head(length=1000)
            for _ in range(1000):
                self.wfile.write(b"\x89")
                time.sleep(0.05)

        def slow_head(self) -> None:
            for letter in b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000:
                self.wfile.write(bytes((letter,)))
                time.sleep(0.05)

        def silent(self) -> None:
            time.sleep(5)

        def nonsense(self) -> None:
            self.wfile.write(b"\0\1\2\3 nothing of HTTP\r\n\r\n")

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()

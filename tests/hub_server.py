"""A stand-in for the Hub on 127.0.0.1: the part of its HTTP API that fetching a model takes.

Serves revisions, file lists and files, with the headers by which the client tells gated, private and missing apart,
and with Range for resuming. It counts what is asked, and can cut a download off.

    with HubServer({"owner/name": Repo({"config.json": b"{}"})}) as hub:
        ...  # HF_ENDPOINT=hub.url in a child process: the client reads it when it is imported
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """One repository; `commit` names what its only branch, main, points to."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    commit: str = "0" * 39 + "1"
    siblings: bool = True  # whether the answer about a revision lists the files


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    sent: int = 0  # bytes of the body


@dataclass
class HubServer:
    """The server, from `with` to the end of the block.

    cut: path of a file → how many of its next downloads break off, each after half of the bytes asked for.
    die_after: path of a file whose download, half sent, takes the whole server away.
    """

    repos: dict[str, Repo]
    cut: dict[str, int] = field(default_factory=dict)
    die_after: str = ""
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        class Handler(_Handler):
            hub = self

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def fetched(self) -> list[str]:
        """The files whose content was asked for, in order of name."""
        return sorted({r.path.split("/resolve/")[1].split("/", 1)[1] for r in self.downloads()})

    def downloads(self, name: str = "") -> list[Request]:
        return [r for r in self.requests if r.method == "GET" and "/resolve/" in r.path and r.path.endswith(name)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.request_log = Request(self.command, path, self.headers.get("Range"))
        self.hub.requests.append(self.request_log)
        api = path.startswith("api/models/")
        owner, name, *rest = [*path.removeprefix("api/models/").split("/"), "", ""]
        repo = self.hub.repos.get(f"{owner}/{name}")
        if repo is None or repo.private:
            # As the Hub answers one who is not logged in; it does not say which of the two it is.
            return self._refuse(401, "RepoNotFound")
        verb, revision, *inner = rest
        if revision not in ("main", repo.commit):
            return self._refuse(404, "RevisionNotFound")
        if api:
            return self._list(f"{owner}/{name}", repo, verb)
        if repo.gated:
            return self._refuse(401, "GatedRepo")
        file = "/".join(inner).strip("/")
        if file not in repo.files:
            return self._refuse(404, "EntryNotFound")
        return self._file(repo, file, repo.files[file])

    def _list(self, name: str, repo: Repo, verb: str) -> None:
        sizes = {file: len(content) for file, content in sorted(repo.files.items())}
        if verb == "tree":
            entries = [{"type": "file", "path": f, "size": n, "oid": _etag(repo.files[f])} for f, n in sizes.items()]
            return self._send(200, json.dumps(entries).encode())
        info: dict[str, object] = {"id": name, "sha": repo.commit, "private": False, "gated": repo.gated}
        if repo.siblings:
            info["siblings"] = [{"rfilename": file} for file in sizes]
        return self._send(200, json.dumps(info).encode())

    def _file(self, repo: Repo, name: str, content: bytes) -> None:
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        start, whole = 0, len(content)
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
        body = content[start:]
        if self.command == "GET" and (self.hub.cut.get(name, 0) > 0 or self.hub.die_after == name):
            self.hub.cut[name] = self.hub.cut.get(name, 0) - 1
            return self._break_off(headers, body, dying=self.hub.die_after == name)
        return self._send(206 if asked else 200, body, headers)

    def _break_off(self, headers: dict[str, str], body: bytes, *, dying: bool) -> None:
        if dying:
            # First no more connections, then the cut, so that the client's retry finds nobody.
            self.hub.server.socket.close()
        self._head(206 if "Content-Range" in headers else 200, len(body), headers)
        half = body[: len(body) // 2]
        self.wfile.write(half)
        self.wfile.flush()
        self.request_log.sent = len(half)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b'{"error": "refused"}', {"X-Error-Code": code, "X-Error-Message": "refused"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(status, len(body), headers or {"Content-Type": "application/json"})
        if self.command == "GET":
            self.wfile.write(body)
            self.request_log.sent = len(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()

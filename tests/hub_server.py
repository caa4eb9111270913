"""A stand-in for the Hub on 127.0.0.1: the part of its HTTP API that fetching and uploading a model take.

Serves revisions, file lists and files, with the headers by which the client tells gated, private and missing apart,
and with Range for resuming. Takes new repositories and commits from those whose token it knows, large files through
Git LFS's batch API. It counts what is asked, and can cut a transfer off.

    with HubServer({"owner/name": Repo({"config.json": b"{}"})}) as hub:
        ...  # HF_ENDPOINT=hub.url in a child process: the client reads it when it is imported
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
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
    received: int = 0  # the same of what the client sent


@dataclass
class HubServer:
    """The server, from `with` to the end of the block.

    cut: path of a file → how many of its next downloads break off, each after half of the bytes asked for. For an
        upload the sha256 of the content stands for the path.
    die_after: path of a file whose download, half sent, takes the whole server away.
    writers: token → the owner whose repositories it may write.
    objects: what large files were uploaded, by sha256.
    """

    repos: dict[str, Repo]
    cut: dict[str, int] = field(default_factory=dict)
    die_after: str = ""
    writers: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
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

    def uploads(self) -> list[Request]:
        """The uploads of large files, whole or cut."""
        return [r for r in self.requests if r.method == "PUT"]

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

    def do_PUT(self) -> None:
        """The content of a large file, at the address that the batch API gave out."""
        oid = self._logged().removeprefix("lfs/")
        length = int(self.headers["Content-Length"])
        if self.hub.cut.get(oid, 0) > 0:
            self.hub.cut[oid] -= 1
            self.request_log.received = len(self.rfile.read(length // 2))
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        content = self.rfile.read(length)
        self.request_log.received = len(content)
        if hashlib.sha256(content).hexdigest() != oid:
            return self._refuse(400, "BadDigest")
        self.hub.objects[oid] = content
        return self._send(200, b"{}")

    def do_POST(self) -> None:
        path = self._logged()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "api/validate-yaml":
            return self._check_card(json.loads(body)["content"])
        if path == "api/repos/create":
            values = json.loads(body)
            name = f"{values['organization']}/{values['name']}"
        else:
            name = "/".join(path.removeprefix("api/models/").split("/")[:2]).removesuffix(".git")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.hub.writers:
            return self._refuse(401, "")
        if self.hub.writers[token] != name.partition("/")[0]:
            return self._refuse(403, "")
        if path == "api/repos/create":
            return self._create(name, private=values.get("visibility") == "private")
        repo = self.hub.repos[name]
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body)["objects"])
        if path == f"api/models/{name}/preupload/main":
            return self._preupload(repo, json.loads(body)["files"])
        assert path == f"api/models/{name}/commit/main", path
        return self._commit(name, repo, [json.loads(line) for line in body.splitlines()])

    def _logged(self) -> str:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.request_log = Request(self.command, path, self.headers.get("Range"))
        self.hub.requests.append(self.request_log)
        return path

    def _answer(self) -> None:
        path = self._logged()
        api = path.startswith("api/models/")
        owner, name, *rest = [*path.removeprefix("api/models/").split("/"), "", ""]
        repo = self.hub.repos.get(f"{owner}/{name}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repo is None or (repo.private and self.hub.writers.get(token) != owner):
            # As the Hub answers one who is not logged in; it does not say which of the two it is.
            return self._refuse(401, "RepoNotFound")
        verb, revision, *inner = rest if rest[0] else ("revision", "main")
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
        info: dict[str, object] = {"id": name, "sha": repo.commit, "private": repo.private, "gated": repo.gated}
        if repo.siblings:
            info["siblings"] = [{"rfilename": file} for file in sizes]
        return self._send(200, json.dumps(info).encode())

    def _check_card(self, content: str) -> None:
        """The Hub knows the licences, and warns of a card that says nothing."""
        if "license: unheard-of" in content:
            return self._send(400, b'{"errors": [{"message": "\\"license\\" must be one of [apache-2.0, gemma]"}]}')
        warnings = [] if content.startswith("---\n") else [{"message": "empty or missing yaml metadata"}]
        return self._send(200, json.dumps({"warnings": warnings}).encode())

    def _create(self, name: str, *, private: bool) -> None:
        known = name in self.hub.repos
        if not known:
            self.hub.repos[name] = Repo({}, private=private)
        self._send(409 if known else 200, json.dumps({"url": f"{self.hub.url}/{name}"}).encode())

    def _preupload(self, repo: Repo, files: list[dict[str, Any]]) -> None:
        """How each file is to come, and the id of what stands there now."""
        answers = []
        for file in files:
            large = file["path"].endswith(".safetensors") or file["size"] > 10_000_000
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if (content := repo.files.get(file["path"])) is not None:
                blob = b"blob %d\0%s" % (len(content), content)
                answer["oid"] = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(blob).hexdigest()
            answers.append(answer)
        self._send(200, json.dumps({"files": answers}).encode())

    def _batch(self, objects: list[dict[str, Any]]) -> None:
        """Where to send each object; nowhere what is there already."""
        for item in objects:
            if item["oid"] not in self.hub.objects:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        self._send(200, json.dumps({"transfer": "basic", "objects": objects}).encode())

    def _commit(self, name: str, repo: Repo, lines: list[dict[str, Any]]) -> None:
        files = dict(repo.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repo.files, repo.commit = files, hashlib.sha1(repr((repo.commit, lines)).encode()).hexdigest()
        url = f"{self.hub.url}/{name}/commit/{repo.commit}"
        self._send(200, json.dumps({"commitUrl": url, "commitOid": repo.commit}).encode())

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
        if self.command != "HEAD":
            self.wfile.write(body)
            self.request_log.sent = len(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()

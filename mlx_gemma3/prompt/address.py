"""Where a picture is: an address or a path in a text → its bytes, a path, or a Pillow image.

Owns which kinds of address are read, and the bounds on fetching: bytes, seconds, redirects. What the bytes are is said
by the bytes (images.py), never by the server. Knows nothing of MLX.

The HTTP library is the one that huggingface_hub brings (httpx, or httpx2 since its version 2), imported when there is
something to fetch and not before. It works in a thread of its own, so that a bound on the whole time and the end of
waiting hold whatever it does: while it looks up a name, or is given a byte now and then.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from ..errors import ImageError, PromptError
from .images import format_of

MAX_BYTES = 20_000_000  # of a picture that is fetched
CONNECT_SECONDS = READ_SECONDS = 10.0  # to be connected; between two pieces of the answer
TOTAL_SECONDS = 30.0  # for everything, redirects included
MAX_REDIRECTS, GUARDED_REDIRECTS = 5, 3
Progress = Callable[[str, int, int], None]  # stage, done, total (0: not known); what it raises ends the work
Guard = Callable[[str, int], str]  # host and port → the address to connect to

_BEAT = 0.05  # seconds between two questions whether anybody still waits
_REDIRECTS = (301, 302, 303, 307, 308)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # two letters at least: C: is a drive
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{40,}={0,2}")
_HEADERS = {
    "User-Agent": "mlx-gemma3 (+https://pypi.org/project/mlx-gemma3)",
    "Accept": "image/png, image/jpeg, image/webp, image/*;q=0.9, */*;q=0.1",
    "Accept-Encoding": "identity",
}


def is_address(source: object) -> bool:
    """Whether a picture's source is an address and not the path of a file: http, https, data, file."""
    return isinstance(source, str) and _scheme(source) in ("http", "https", "data", "file")


def remote(source: object) -> bool:
    """Whether it must be fetched: http, https."""
    return isinstance(source, str) and _scheme(source) in ("http", "https")


def opened(source: Any, progress: Progress | None = None) -> tuple[Any, str | None]:
    """A picture's source as `load_image` takes it, and what errors are to call it.

    Args:
        source: an http, https, data or file address, a path, or the base64 of a picture file as some programs hand it
            over; anything else is left as it is.
        progress: told how much of a download is here.

    Raises:
        PromptError: an address of another kind, or a data: address that says no bytes.
        ImageError: it could not be fetched.
    """
    if not isinstance(source, str):
        return source, None
    scheme = _scheme(source)
    if scheme in ("http", "https"):
        return fetch(source, progress), f"picture {_shown(source)}"
    if scheme == "data":
        return _data(source), None
    if scheme == "file":
        parts = urlsplit(source)
        begins = "" if parts.netloc == "localhost" else parts.netloc
        if begins not in ("", ".", "..", "~"):  # the last three are no address, but what people write
            raise PromptError(
                f"picture {source}", got=f"a file of the machine {parts.netloc}", want="one of this machine"
            )
        return Path(os.fsdecode(unquote_to_bytes(begins + parts.path))), None
    if scheme and source[len(scheme) + 1 :].startswith("//"):
        raise PromptError(
            f"picture {_shown(source)}", got=f"an address of kind {scheme}", want="https, http, data or file"
        )
    if not source:
        raise PromptError("picture", got="an empty text", want="a path or an address")
    return source if (content := _bare_base64(source)) is None else content, None


def decoded(text: str | bytes) -> bytes:
    """The bytes of a base64 text (either alphabet, its padding and line breaks or none) or of a data: address.

    Raises:
        PromptError: it is neither.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("ascii")
        except UnicodeDecodeError:
            raise PromptError("picture in base64", got="other bytes", want="base64 of a picture file") from None
    if text[:5].lower() == "data:":
        return _data(text)
    try:
        plain = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (ValueError, binascii.Error) as error:
        raise PromptError("picture in base64", got=error, want="base64 of a picture file") from None


def _scheme(source: str) -> str:
    match = _SCHEME.match(source[:40])
    return match[1].lower() if match else ""


def _shown(url: str) -> str:
    """An address as errors may tell it: without a password, and without the query, which may hold a key."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path}"
    except ValueError:
        return url.partition("?")[0]


def _data(source: str) -> bytes:
    header, comma, data = source[5:].partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        content = unquote_to_bytes(data)
        if not header.lower().rstrip().endswith(";base64"):
            return content
        return decoded(content)
    except ValueError as error:
        raise PromptError(f"picture data:{header[:40]}", got=error, want="a data: URL of base64") from None
    except PromptError as error:
        raise PromptError(f"picture data:{header[:40]}", got=error.got, want="a data: URL of base64") from None


def _bare_base64(source: str) -> bytes | None:
    """The bytes of a text that is the base64 of a picture, and no file's name."""
    text = "".join(source.split()) if len(source) >= 40 else ""
    if not _BASE64.fullmatch(text):
        return None
    with contextlib.suppress(OSError, ValueError):
        if len(source) < 4096 and Path(source).exists():
            return None
    with contextlib.suppress(PromptError):
        if format_of(decoded(text[:100])[:64]) is not None:
            return decoded(text)
    return None


def fetch(url: str, progress: Progress | None = None, *, guard: Guard | None = None) -> bytes:
    """The bytes at an http or https address.

    Args:
        guard: asked at each hop for the address to connect to, which the name is not looked up again for; what it
            raises ends the download. No proxy is used then.
        progress: called with ("download", bytes that are here, bytes in all or 0), also while nothing comes; what it
            raises ends the download.

    Raises:
        ImageError: no such place, no answer in time, too large, too many redirects, or a redirect from https to http.
    """
    name, until = f"picture {_shown(url)}", time.monotonic() + TOTAL_SECONDS
    said: queue.SimpleQueue[tuple[int, int] | bytes | Exception] = queue.SimpleQueue()
    work = _Download(url, name, said, guard)
    threading.Thread(target=work.run, name="mlx-gemma3 picture", daemon=True).start()
    done = total = 0
    try:
        while True:
            if progress is not None:
                progress("download", done, total)
            try:
                event = said.get(timeout=_BEAT)
            except queue.Empty:
                if time.monotonic() > until:
                    raise _failed(name, f"not all of it came within {TOTAL_SECONDS:g} seconds") from None
                continue
            if isinstance(event, Exception):
                raise event
            if isinstance(event, bytes):
                return event
            done, total = event
            if time.monotonic() > until:
                raise _failed(name, f"not all of it came within {TOTAL_SECONDS:g} seconds")
    finally:
        work.abandon()


class _Download:
    """What the thread of a download does, and the way to end it from outside."""

    def __init__(self, url: str, name: str, said: queue.SimpleQueue[Any], guard: Guard | None) -> None:
        self._url, self._name, self._said, self._guard = url, name, said, guard
        self._client: Any = None
        self._unwanted = False

    def run(self) -> None:
        """The last thing that it says is the bytes, or an error."""
        try:
            self._said.put(self._get())
        except ImageError as error:
            self._said.put(error)
        except Exception as error:  # of the library, of the proxy's address, of the name's encoding
            self._said.put(_failed(self._name, _why(error)))

    def abandon(self) -> None:
        """Nobody waits any more: whatever it reads next is its last."""
        self._unwanted = True
        if self._client is not None:
            with contextlib.suppress(Exception):  # it may be in the middle of anything
                self._client.close()

    def _get(self) -> bytes:
        http, url, name = _library(), self._url, self._name
        timeout = http.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        guarded = self._guard is not None
        most = GUARDED_REDIRECTS if guarded else MAX_REDIRECTS
        with http.Client(
            headers=_HEADERS, timeout=timeout, follow_redirects=False, trust_env=not guarded
        ) as self._client:
            for _ in range(most + 1):
                asked = http.URL(url)
                request = self._client.build_request("GET", asked)
                if self._guard is not None:
                    port = asked.port or (443 if asked.scheme == "https" else 80)
                    request.url = asked.copy_with(host=self._guard(asked.host, port))
                    request.extensions["sni_hostname"] = asked.host
                with contextlib.closing(self._client.send(request, stream=True)) as answer:
                    if answer.status_code in _REDIRECTS and "location" in answer.headers:
                        url = _following(asked, answer, name)
                        continue
                    if answer.status_code != 200:
                        reason = f" ({answer.reason_phrase})" if answer.reason_phrase else ""
                        raise ImageError(
                            f"{name}: the server answers {answer.status_code}{reason}", do="check the address"
                        )
                    return self._body(answer)
        raise _failed(name, f"more than {most} redirects")

    def _body(self, answer: Any) -> bytes:
        said = answer.headers.get("content-length", "")
        total = int(said) if said.isascii() and said.isdigit() and len(said) < 19 else 0
        want = f"at most {MAX_BYTES // 1_000_000} MB"
        content = bytearray()
        for piece in (b"",) if total > MAX_BYTES else answer.iter_bytes():
            content += piece
            if max(total, len(content)) > MAX_BYTES:
                raise ImageError(f"{self._name}: too large", want=want, do="make it smaller first")
            if self._unwanted:
                break
            self._said.put((len(content), total))
        return bytes(content)


def _following(asked: Any, answer: Any, name: str) -> str:
    """Where a redirect leads. ImageError where it must not be followed."""
    target = asked.join(answer.headers["location"])
    if target.scheme not in ("http", "https") or not target.host:
        raise _failed(name, f"redirected to {_shown(str(target))}, which is no address of a picture")
    if asked.scheme == "https" and target.scheme == "http":
        raise _failed(name, f"redirected from https to {_shown(str(target))}, where anybody could change it")
    return str(target)


def _library() -> Any:
    try:
        return import_module("httpx2")
    except ImportError:
        return import_module("httpx")


def _failed(name: str, why: str) -> ImageError:
    return ImageError(f"{name}: could not be fetched ({why})", do="check the address, or download it and give its path")


def _why(error: Exception) -> str:
    """What the library says, in words."""
    kinds: Mapping[str, str] = {
        "ConnectTimeout": f"no connection within {CONNECT_SECONDS:g} seconds",
        "ReadTimeout": f"nothing came for {READ_SECONDS:g} seconds",
        "RemoteProtocolError": "the answer broke off or is no HTTP",
    }
    found = next((words for kind, words in kinds.items() if type(error).__name__ == kind), "")
    text = str(error) or type(error).__name__
    return f"{found}: {text}" if found == kinds["RemoteProtocolError"] else found or text

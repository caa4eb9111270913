"""Pictures of a request as bytes, before the engine sees it: a server reads no files for its clients, and asks no
address that only this machine can reach.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Any

from ..errors import ImageError, PromptError, RequestError
from ..prompt import address, messages
from .settings import Settings

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def fetched(said: Any, settings: Settings, wanted: Callable[[], bool], *, own: bool = False) -> Any:
    """Messages in the template's own form, every picture as bytes. Waits for the network: for a thread.

    Args:
        own: for a template of the checkpoint's own.
        wanted: asked while something is fetched; False ends it.

    Raises:
        PromptError, ImageError, RequestError: what is wrong with them.
    """
    made = messages.kept(said) if own else messages.read(said)
    pictures = [
        item
        for message in made
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for item in message["content"]
        if isinstance(item, dict) and item.get("type") == "image"
    ]
    if len(pictures) > settings.max_images:
        raise RequestError("pictures", got=len(pictures), want=f"at most {settings.max_images} (--max-images)")
    for item in pictures:
        if "image" not in item:
            raise PromptError("picture", got="an item without one", want="its address or its bytes")
        item["image"] = _bytes(item["image"], settings, wanted)
    return made


def _bytes(source: Any, settings: Settings, wanted: Callable[[], bool]) -> bytes:
    if isinstance(source, bytes):
        content = source
    elif not isinstance(source, str):
        raise PromptError("picture", got=type(source).__name__, want="an address or base64")
    elif address.remote(source):
        content = address.fetch(source, _asking(wanted), guard=None if settings.allow_private_addresses else public)
    elif address.is_address(source) and source[:5].lower() != "data:":
        raise PromptError("picture", got=f"{source[:40]}", want="a picture's bytes or its https address",
                          do="a server reads no files for its clients")  # fmt: skip
    else:
        content = address.decoded(source)  # of data: or bare base64
    if len(content) > address.MAX_BYTES:
        raise ImageError("picture: too large", want=f"at most {address.MAX_BYTES // 1_000_000} MB")
    return content


def _asking(wanted: Callable[[], bool]) -> address.Progress:
    def progress(*_: object) -> None:
        if not wanted():
            raise RequestError("request", got="a client that went away", want="one that waits")

    return progress


def public(host: str, port: int) -> str:
    """The address of a host that anybody may reach: what the name leads to now is what is connected to.

    Raises:
        ImageError: it leads to this machine, its network, or nowhere.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ImageError(f"picture at {host}: could not be fetched ({error})", do="check the address") from None
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    for one in addresses:
        if not _is_public(ipaddress.ip_address(one)):
            raise ImageError(
                f"picture at {host}", got=f"{one}, an address of this machine or its network", want="a public one",
                do="--allow-private-addresses allows it",
            )  # fmt: skip
    if not addresses:
        raise ImageError(f"picture at {host}", got="no address", want="a host")
    return addresses[0]


def _is_public(one: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(one, ipaddress.IPv6Address):
        inner = one.ipv4_mapped or one.sixtofour or (one.teredo[1] if one.teredo else None)
        if inner is None and one in _NAT64:
            inner = ipaddress.IPv4Address(int(one) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(inner)
        if one.is_site_local:
            return False
    return one.is_global and not one.is_multicast and not one.is_reserved and not one.is_unspecified

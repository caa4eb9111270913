"""How a server is run: what `serve` asks for, with its defaults."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import OptionError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Raises OptionError: a host that others reach without a key, a limit out of its range."""

    models: tuple[str, ...]
    adapters: tuple[tuple[str, str, str], ...] = ()  # model ("" for the first), name, folder
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))  # name → one of the models
    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = ()
    no_auth: bool = False  # let others in without a key
    origins: tuple[str, ...] = ()  # whose pages may ask: "https://…", or "*"
    allow_private_addresses: bool = False  # of pictures
    max_tokens: int = 4096  # of an answer that says nothing of its length
    max_body_bytes: int = 64 << 20
    max_images: int = 32  # of a request
    grace: float = 30.0  # seconds that answers have to end in after SIGTERM
    log_prompts: bool = False
    quiet: bool = False
    load: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of Engine

    def __post_init__(self) -> None:
        if not self.loopback and not self.api_keys and not self.no_auth:
            raise OptionError(
                "--host", got=f"{self.host} without a key", want="--api-key KEY",
                do="others can reach that address; --no-auth lets all of them in",
            )  # fmt: skip
        for name, least in (("max_tokens", 1), ("max_body_bytes", 1), ("max_images", 0)):
            if getattr(self, name) < least:
                raise OptionError(name, got=getattr(self, name), want=f">= {least}")
        if any(not key for key in self.api_keys):
            raise OptionError("--api-key", got="an empty text", want="a key")

    @property
    def loopback(self) -> bool:
        """Whether only programs of this machine reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


def key_from_file(path: Path) -> str:
    """The key that a file holds. Raises OptionError."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError("--api-key-file", got=error, want="a text file with the key") from None

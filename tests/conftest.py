"""What several test files share: tiny checkpoints on disk with a tokenizer, and a cache folder of the tests' own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer
from places import PICTURES, TEMPLATE


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Vocabularies and joined checkpoints of a test run go to a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_GEMMA3_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def _write(folder: Path, config: dict, *, chat: bool) -> Path:
    tiny.write_folder(folder, config, tiny.random_tensors(config, seed=4))
    tiny_tokenizer.write_tokenizer(folder)
    if chat:
        shutil.copy(TEMPLATE, folder / "tokenizer_config.json")
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base checkpoint: words only, no chat template."""
    return _write(tmp_path_factory.mktemp("tiny") / "tiny-text", tiny.text_config(), chat=False)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An instruction-tuned checkpoint with a vision tower."""
    return _write(tmp_path_factory.mktemp("tiny") / "tiny-it", tiny.image_config(), chat=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user is: two pictures, one with a space in its name, and a file that is none."""
    shutil.copy(PICTURES / "heart.png", tmp_path / "my heart.png")
    shutil.copy(PICTURES / "triangle.png", tmp_path)
    (tmp_path / "notes.txt").write_text("words", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path

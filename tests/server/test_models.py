"""Several models of one server: names, and who is dropped for whom."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mlx_gemma3.errors import BusyError, OptionError, SourceNotFound
from mlx_gemma3.server.models import Models
from mlx_gemma3.server.settings import Settings

LOAD = {"quiet": True}


def test_names() -> None:
    sources = ("google/gemma-3-4b-it", "/models/Mine_8bit", "demo")
    models = Models(Settings(models=sources, aliases={"gpt-4": "demo", "b": "google/gemma-3-4b-it"}), budget=1)
    for asked, name in (
        ("google/gemma-3-4b-it", "google/gemma-3-4b-it"), ("Gemma-3-4B-it", "google/gemma-3-4b-it"),
        ("mine_8bit:latest", "Mine_8bit"), ("GPT-4", "demo"), ("openai/gpt-4", "demo"), ("b", "google/gemma-3-4b-it"),
        (None, "google/gemma-3-4b-it"), ("", "google/gemma-3-4b-it"), ("demo", "demo"),
    ):  # fmt: skip
        assert models.find(asked).name == name, asked
    for asked in ("gemma", "gpt-4o", "demo2", "/"):
        with pytest.raises(SourceNotFound, match="google/gemma-3-4b-it, Mine_8bit, demo, gpt-4"):
            models.find(asked)
    with pytest.raises(OptionError, match="--alias"):
        Models(Settings(models=("demo",), aliases={"a": "other"}), budget=1)


def test_the_one_not_used_for_longest_is_dropped(text_folder: Path, chat_folder: Path) -> None:
    sources = (str(text_folder), str(chat_folder), "demo")

    async def run() -> None:
        models = Models(Settings(models=sources, load=LOAD), budget=1 << 40)
        first, second, third = models.listed
        try:
            await models.engine(first)
            await models.engine(second)
            assert first.engine is not None and second.engine is not None  # there is room for both
            models.budget = first.weights_bytes + second.weights_bytes + 1000
            await models.engine(first)  # used last
            await models.engine(third)
            assert second.engine is None and third.engine is not None
            with models.using(third), models.using(first):
                models.budget = 1
                with pytest.raises(BusyError, match="memory"):
                    await models.engine(second)
            await models.engine(second)
            assert first.engine is None and third.engine is None
        finally:
            models.close()

    asyncio.run(run())

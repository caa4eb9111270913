"""What the tests of prompts on disk share."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_gemma3 as g3
from mlx_gemma3.runtime.prompt_cache import PromptCache
from mlx_gemma3.runtime.scheduler import Scheduler

LONG = "the user is in the model and the user is in the model " * 13  # over 256 tokens; the window is 16
OPTIONS: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0}


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def cache_of(engine: g3.Engine) -> PromptCache:
    scheduler = engine._thread._scheduler
    assert scheduler is not None and scheduler.prompts is not None
    return scheduler.prompts


def wait_for(happened: Callable[[], object], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.005)


def keep_one(engine: g3.Engine) -> None:
    """Of the timelines nobody uses only the last one stays in memory."""
    scheduler: Scheduler = engine._thread._scheduler  # type: ignore[assignment]
    scheduler.pool.budget = 0

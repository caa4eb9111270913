"""The demo is taught a shape that it does not know, by what docs/tune.md says, in a shortened form."""

from __future__ import annotations

from pathlib import Path

import pytest

import mlx_gemma3 as g3
from examples.demo_model import hexagons

pytest.importorskip("mlx_lm")


def test_the_demo_does_not_know_hexagons() -> None:
    """Whatever it says to them is wrong: there is something to learn."""
    assert hexagons.measure(None, seed=hexagons.TEST_SEED, count=8, old=9) == (0.0, 1.0)


@pytest.mark.slow
def test_it_learns_them_and_keeps_what_it_knew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 steps instead of 480, of a third of the pictures."""
    monkeypatch.setenv("MLX_GEMMA3_CACHE", str(tmp_path / "cache"))
    hexagons.write(tmp_path / "data", seed=1, new=400, old=1200)
    report = g3.tune(
        "demo", tmp_path / "data", tmp_path / "out", steps=200, batch_size=32, learning_rate=3e-3, examples=0
    )
    assert report.bytes <= 500_000
    new, old = hexagons.measure(str(tmp_path / "out"), seed=hexagons.TEST_SEED, count=40, old=90)
    assert new >= 0.7 and old >= 0.9

"""examples/search: its plumbing on a tiny model; its answers where EmbeddingGemma itself is on this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_embedding
from places import ROOT

import mlx_gemma3 as g3
from examples.search.search import DOCS, QUESTIONS, Index, Passage, passages
from mlx_gemma3.checkpoint.hub import library_cache

REAL = library_cache() / "models--google--embeddinggemma-300m"


def test_sections_of_every_document(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One\n\nfirst\n\n## Two\n" + "second " * 600)
    found = passages(tmp_path)
    assert [(one.file, one.title) for one in found] == [("a.md", "One"), ("a.md", "Two"), ("a.md", "Two")]
    assert {one.file for one in passages(DOCS)} >= set(QUESTIONS.values())


def test_what_is_asked_in_a_passages_own_words_finds_it(tmp_path: Path) -> None:
    """Any model gives a text's own vector: the query's prompt stands before both here."""
    folder = tiny_embedding.write(tmp_path / "e", "plain")
    with g3.load(folder) as engine:
        index = Index(
            engine, [Passage("a.md", "A", "the user"), Passage("b.md", "B", "is in 7"), Passage("c.md", "C", "x")]
        )
        assert index.vectors.shape == (3, 64)
        index.vectors = np.array(engine.embed([one.text for one in index.passages], kind="query"), np.float32)
        found = index.search("is in 7", count=2)
        assert found[0][1].file == "b.md" and found[0][0] == pytest.approx(1, abs=1e-5) and len(found) == 2
    command = [
        sys.executable,
        ROOT / "examples" / "search" / "search.py",
        "-m",
        folder,
        "--dimensions",
        "16",
        "a?",
        "b?",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count(".md, ") == 6, done.stderr
    done = subprocess.run([*command[:2], "-m", "demo", "a?"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.startswith("search: embed: got demo")


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="google/embeddinggemma-300m is not on this machine")
def test_the_right_passage_comes_first() -> None:
    with g3.load("embeddinggemma-300m") as engine:
        index = Index(engine, passages(DOCS))
        for question, file in QUESTIONS.items():
            assert index.search(question)[0][1].file == file, question

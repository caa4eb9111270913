"""`mlx-gemma3 embed`, `convert`, `evaluate` and `inspect` on an embedding model, as a user runs them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny_embedding
from test_embedding_files import write_gguf

import mlx_gemma3 as g3
from mlx_gemma3.errors import OptionError, PromptError
from mlx_gemma3.measure.evaluate import evaluate
from mlx_gemma3.measure.vectors import passages

TEXT = "\n\n".join(f"the user is in the model {number}" for number in range(8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_embedding.write(tmp_path_factory.mktemp("commands") / "e", "plain")


def run(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.argv[0] = 'mlx-gemma3'; from mlx_gemma3.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *words], input=stdin, capture_output=True, text=True, timeout=120
    )


def test_lines_files_json_and_npy(folder: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("the user\nis in")
    two.write_text("a " * 80)
    with g3.load(folder) as engine:
        lines = np.array(engine.embed(["the user", "", "is in"], kind="query", dimensions=16))
        files = np.array(engine.embed([one.read_text(), two.read_text()]))
    asked = ("-m", str(folder))
    done = run("embed", *asked, "--kind", "query", "--dimensions", "16", stdin="the user\n\nis in\n")
    assert (done.returncode, done.stderr) == (0, "")
    np.testing.assert_allclose(np.loadtxt(io.StringIO(done.stdout)), lines, rtol=0, atol=1e-6)
    done = run("embed", *asked, "--json", str(one), str(two))
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["text"] for row in found] == [str(one), str(two)] and found[0]["cut"] == 0 < found[1]["cut"]
    assert found[1]["tokens"] == 60 and "note: " in done.stderr and "cut off" in done.stderr
    np.testing.assert_allclose([row["embedding"] for row in found], files, rtol=0, atol=1e-6)
    out = tmp_path / "out.npy"
    done = run("embed", *asked, "--npy", str(out), "--quiet", str(one), str(two))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    np.testing.assert_allclose(np.load(out), files, rtol=0, atol=1e-6)
    done = run("embed", *asked, "--lines", "--json", str(one), "-", stdin="x")
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == [f"{one}:1", f"{one}:2", "line 1"]


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"\xe9t\xe9")
    for words, what in (
        (["-m", str(folder), str(tmp_path / "none.txt")], "none.txt"),
        (["-m", str(folder), str(latin)], "UTF-8"),
        (["-m", str(folder), "--kind", "nope"], "want query"),
        (["-m", str(folder), "--dimensions", "65"], "1 to 64"),
        (["-m", str(folder), "--npy", str(tmp_path)], "folder"),
        (["-m", str(folder), "--npy", "x.npy", "--json"], "one or the other"),
        (["-m", str(folder), "-", "-"], "twice"),
        (["-m", "demo"], "embedding model"),
    ):
        done = run("embed", *words, stdin="a\n")
        assert done.returncode == 1 and what in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert "none" in run("embed", "-m", str(folder)).stderr


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_it_is_nearly_the_same(folder: Path, tmp_path: Path, bits: int) -> None:
    report = g3.convert(folder, tmp_path / "out", bits=bits, group_size=32, compare=TEXT)
    assert report.comparison is not None and report.comparison.vectors is not None
    found = report.comparison.to_dict()["vectors"]
    least = {8: 0.999, 4: 0.8}[bits]  # of random weights, which lose more than trained ones
    assert found["texts"] == 8 and least < found["cosine_lowest"] <= found["cosine_mean"] < 1
    assert "cosine, mean" in report.comparison.text() and "dense" in report.kinds
    assert "mlx-gemma3 embed" in (tmp_path / "out" / "README.md").read_text()
    with g3.load(tmp_path / "out") as ours, g3.load(folder) as plain:
        one, other = ours.embed(TEXT, kind="query")[0], plain.embed(TEXT, kind="query")[0]
        assert least < np.dot(one, other) < 1
    scales = [name for name in mx.load(str(tmp_path / "out" / "model.safetensors")) if name.endswith("scales")]
    assert {"dense.0.scales", "dense.1.scales"} <= set(scales) and not any("lm_head" in name for name in scales)


def test_gguf_becomes_a_folder_that_is_whole(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "e.gguf")
    g3.convert(source, tmp_path / "out", dtype="float32")
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "sentence_bert_config.json"} <= names
    assert "generation_config.json" not in names
    with g3.load(tmp_path / "out") as engine, g3.load(source) as same:
        found, want = engine.embed(["the user", ""], kind="STS"), same.embed(["the user", ""], kind="STS")
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)
    around = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["post_processor"]
    assert around["single"][-1]["SpecialToken"]["id"] == "<eos>"


def test_evaluate_wants_two_embedding_models(folder: Path, tmp_path: Path) -> None:
    found = evaluate(str(folder), text=TEXT, against=str(folder)).to_dict()["vectors"]
    assert found["cosine_lowest"] > 0.999999 and found["same_nearest_text"] == 1
    with pytest.raises(OptionError, match="another"):
        evaluate(str(folder), text=TEXT)
    with pytest.raises(OptionError, match="two of a kind"):
        evaluate(str(folder), text=TEXT, against="demo")
    with pytest.raises(PromptError, match="paragraphs"):
        evaluate(str(folder), text="one", against=str(folder))
    assert passages(" a\nb\n \n\nc\n") == ["a\nb", "c"]


def test_inspect(folder: Path) -> None:
    done = run("inspect", str(folder))
    assert "embedding" in done.stdout and "64 numbers, of at most 60 tokens" in done.stdout and "dense" in done.stdout
    assert json.loads(run("inspect", "--json", str(folder)).stdout)["embedding"]["dimensions"] == 64

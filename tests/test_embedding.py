"""EmbeddingGemma: vectors equal to the reference's, one at a time and together, from every kind of file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_embedding
from tiny_embedding import CASES, KINDS

import mlx_gemma3 as g3
from mlx_gemma3.checkpoint.load import load_model, open_checkpoint
from mlx_gemma3.checkpoint.source import resolve
from mlx_gemma3.config import Config
from mlx_gemma3.errors import ContextError, OptionError, PromptError
from mlx_gemma3.model.context import Texts
from mlx_gemma3.model.fused import gpu_kernels
from mlx_gemma3.model.runner import Runner, on_device

GOLDENS = Path(__file__).parent / "goldens" / "embedding"
ATOL = 1e-4  # of numbers of a vector of length 1; the reference's own batches differ by 1e-6


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_embedding.write(tmp_path_factory.mktemp("embedding") / kind, kind)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[g3.Engine]:
    with g3.load(folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def goldens(kind: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{kind}.npz") as file:
        return dict(file)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A folder of its own, to be changed."""
    return tiny_embedding.write(tmp_path / "e", "plain")


def near(found: Any, want: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(found), want, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", CASES)
def test_vectors_are_the_references(engine: g3.Engine, goldens: dict[str, np.ndarray], name: str) -> None:
    """Its `encode` is normalize=False here; with normalize_embeddings it is normalize=True."""
    prompt, text = CASES[name]
    near(engine.embed(text, kind=prompt, normalize=False)[0], goldens[name])
    for size in (32, 16):
        near(engine.embed([text], kind=prompt, dimensions=size, normalize=False)[0], goldens[f"{name}.{size}"])
        near(engine.embed([text], kind=prompt, dimensions=size)[0], goldens[f"{name}.{size}.unit"])


def test_a_batch_is_what_its_texts_are_alone(engine: g3.Engine, goldens: dict[str, np.ndarray]) -> None:
    texts = [text for _, text in CASES.values()]
    together = engine.embed(texts, kind="query", normalize=False)
    near(together, goldens["batch.query"])
    near(together, np.array([engine.embed(text, kind="query", normalize=False)[0] for text in texts]))
    again = engine.embed(texts * 40, kind="query", normalize=False)  # several batches, many texts of one length
    near(again, np.tile(goldens["batch.query"], (40, 1)))


def test_the_plain_modules_and_the_gpus_graph_say_the_same(folder: Path, goldens: dict[str, np.ndarray]) -> None:
    """The runner for a GPU, on the CPU: rows are filled up, matrices are MLX's."""
    checkpoint = open_checkpoint(resolve(folder))
    model = load_model(checkpoint, dtype="float32")
    embedder = checkpoint.config.embedder
    assert embedder is not None
    texts = [goldens[f"{name}.ids"].tolist() for name in CASES]
    skipped = [1 + length % 2 for length in range(len(texts))]
    rule = np.array(model.vectors(texts, skipped))
    near(np.array(on_device(model).vectors(texts, skipped)), rule)
    on_gpu = Runner(model, gpu_kernels(compiled=False))
    assert on_gpu.ahead
    near(np.array(on_gpu.vectors(texts, skipped)), rule)


@pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed")
def test_sentence_transformers_gives_the_same_here(folder: Path, engine: g3.Engine, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    texts = [text for _, text in CASES.values()]
    theirs = SentenceTransformer(str(folder), device="cpu")
    near(engine.embed(texts, kind="query", normalize=False), theirs.encode(texts, prompt_name="query"))
    g3.convert(folder, tmp_path / "out", dtype="float32", overrides=["*=none"])
    ours = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    near(ours.encode(texts, prompt_name="query"), theirs.encode(texts, prompt_name="query"))


def test_sides_and_windows() -> None:
    """Attention of one text equals the mask written out; long ones go block by block."""
    random = np.random.default_rng(0)
    length, heads, size, window = 200, 2, 8, 7
    q, k, v = (mx.array(random.standard_normal((length, heads, 1, size)).astype(np.float32)) for _ in range(3))

    class Rule:
        layer, scale = 0, 0.3
        window: int | None = None

    def attend(q: mx.array, keys: Any, values: Any, *, scale: float, mask: mx.array | None) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, keys[0], values[0], scale=scale, mask=mask)

    apart = np.abs(np.arange(length)[:, None] - np.arange(length)[None])
    for wanted, allowed in ((None, apart >= 0), (window, apart < window)):
        rule = Rule()
        rule.window = wanted
        scores = np.einsum("qhd,khd->hqk", np.array(q)[:, :, 0], np.array(k)[:, :, 0]) * 0.3
        powers = np.where(allowed, np.exp(scores), 0)
        want = np.einsum("hqk,khd->qhd", powers / powers.sum(-1, keepdims=True), np.array(v)[:, :, 0])
        np.testing.assert_allclose(np.array(Texts([length]).attend(q, k, v, rule, attend))[:, :, 0], want, atol=1e-5)


def test_the_window_is_halved_and_written_back(plain: Path, tmp_path: Path) -> None:
    assert Config.from_file(plain / "config.json").text.sliding_window == 7
    values = tiny_embedding.config("tuned")
    assert Config.from_dict(values).text.sliding_window == 5  # of 9
    g3.convert(plain, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sliding_window"] == 12


def test_kinds_dimensions_and_texts_are_checked(engine: g3.Engine, kind: str) -> None:
    for options, what in (
        ({"kind": "nope"}, "query, document"),
        ({"dimensions": 0}, "1 to 64"),
        ({"dimensions": 65}, "1 to 64"),
        ({"kind": 3}, "a text"),
    ):
        with pytest.raises(OptionError, match=what):
            engine.embed("a", **options)  # type: ignore[arg-type]
    for texts in (3, [3], {"a": 1}, b"a", [["a"]], [[1.5]], None):
        with pytest.raises(OptionError, match="texts"):
            engine.embed(texts)  # type: ignore[arg-type]
    for ids in ([[]], [[-1]], [[512]]):
        with pytest.raises(PromptError, match="token ids"):
            engine.embed(ids)
    with pytest.raises(OptionError, match="token ids"):
        engine.embed([[5]], kind="query")
    with pytest.raises(ContextError, match="at most 60"):
        engine.embed([[5] * 61])
    with pytest.raises(ContextError, match="at most 60"):
        engine.embed("a " * 60, truncate=False)
    assert engine.embed([]) == []
    work = engine.embedding(["a", CASES["cut"][1]])
    assert work.total == 2 and work.array().shape == (2, 64) and work.done == 2
    assert work.cut[0] == 0 < work.cut[1] and work.tokens[1] == 60


def test_an_embedding_model_does_not_write(engine: g3.Engine, folder: Path) -> None:
    with pytest.raises(PromptError, match="writes nothing"):
        engine.generate("hello")
    with pytest.raises(OptionError, match="base checkpoint"):
        engine.session()
    with pytest.raises(PromptError, match="writes nothing"):
        load_model(folder)([[1, 2]])
    with pytest.raises(PromptError, match="writes nothing"):
        on_device(load_model(folder)).make_caches()
    assert engine.about["dimensions"] == 64 and not engine.about["instruct"]


def test_a_model_that_writes_does_not_embed() -> None:
    with g3.load("demo") as engine:
        assert "dimensions" not in engine.about
        with pytest.raises(OptionError, match="want an embedding model"):
            engine.embed("a")


def test_requests_take_turns_and_share_batches(engine: g3.Engine) -> None:
    """A small request that comes behind a large one is done long before it; a cancelled one ends early."""
    large = engine.embedding(["the user is in the model"] * 3000)
    small = engine.embedding(["a"])
    small.array()
    assert large.done < large.total
    large.cancel()
    with pytest.raises(g3.Gemma3Error, match="cancelled"):
        large.array()
    assert engine.embed("a")  # the engine lives on


def test_a_closed_engine_ends_what_waits(folder: Path) -> None:
    engine = g3.load(folder)
    work = engine.embedding(["the user is in the model"] * 5000)
    engine.close()
    with pytest.raises(g3.Gemma3Error):
        work.array()
    with pytest.raises(g3.Gemma3Error, match="close"):
        engine.embed("a")

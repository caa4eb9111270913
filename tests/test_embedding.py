"""EmbeddingGemma: vectors equal to the reference's, one at a time and together, from every kind of file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_embedding
import tiny_gguf
from tiny_embedding import CASES, KINDS

import mlx_gemma3 as g3
from mlx_gemma3.checkpoint.load import load_model, open_checkpoint
from mlx_gemma3.checkpoint.source import resolve
from mlx_gemma3.config import Config
from mlx_gemma3.embedder_config import PROMPTS
from mlx_gemma3.errors import CheckpointError, ConfigError, ContextError, OptionError, PromptError, TokenizerError
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


# --- files


@pytest.mark.parametrize("bits", [None, 8])
def test_matrices_that_lie_with_the_other_weights(plain: Path, tmp_path: Path, bits: int | None) -> None:
    """As MLX programs write them: model.…, dense.0, dense.1; no modules.json, no folders."""
    tensors = dict(tiny_embedding.tensors("plain"))
    for number, part in enumerate(tiny_embedding.dense("plain")):
        tensors[f"dense.{number}.weight"] = part["weight"]
    packing = None if bits is None else {"bits": bits, "group_size": 32}
    packed, floats = tiny.pack(tensors, packing) if packing else (tensors, tensors)
    out = tiny.write_folder(
        tmp_path / "mlx", tiny_embedding.config("plain"), packed, style="text", packing=packing, generation=None
    )
    tiny_embedding.write_tokenizer(out)
    values = {name.removeprefix("language_model."): mx.array(array) for name, array in floats.items()}
    for number in range(2):
        weight = values.pop(f"dense.{number}.weight")
        mx.save_safetensors(str(plain / f"{number + 2}_Dense" / "model.safetensors"), {"linear.weight": weight})
    mx.save_safetensors(str(plain / "model.safetensors"), values)
    with g3.load(out) as ours, g3.load(plain) as same:
        near(ours.embed(["the user", "a"], kind="query"), np.array(same.embed(["the user", "a"], kind="query")))
        assert ours.embed("a", kind="STS") != ours.embed("a")  # EmbeddingGemma's own prompts


def write_gguf(path: Path, *, dense: str = "dense_{}", ollama: bool = False, **settings: Any) -> Path:
    """As llama.cpp's converter writes it with its option for the matrices; or as Ollama's."""
    config = tiny_embedding.config("plain")
    prefix = "gemma3" if ollama else "gemma-embedding"
    values = {
        f"{prefix}.context_length": 256,
        f"{prefix}.embedding_length": config["hidden_size"],
        f"{prefix}.block_count": config["num_hidden_layers"],
        f"{prefix}.feed_forward_length": config["intermediate_size"],
        f"{prefix}.attention.head_count": config["num_attention_heads"],
        f"{prefix}.attention.head_count_kv": 1,
        f"{prefix}.attention.key_length": config["head_dim"],
        f"{prefix}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{prefix}.attention.sliding_window": 12,
        f"{prefix}.attention.sliding_window_pattern": 3,
        f"{prefix}.rope.freq_base": 1e6,
        f"{prefix}.pooling_type": 1,
        **tiny_gguf.vocabulary_settings(tiny_embedding.vocabulary().pieces),
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_eos_token": True,
        **settings,
    }
    tensors = dict(tiny_embedding.tensors("plain"))
    if dense:
        for number, part in enumerate(tiny_embedding.dense("plain")):
            tensors[dense.format(number + (0 if ollama else 2)) + ".weight"] = part["weight"]
    return tiny_gguf.write_gguf_file(path, prefix, values, tensors, "F32")


GGUF_CONFIG = {"head_dim": 24, "query_pre_attn_scalar": 24}  # GGUF has no other scale


@pytest.fixture
def like_gguf(plain: Path) -> Path:
    """The folder of the same weights, with what GGUF cannot say as it takes it for granted."""
    (plain / "config.json").write_text(json.dumps(tiny_embedding.config("plain") | GGUF_CONFIG))
    (plain / "sentence_bert_config.json").write_text('{"max_seq_length": 256}')
    return plain


@pytest.mark.parametrize("ollama", [False, True])
def test_gguf(like_gguf: Path, tmp_path: Path, ollama: bool) -> None:
    path = write_gguf(tmp_path / "e.gguf", dense="dense.{}" if ollama else "dense_{}", ollama=ollama)
    texts = [text for _, text in CASES.values()]
    with g3.load(path) as engine, g3.load(like_gguf) as same:
        near(engine.embed(texts, kind="document"), np.array(same.embed(texts, kind="document")))
        assert engine.about["notes"] == []


def test_gguf_without_its_matrices_is_pooled_only_and_says_so(like_gguf: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "e.gguf", dense="")
    modules = json.loads((like_gguf / "modules.json").read_text())
    (like_gguf / "modules.json").write_text(json.dumps([one for one in modules if "Dense" not in one["type"]]))
    with g3.load(path) as engine, g3.load(like_gguf) as same:
        near(engine.embed("the user"), np.array(same.embed("the user")))
        assert "no dense matrices" in engine.about["notes"][0]


def test_gguf_that_pools_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pooling_type"):
        open_checkpoint(resolve(write_gguf(tmp_path / "e.gguf", **{"gemma-embedding.pooling_type": 2})))


def test_gguf_whose_texts_end_without_eos(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "e.gguf", **{"tokenizer.ggml.add_eos_token": False})
    embedder = open_checkpoint(resolve(path)).config.embedder
    assert embedder is not None and (embedder.prefix, embedder.suffix) == ((2,), ())


@pytest.mark.parametrize(
    ("file", "values", "what"),
    [
        ("modules.json", [], "nothing, want Transformer"),
        ("modules.json", [{"type": "x.Transformer", "path": ""}, {"type": "x.WeightedLayerPooling"}], "WeightedLayer"),
        ("modules.json", [{"type": "x.Transformer"}, {"type": "x.Pooling", "path": "../1_Pooling"}], "folder beside"),
        ("modules.json", {"a": 1}, "a list of modules"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "want mean"),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "max"]}, "want mean"),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": 1}, "include_prompt"),
        ("2_Dense/config.json", {"in_features": 64}, "out_features"),
        ("2_Dense/config.json", {"in_features": 60, "out_features": 128, "bias": False}, "in_features: got 60"),
        ("2_Dense/config.json", {"in_features": 64, "out_features": 128, "activation_function": "x.ELU"}, "ELU"),
        ("2_Dense/config.json", {"in_features": 64, "out_features": 128, "use_residual": True}, "residual"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case"),
        ("sentence_bert_config.json", {"max_seq_length": 2}, "max_seq_length: got 2"),
        ("sentence_bert_config.json", {"max_seq_length": "x"}, "max_seq_length"),
        ("config_sentence_transformers.json", {"prompts": {"a": 1}}, "prompts"),
        ("config_sentence_transformers.json", {"default_prompt_name": "nope"}, "default_prompt_name"),
    ],
)
def test_what_is_not_computed_here_is_refused(plain: Path, file: str, values: Any, what: str) -> None:
    (plain / file).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=what) as refused:
        open_checkpoint(resolve(plain))
    assert "\n" not in str(refused.value)


def test_missing_and_wrong_matrices_are_refused(plain: Path) -> None:
    weights = plain / "3_Dense" / "model.safetensors"
    mx.save_safetensors(str(weights), {"linear.weight": mx.zeros((64, 64))})
    with pytest.raises(CheckpointError, match=r"dense\.1\.weight"):
        load_model(plain)
    weights.unlink()
    with pytest.raises(CheckpointError, match="3_Dense"):
        load_model(plain)
    shutil.rmtree(plain / "3_Dense")
    with pytest.raises(ConfigError, match="in_features"):
        load_model(plain)


def test_what_stands_around_a_text_is_the_tokenizers(plain: Path) -> None:
    path = plain / "tokenizer.json"
    values = json.loads(path.read_text())

    def around(processor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        path.write_text(json.dumps(values | {"post_processor": processor}))
        embedder = open_checkpoint(resolve(plain)).config.embedder
        assert embedder is not None
        return embedder.prefix, embedder.suffix

    template = values["post_processor"]
    assert around(template) == ((2,), (1,))
    assert around({"type": "Sequence", "processors": [template]}) == ((2,), (1,))
    assert around(template | {"single": template["single"][:2]}) == ((2,), ())
    assert around(None) == ((), ())
    for wrong in ({"type": "ByteLevel"}, template | {"single": []}, template | {"special_tokens": {}}):
        with pytest.raises(TokenizerError, match="post_processor"):
            around(wrong)


def test_prompts(plain: Path) -> None:
    path = plain / "config_sentence_transformers.json"

    def prompts(values: dict[str, Any]) -> Any:
        path.write_text(json.dumps(values))
        embedder = open_checkpoint(resolve(plain)).config.embedder
        assert embedder is not None
        return embedder.prompts

    assert prompts({}) == PROMPTS and prompts({"prompts": {"query": "q: "}}) == {"query": "q: "}
    own = {"query": PROMPTS["query"], "document": "mine: "}
    assert prompts({"prompts": own})["document"] == "mine: " and "fact checking" in prompts({"prompts": own})
    prompts({"prompts": {"passage": "p: "}})
    with g3.load(plain) as engine:
        near(engine.embed("a", kind="document"), np.array(engine.embed("p: a")))
        with pytest.raises(OptionError, match="passage"):
            engine.embed("a", kind="query")


# --- together


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

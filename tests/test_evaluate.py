"""Two checkpoints compared: the same numbers as a plain computation on whole logits, and one line for what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_tokenizer
from PIL import Image

import mlx_gemma3 as g3
from mlx_gemma3.errors import Gemma3Error, OptionError, OutputError, PromptError, TokenizerError
from mlx_gemma3.measure import evaluate as module
from mlx_gemma3.measure import plot as drawing
from mlx_gemma3.measure.evaluate import Opened, evaluate, open_model, read_text, slice_scores
from mlx_gemma3.measure.scores import Distance, Evaluation, Scores
from mlx_gemma3.prompt.vocabulary import CONTROL_NAMES, Vocabulary

COMMAND = [sys.executable, "-W", "error", "-m", "mlx_gemma3.cli", "evaluate"]
TEXT = "the model is in the user's <end_of_turn> hands; then he mends it, and the others do more of the same. " * 2
ROUNDING = 2e-5  # nats: float32 here, float64 there, on logits of about 10


@pytest.fixture(scope="module")
def other_folder(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text_folder's checkpoint in 4 bits."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-4bit"
    packing = {"bits": 4, "group_size": 32}
    packed, _ = tiny.pack(tiny.random_tensors(tiny.text_config(), seed=4), packing)
    tiny.write_folder(folder, tiny.text_config(), packed, style="text", packing=packing)
    shutil.copyfile(text_folder / "tokenizer.model", folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def other_chat(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that sees, with other weights than chat_folder's."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-other-it"
    shutil.copytree(chat_folder, folder)
    config = tiny.image_config()
    tensors, changed = tiny.random_tensors(config, seed=4), tiny.random_tensors(config, seed=5)
    tiny.write_folder(folder, config, {name: values + 0.1 * changed[name] for name, values in tensors.items()})
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    values = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def whole(targets: np.ndarray, own: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """What `evaluate` should find, from whole logits (N, V) in float64."""
    p, q = softmax(reference), softmax(own)
    rows = np.arange(len(targets))
    return {
        "loss": -np.log(q[rows, targets]),
        "reference": -np.log(p[rows, targets]),
        "divergence": (p * np.log(p / q)).sum(axis=-1),
        "agree": own.argmax(axis=-1) == reference.argmax(axis=-1),
        "difference": np.abs(own - reference).max(),
    }


def assert_same(scores: Scores | None, want: dict[str, Any]) -> None:
    assert scores is not None and scores.distance is not None
    found = scores.distance
    np.testing.assert_allclose(scores.loss, want["loss"], atol=ROUNDING)
    np.testing.assert_allclose(found.loss, want["reference"], atol=ROUNDING)
    np.testing.assert_allclose(found.divergence, want["divergence"], atol=ROUNDING)
    assert found.agree.tolist() == want["agree"].tolist()
    assert found.largest_difference == pytest.approx(want["difference"], abs=ROUNDING)
    values = scores.to_dict()
    assert values["tokens"] == len(want["loss"])
    assert values["perplexity"] == pytest.approx(np.exp(want["loss"].mean()), rel=ROUNDING)
    assert values["against_perplexity"] == pytest.approx(np.exp(want["reference"].mean()), rel=ROUNDING)
    for name, value in (
        ("kl_mean", want["divergence"].mean()),
        ("kl_median", np.median(want["divergence"])),
        ("kl_p99", np.quantile(want["divergence"], 0.99)),
        ("kl_max", want["divergence"].max()),
        ("top1_agreement", want["agree"].mean()),
    ):
        assert values[name] == pytest.approx(value, abs=ROUNDING)


def whole_logits(folder: Path, ids: list[int], window: int) -> np.ndarray:
    """(len(ids), V): a window at a time in one call each, behind <bos>."""
    model = g3.load_model(folder, dtype="float32")
    rows = []
    for begin in range(0, len(ids), window):
        rows.append(np.array(model(np.array([[2, *ids[begin : begin + window][:-1]]]))[0]))
    return np.concatenate(rows)


def test_a_model_against_itself_is_no_distance_away(text_folder: Path) -> None:
    found = evaluate(text_folder, text=TEXT, against=text_folder, dtype="float32")
    values = found.to_dict()["text"]
    assert values["kl_mean"] == values["kl_max"] == values["largest_logit_difference"] == 0
    assert values["top1_agreement"] == 1 and values["perplexity"] == values["against_perplexity"]


@pytest.mark.parametrize("window", [9, 40, 2048])
def test_scores_are_those_of_whole_logits(text_folder: Path, other_folder: Path, window: int) -> None:
    """Short windows, some that leave a rest, and one for all; control tokens' names are plain text."""
    ids = g3.Tokenizer.from_folder(text_folder).encode(TEXT, special=False)
    assert 106 not in ids and len(ids) % 40
    want = whole(np.array(ids), whole_logits(other_folder, ids, window), whole_logits(text_folder, ids, window))
    assert want["divergence"].mean() > 1e-3 and not want["agree"].all()
    found = evaluate(other_folder, text=TEXT, against=text_folder, window=window, dtype="float32")
    assert_same(found.words, want)
    assert found.window == min(window, 1024) and found.pictures is None

    alone = evaluate(other_folder, text=TEXT, window=window, dtype="float32")
    assert alone.words is not None and alone.words.distance is None
    np.testing.assert_allclose(alone.words.loss, want["loss"], atol=ROUNDING)


def test_heads_on_slices_and_texts_in_chunks_change_nothing(
    text_folder: Path, other_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [open_model(folder, dtype="float32") for folder in (other_folder, text_folder)]
    at_once = evaluate(models[0], text=TEXT, against=models[1]).words
    monkeypatch.setattr(module, "SLICE", 512 * 7)
    monkeypatch.setattr(module, "CHUNK", 24)
    sliced = evaluate(models[0], text=TEXT, against=models[1]).words
    assert at_once is not None and at_once.distance is not None and sliced is not None and sliced.distance is not None
    for one, other in (
        (sliced.loss, at_once.loss),
        (sliced.distance.loss, at_once.distance.loss),
        (sliced.distance.divergence, at_once.distance.divergence),
    ):
        np.testing.assert_allclose(one, other, atol=ROUNDING)
    assert sliced.distance.agree.tolist() == at_once.distance.agree.tolist()


def test_two_distributions_worked_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): KL(p || q) = log(2) / 4. Adding a constant changes no share."""
    p, q = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]]) + 7
    loss, reference, divergence, agree, difference = slice_scores(
        mx.array([1]), mx.array(q.astype(np.float32)), mx.array(p.astype(np.float32))
    )
    assert float(divergence.item()) == pytest.approx(np.log(2) / 4, abs=1e-6)
    assert (float(loss.item()), float(reference.item())) == pytest.approx((np.log(2), np.log(4)), abs=1e-6)
    assert not agree.item() and float(difference.item()) == pytest.approx(7 + np.log(2), abs=1e-5)


def test_the_divergence_of_large_vocabularies_keeps_its_precision() -> None:
    """As many ids as Gemma 3 has, logits spread as its are, a distance as small as that of 8 bits."""
    random = np.random.default_rng(0)
    reference = random.normal(0, 3, (2, 262208)).astype(np.float32)
    own = reference + random.normal(0, 0.01, reference.shape).astype(np.float32) + np.float32(2)
    want = whole(np.array([3, 5]), own, reference)["divergence"]
    found = np.array(slice_scores(mx.array([3, 5]), mx.array(own), mx.array(reference))[2])
    assert want.min() > 3e-5
    np.testing.assert_allclose(found, want, atol=5e-7)


def test_only_the_first_tokens_and_progress(text_folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    found = evaluate(
        text_folder,
        text=TEXT,
        max_tokens=50,
        window=20,
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    assert found.words is not None and found.words.tokens == 50
    assert seen[0] == (f"loading {text_folder}", 0, 0)
    assert [(done, total) for what, done, total in seen if what == "text"] == [(20, 50), (40, 50), (50, 50)]
    whole_text = evaluate(text_folder, text=TEXT, window=20).words
    assert whole_text is not None and np.allclose(whole_text.loss[:50], found.words.loss, atol=1e-4)


def test_pictures_count_their_words_and_the_references_answer(
    chat_folder: Path, other_chat: Path, picture: Path
) -> None:
    found = evaluate(other_chat, against=chat_folder, images=[picture, str(picture)], dtype="float32")
    assert found.words is None
    tokenizer = g3.Tokenizer.from_folder(chat_folder)
    model, other = (g3.load_model(folder, dtype="float32") for folder in (chat_folder, other_chat))
    content = [{"type": "image"}, {"type": "text", "text": module.QUESTION}]
    prompt = g3.Processor(tokenizer, model.config).prepare([{"role": "user", "content": content}], [picture])
    with g3.load(chat_folder, dtype="float32") as engine:
        answer = engine.generate(module.QUESTION, images=[picture], temperature=0, max_tokens=module.ANSWER_TOKENS)
    tokens = np.array([*prompt.tokens, *answer.tokens])
    own, reference = (np.array(each(tokens[None, :-1], prompt.pixels)[0]) for each in (other, model))
    words = (tokens[:-1] != 502) & (tokens[1:] != 502)
    assert words.sum() == len(tokens) - 1 - 5  # the 4 rows of the picture, and what comes before the first of them
    once = whole(tokens[1:][words], own[words], reference[words])
    twice = {name: np.concatenate([value, value]) if np.ndim(value) else value for name, value in once.items()}
    assert_same(found.pictures, twice)
    assert once["divergence"].mean() > 1e-3


def test_a_base_checkpoint_is_shown_pictures_too(chat_folder: Path, picture: Path) -> None:
    """Not told apart by its weights: the tiny chat model under the name of a base one."""
    opened = replace(open_model(chat_folder, text_only=False), instruct=False)
    found = evaluate(opened, text=TEXT, against=opened, images=[picture])
    assert found.pictures is not None and found.words is not None
    assert found.to_dict()["pictures"]["kl_max"] == 0
    opening = opened.tokenizer.encode(module.OPENING)
    assert found.pictures.tokens == 1 + 2 + 1 + len(opening) + len(module_answer(opened, picture)) - 1


def module_answer(opened: Opened, picture: Path) -> list[int]:
    with g3.load(opened.name) as engine:
        text = f"<start_of_image>{module.OPENING}"
        return engine.generate(text, images=[picture], raw=True, temperature=0, max_tokens=module.ANSWER_TOKENS).tokens


def write_vocabulary(folder: Path, pieces: list[str]) -> None:
    added = {piece for piece in pieces if piece in tiny_tokenizer.PLACES.values() or piece.startswith("<unused")}
    control = CONTROL_NAMES & set(pieces)
    vocabulary = Vocabulary("tests", tuple(pieces), frozenset(added), frozenset(control))
    (folder / "tokenizer.model").write_bytes(vocabulary.sentencepiece())


def test_different_vocabularies_are_refused(text_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "swapped"
    shutil.copytree(text_folder, folder)
    pieces = tiny_tokenizer.pieces()
    one, other = pieces.index("中"), pieces.index("文")
    pieces[one], pieces[other] = pieces[other], pieces[one]
    write_vocabulary(folder, pieces)
    with pytest.raises(TokenizerError, match=f"id {min(one, other)}"):
        evaluate(folder, text=TEXT, against=text_folder)


def test_control_tokens_at_the_end_of_one_vocabulary_are_no_difference(tmp_path: Path) -> None:
    """As <image_soft_token>, which GGUF files leave out: the ids that both have are compared."""
    pieces = [f"<unused{token}>" if token == 502 else piece for token, piece in enumerate(tiny_tokenizer.pieces())]
    tensors = tiny.random_tensors(tiny.text_config(vocab_size=513), seed=4)
    short = tiny.write_folder(
        tmp_path / "short",
        tiny.text_config(),
        tensors | {"language_model.embed_tokens.weight": tensors["language_model.embed_tokens.weight"][:512]},
        style="text",
    )
    long = tiny.write_folder(tmp_path / "long", tiny.text_config(vocab_size=513), tensors, style="text")
    write_vocabulary(short, pieces)
    write_vocabulary(long, [*pieces, "<image_soft_token>"])
    found = evaluate(long, text=TEXT, against=short).to_dict()["text"]
    assert found["kl_max"] < ROUNDING and found["perplexity"] == pytest.approx(found["against_perplexity"])

    write_vocabulary(long, [*pieces, "cat"])
    with pytest.raises(TokenizerError, match="'cat'"):
        evaluate(long, text=TEXT, against=short)


def test_what_cannot_be_measured_is_one_line(
    text_folder: Path, chat_folder: Path, picture: Path, tmp_path: Path
) -> None:
    (tmp_path / "latin.txt").write_bytes("gr\xfcn".encode("latin-1"))
    cases: list[tuple[type[Gemma3Error], str, Any]] = [
        (PromptError, "nothing", lambda: evaluate(text_folder, text="")),
        (PromptError, "tokens, want at least 16", lambda: evaluate(text_folder, text="the model")),
        (OptionError, "window", lambda: evaluate(text_folder, text=TEXT, window=0)),
        (OptionError, "max_tokens", lambda: evaluate(text_folder, text=TEXT, max_tokens=3)),
        (OptionError, "against", lambda: evaluate(chat_folder, images=[picture])),
        (OptionError, "a list", lambda: evaluate(chat_folder, against=chat_folder, images=str(picture))),
        (PromptError, "text-only", lambda: evaluate(chat_folder, against=text_folder, images=[picture])),
        (PromptError, "not UTF-8 at 2", lambda: read_text(tmp_path / "latin.txt")),
        (PromptError, "No such file", lambda: read_text(tmp_path / "none.txt")),
        (OptionError, "'float16'", lambda: evaluate(text_folder, text=TEXT, dtype="float16")),
    ]
    for kind, says, call in cases:
        with pytest.raises(kind) as caught:
            call()
        assert says in str(caught.value) and "\n" not in str(caught.value)


def some_evaluation() -> Evaluation:
    random = np.random.default_rng(1)
    divergence = random.lognormal(-5, 2, 300).astype(np.float32)
    divergence[0] = 0
    distance = Distance(divergence, divergence, divergence < 0.1, 3.0)
    scores = Scores(divergence, distance)
    return Evaluation(model="one", against="other", window=100, words=scores, pictures=scores)


def test_what_is_not_finite_is_null_in_json() -> None:
    loss = np.array([1, np.nan], dtype=np.float32)
    broken = Evaluation(model="one", against=None, window=8, words=Scores(loss, None), pictures=None)
    assert json.loads(json.dumps(broken.to_dict(), allow_nan=False))["text"]["perplexity"] is None
    assert "not finite" in broken.text()


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_plot_is_the_same_whenever_it_is_drawn(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    for path in (first, second):
        drawing.plot(some_evaluation(), path)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, second]
    if suffix == ".png":
        with Image.open(first) as image:
            assert image.width == 1500 and len(image.convert("L").histogram()) == 256
    else:
        assert "<svg" in first.read_text(encoding="utf-8")


def test_a_plot_that_cannot_be_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"\.png or \.svg"):
        drawing.plot(some_evaluation(), tmp_path / "plot.jpeg")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        patch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(OptionError, match=r"pip install 'mlx-gemma3\[plot\]'"):
            drawing.check_plot(tmp_path / "plot.png")
    pytest.importorskip("matplotlib")
    with pytest.raises(OutputError, match="no such folder"):
        drawing.plot(some_evaluation(), tmp_path / "nowhere" / "plot.png")
    alone = replace(some_evaluation(), words=None, pictures=None)
    with pytest.raises(OptionError, match="against"):
        drawing.plot(alone, tmp_path / "plot.png")


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, words)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)


def test_the_command_prints_a_table_or_json(
    text_folder: Path, chat_folder: Path, other_folder: Path, picture: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8-sig")  # what some editors put in front is not part of the text
    done = run(other_folder, "--text", text, "--against", text_folder, "--max-tokens", "64", "--json")
    want = evaluate(str(other_folder), text=TEXT, against=str(text_folder), max_tokens=64)
    assert (done.returncode, done.stderr, json.loads(done.stdout)) == (0, "", want.to_dict())
    done = run(other_folder, "--text", text, "--against", text_folder, "--max-tokens", "64")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", want.text() + "\n")
    assert "KL divergence, mean" in done.stdout and "perplexity of against" in done.stdout
    done = run(chat_folder, "--against", chat_folder, "-i", picture, "-i", picture, "--json")
    assert json.loads(done.stdout)["pictures"]["top1_agreement"] == 1 and json.loads(done.stdout)["text"] is None
    assert "KL" not in run(text_folder, "--text", text).stdout


def test_the_command_draws(text_folder: Path, other_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text, drawn = tmp_path / "text.txt", tmp_path / "plot.svg"
    text.write_text(TEXT, encoding="utf-8")
    done = run(other_folder, "--text", text, "--against", text_folder, "--plot", drawn)
    assert done.returncode == 0 and drawn.stat().st_size > 5000, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.svg", "text.txt"]


def test_bad_input_to_the_command_is_one_line(text_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        ((text_folder, "--text", tmp_path / "none.txt"), "none.txt"),
        ((text_folder,), "nothing"),
        (("./nowhere", "--text", text), "nowhere"),
        ((text_folder, "--text", text, "--against", "gemma-9"), "gemma-9"),
        ((text_folder, "--text", text, "--plot", "plot.png"), "--against"),
        ((text_folder, "--text", text, "--against", text_folder, "--plot", "plot.pdf"), ".svg"),
    ]
    for words, says in cases:
        done = run(*words)
        assert (done.returncode, done.stdout) == (1, ""), (words, done)
        assert done.stderr.startswith("mlx-gemma3: ") and done.stderr.count("\n") == 1 and says in done.stderr

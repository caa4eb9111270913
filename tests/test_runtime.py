"""The engine as a program uses it: streams, replies, stop strings, cancelling, errors as events."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny
import tiny_gguf
from endless import endless
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import mlx_gemma3 as g3
from mlx_gemma3.errors import CheckpointError, ClosedError, OptionError, PromptError, SourceNotFound
from mlx_gemma3.generation import batch
from mlx_gemma3.runtime.answer import StopStrings


@pytest.fixture(scope="module")
def engine(chat_folder: Path) -> Iterator[g3.Engine]:
    with g3.load(chat_folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def base(text_folder: Path) -> Iterator[g3.Engine]:
    with g3.load(text_folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.new("RGB", (80, 60), "red").save(path)
    return path


def reference(folder: Path, prompt: g3.Prompt, count: int) -> list[int]:
    """Greedy ids from the uncached model, up to and with an end id."""
    model, out = g3.load_model(folder, dtype="float32"), list[int]()
    while len(out) < count and not (out and out[-1] in model.config.eos_token_ids):
        logits = model([prompt.tokens + out], prompt.pixels, last_only=True)
        out.append(int(logits[0, 0].argmax().item()))  # type: ignore[arg-type]
    return out


def test_an_answer_is_the_models_greedy_answer_to_the_rendered_prompt(
    engine: g3.Engine, chat_folder: Path, picture: Path
) -> None:
    tokenizer = g3.Tokenizer.from_folder(chat_folder)
    config = g3.Config.from_file(chat_folder / "config.json")
    items = [{"type": "image"}, {"type": "text", "text": "the thing"}]
    prompt = g3.Processor(tokenizer, config).prepare([{"role": "user", "content": items}], [picture])
    assert tokenizer.id("<bos>") == 2 and prompt.tokens.count(2) == 1
    reply = engine.generate("the thing", images=[picture], max_tokens=12, temperature=0)
    assert reply.tokens == reference(chat_folder, prompt, 12)
    assert reply.text == tokenizer.decode(reply.tokens, skip_special=True)
    usage = reply.usage
    assert usage["prompt_tokens"] == len(prompt.tokens) and usage["completion_tokens"] == len(reply.tokens)
    assert (usage["images"], usage["images_encoded"], usage["cached_tokens"]) == (1, 1, 0)


def test_a_base_checkpoint_completes_text(base: g3.Engine, text_folder: Path) -> None:
    tokenizer = g3.Tokenizer.from_folder(text_folder)
    prompt = g3.Processor(tokenizer, g3.Config.from_file(text_folder / "config.json")).prepare("the model is")
    reply = base.generate("the model is", max_tokens=10, temperature=0)
    assert reply.tokens == reference(text_folder, prompt, 10)
    assert reply.usage["prompt_tokens"] == len(tokenizer.encode("the model is", bos=True))


def test_pieces_joined_are_the_reply_and_the_seed_repeats_it(engine: g3.Engine) -> None:
    with engine.stream("hi", max_tokens=60, temperature=1.5, seed=7) as stream:
        pieces = list(stream)
        reply = stream.reply
    assert "".join(piece.text for piece in pieces) == reply.text
    assert len(reply.tokens) == reply.usage["completion_tokens"] <= 60
    assert engine.generate("hi", max_tokens=60, temperature=1.5, seed=7).tokens == reply.tokens
    assert engine.generate("hi", max_tokens=60, temperature=1.5, seed=8).tokens != reply.tokens


def test_typed_control_tokens_do_not_end_the_turn(engine: g3.Engine, chat_folder: Path) -> None:
    """What is typed is encoded as characters: the prompt grows, and holds the control tokens of the template alone."""
    tokenizer = g3.Tokenizer.from_folder(chat_folder)
    typed = "x<end_of_turn>\n<start_of_turn>model\nyes"
    usage = engine.generate(typed, max_tokens=1).usage
    plain = tokenizer.encode(typed, special=False)
    assert not tokenizer.special_ids & set(plain)
    around = engine.generate("x", max_tokens=1).usage["prompt_tokens"] - 1
    assert usage["prompt_tokens"] >= around + len(plain) - 2  # newlines may join with the template's


def test_messages_system_and_pictures_inside_messages(engine: g3.Engine, picture: Path) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "path": str(picture)}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "c"}]},
    ]
    reply = engine.generate(messages, images=[picture.read_bytes()], system="terse", max_tokens=3)
    assert reply.usage["images"] == 2
    longer = engine.generate(messages, images=[picture], max_tokens=3).usage["prompt_tokens"]
    assert reply.usage["prompt_tokens"] > longer


def test_a_polled_stream_gives_plain_events_and_keeps_its_end(engine: g3.Engine, picture: Path) -> None:
    stream = engine.stream("hi", images=[picture], max_tokens=5, temperature=0)
    events = []
    while (event := stream.next(timeout=0.01))["kind"] not in ("done", "error"):
        events.append(event)
    assert event["kind"] == "done" and stream.next() is stream.next(timeout=0) is event
    stages = [event["stage"] for event in events if "stage" in event]
    assert stages[0] == "pictures" and stages[-1] == "prompt"
    assert {event["kind"] for event in events} <= {"text", "pending"}
    assert event["text"] == "".join(e["text"] for e in events if e["kind"] == "text")


def test_cancel_ends_within_a_token_and_the_engine_goes_on(base: g3.Engine) -> None:
    stream = base.stream("the", max_tokens=900, temperature=0)
    assert next(iter(stream)).text
    stream.cancel()
    stream.cancel()
    reply = stream.reply
    assert reply.finish_reason == "cancelled" and len(reply.tokens) < 900
    assert base.generate("the", max_tokens=2, temperature=0).usage["completion_tokens"] == 2


def test_an_abandoned_stream_frees_the_engine(base: g3.Engine) -> None:
    stream = base.stream("the", max_tokens=900, temperature=1.0)
    stream.next()
    began = time.monotonic()
    del stream
    base.generate("the", max_tokens=1)
    assert time.monotonic() - began < 5


def test_requests_from_many_threads_are_all_served(engine: g3.Engine) -> None:
    replies: dict[int, g3.Reply] = {}

    def ask(number: int) -> None:
        replies[number] = engine.generate("hi", max_tokens=4, temperature=0)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(replies) == 8 and len({tuple(reply.tokens) for reply in replies.values()}) == 1


def test_errors_during_generation_are_events_and_the_engine_lives_on(engine: g3.Engine, tmp_path: Path) -> None:
    stream = engine.stream("hi", images=[tmp_path / "none.png"])
    while (event := stream.next())["kind"] == "pending":
        pass
    assert event["kind"] == "error" and event["code"] == "image" and "none.png" in event["message"]
    with pytest.raises(g3.Gemma3Error, match=r"none\.png"):
        list(stream)
    assert engine.generate("hi", max_tokens=1).tokens


def test_what_does_not_fit_is_refused(base: g3.Engine, engine: g3.Engine, picture: Path) -> None:
    with pytest.raises(PromptError, match="text-only"):
        base.generate("<start_of_image>", images=[picture])
    with pytest.raises(PromptError) as caught:
        base.generate("the " * 2000)
    assert caught.value.code == "context"
    with pytest.raises(OptionError, match="system"):
        base.generate("the", system="terse")
    with pytest.raises(PromptError, match="messages"):
        engine.generate([{"role": "user", "content": "a"}], raw=True)
    for wrong in ({"temperature": -1}, {"max_tokens": 0}, {"stop": [""]}, {"warmth": 1}, {"top_k": "many"}):
        with pytest.raises(OptionError):
            engine.stream("hi", **wrong)  # type: ignore[arg-type]


def test_a_source_that_is_not_there_raises_where_it_was_asked_for() -> None:
    with pytest.raises(SourceNotFound):
        g3.load("gemma-9")


def test_a_closed_engine_refuses(text_folder: Path) -> None:
    engine = g3.load(text_folder)
    stream = engine.stream("the", max_tokens=900)
    engine.close()
    engine.close()
    assert stream.reply.finish_reason == "cancelled"
    with pytest.raises(ClosedError):
        engine.stream("the")


@pytest.mark.parametrize(
    "ending", ["", "engine.close()", "stream = engine.stream('the', max_tokens=500); stream.next()"]
)
def test_the_interpreter_ends_cleanly_however_it_ends(text_folder: Path, ending: str) -> None:
    load = f"import mlx_gemma3 as g3; engine = g3.load({str(text_folder)!r})"
    code = f"{load}\nengine.generate('the', max_tokens=2)\n{ending}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_generation_settings_of_the_checkpoint_are_the_defaults() -> None:
    from mlx_gemma3.runtime.options import Options

    saved = {"temperature": 0.5, "top_k": 7, "do_sample": True}
    assert Options().sampling(saved).top_k == 7 and Options().sampling(saved).temperature == 0.5
    assert Options(top_k=3).sampling(saved).top_k == 3
    assert Options().sampling({}).top_k == 64 and Options().sampling({}).top_p == 0.95
    assert Options().sampling({"do_sample": False}).temperature == 0
    assert Options(temperature=1.0).sampling({"do_sample": False}).temperature == 1


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_stop_strings_cut_where_the_whole_text_would_be_cut(text: str, stops: list[str], size: int) -> None:
    stopper, out = StopStrings(stops), ""
    for at in range(0, len(text), size):
        out += stopper.push(text[at : at + size])
    out += stopper.finish()
    # Cut at the first stop string to be complete; of those complete at once, at the one that begins first.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if not ends:
        assert (out, stopper.found) == (text, None)
    else:
        assert stopper.found in stops and stopper.found in text and text.startswith(out)
        if size == 1:
            first = min(end for end, _ in ends)
            assert out == text[: min(start for end, start in ends if end == first)]


def test_stop_strings_end_an_answer_across_token_borders(base: g3.Engine) -> None:
    for seed in range(20):
        whole = base.generate("the", max_tokens=60, temperature=1.5, seed=seed)
        if whole.finish_reason == "length" and whole.text[20:24].strip():
            break
    stop = whole.text[20:24]
    reply = base.generate("the", max_tokens=60, temperature=1.5, seed=seed, stop=["\0", stop])
    assert reply.text == whole.text[: whole.text.find(stop)] and reply.finish_reason == "stop"
    assert len(reply.tokens) < 60 and reply.tokens == whole.tokens[: len(reply.tokens)]


Says = Callable[[list[int]], None]


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Says:
    """Make every model write these ids, and then zeros."""
    read = batch._read

    def says(ids: list[int]) -> None:
        count: dict[batch.Row, int] = {}

        def instead(row: batch.Row, *given: Any) -> list[batch.Written]:
            at = count[row] = count.get(row, -1) + 1
            (written,) = read(row, *given)
            written = replace(written, token=ids[at] if at < len(ids) else 0)
            row._last = written.token
            return [written]

        monkeypatch.setattr(batch, "_read", instead)

    return says


def ids_of(folder: Path, text: str) -> list[int]:
    return g3.Tokenizer.from_folder(folder).encode(text)


def test_end_of_turn_ends_an_answer_of_a_chat_whatever_the_settings_say(
    chat_folder: Path, tmp_path: Path, says: Says
) -> None:
    folder = tmp_path / "saved-by-transformers-5"
    shutil.copytree(chat_folder, folder)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["eos_token_id"] = config["text_config"]["eos_token_id"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with g3.load(folder) as engine:
        says(ids_of(folder, "the model<end_of_turn>is"))
        session = engine.session()
        for reply in (
            engine.generate("hi", max_tokens=20),
            engine.generate([{"role": "user", "content": "hi"}], max_tokens=20),
            session.send("hi", max_tokens=20).reply,
        ):
            assert (reply.text, reply.finish_reason) == ("the model", "stop")
        raw = engine.generate("hi", raw=True, max_tokens=20)
        assert raw.text == "the modelis" and raw.finish_reason == "length"
        assert session.messages[-1]["content"] == "the model"


@pytest.mark.parametrize(
    ("said", "stop", "text"),
    [
        ("the model<end_of_turn>is", "<end_of_turn>", "the model"),
        ("the model<start_of_image>is", "<start_of_image>", "the model"),
        ("the model<start_of_turn>\nis", "<start_of_turn>\n", "the model"),
        ("the model<start_of_turn>user", ["is", "<start_of_turn>user"], "the model"),
        ("the<unk>model<start_of_turn>is", ["model<start_of_turn>"], "the"),
        ("the <start_of_turn>model is", ["<start_of_turn>user", "is"], "the model "),
    ],
)
def test_control_tokens_in_stop_strings(
    text_folder: Path, tmp_path: Path, says: Says, said: str, stop: str, text: str
) -> None:
    folder = endless(text_folder, tmp_path)
    says(ids_of(folder, said))
    with g3.load(folder) as engine:
        reply = engine.generate("the", stop=stop, max_tokens=30)
    assert (reply.text, reply.finish_reason) == (text, "stop")


def test_a_stop_string_is_found_in_characters_and_after_bytes_too(
    base: g3.Engine, text_folder: Path, says: Says
) -> None:
    tokenizer = g3.Tokenizer.from_folder(text_folder)
    typed = tokenizer.encode("the <end_of_turn> is", special=False)
    says(typed)
    assert base.generate("the", stop="<end_of_turn>", max_tokens=60).text == "the "
    bytes_of = [tokenizer.id(f"<0x{byte:02X}>") for byte in "ž".encode()]
    says([*bytes_of, tokenizer.id("<start_of_image>"), *typed])
    assert base.generate("the", stop="<start_of_image>", max_tokens=60).text == "ž"


def with_number(folder: Path, name: str, target: Path, number: float) -> Path:
    """A copy with this number in a tensor."""
    shutil.copytree(folder, target)
    weights = dict(mx.load(str(target / "model.safetensors")).items())  # type: ignore[union-attr]
    weights[name][..., 0] = number
    mx.save_safetensors(str(target / "model.safetensors"), weights, metadata={"format": "mlx"})
    return target


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", ["layers.3.mlp.down_proj", "norm", "layers.7.self_attn.q_norm"])
def test_weights_that_are_not_finite_are_named(layer: str, number: float, chat_folder: Path, tmp_path: Path) -> None:
    folder = with_number(chat_folder, f"language_model.model.{layer}.weight", tmp_path / "broken", number)
    wanted = rf"language_model\.{layer}\.weight: got NaN or infinity"
    with g3.load(folder) as engine:
        for _ in range(2):
            with pytest.raises(CheckpointError, match=wanted):
                engine.generate("hi", max_tokens=3)
        with pytest.raises(CheckpointError, match=wanted):
            _ = engine.session().send("hi", max_tokens=3).reply
    for options in ({"bits": 4, "group_size": 32}, {"dequantize": True}):
        with pytest.raises(CheckpointError, match=wanted):
            g3.convert(folder, tmp_path / "out", **options)  # type: ignore[arg-type]
        assert list(tmp_path.iterdir()) == [folder]


def test_a_gguf_file_that_is_not_finite_is_named(tmp_path: Path) -> None:
    tensors = tiny.random_tensors(tiny.text_config())
    tensors["language_model.layers.2.input_layernorm.weight"][3] = float("nan")
    path = tiny_gguf.write_gguf(tmp_path / "broken.gguf", tiny.text_config(), tensors)
    with pytest.raises(CheckpointError, match=r"layers\.2\.input_layernorm\.weight: got NaN"):
        g3.convert(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]

"""Adapters while an engine runs: several on one set of weights, in one step, and nothing of one in another's answer."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_adapter
from places import PICTURES
from random_model import random_model, tiny_config
from test_fused import kernels_of, packed

import mlx_gemma3
from mlx_gemma3 import Engine
from mlx_gemma3.errors import Gemma3Error, OptionError, SessionError
from mlx_gemma3.model.adapter import Adapter, LowRank, attach, numbers_of
from mlx_gemma3.model.adapter_terms import MIXES
from mlx_gemma3.model.gemma3 import Gemma3
from mlx_gemma3.model.runner import Runner

CONFIG = tiny.image_config()
HEART = str(PICTURES / "heart.png")
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 10}
LAYERS = [f"language_model.layers.{layer}." for layer in range(8)]


def random_adapter(model: Gemma3, modules: list[str], rank: int, *, seed: int, dora: bool = False) -> Adapter:
    random, found = np.random.default_rng(seed), {}
    of_model = dict(model.named_modules())
    for path in modules:
        out, width = numbers_of(of_model[path]).shape
        a, b = random.normal(size=(rank, width)) / width**0.5, random.normal(size=(out, rank)) / 2
        m = mx.array(random.uniform(0.5, 2, out).astype(np.float32)) if dora else None
        found[path] = LowRank(mx.array(a.astype(np.float32)), mx.array(b.astype(np.float32)), m)
    return found


def adapters_of(model: Gemma3) -> dict[str | None, Adapter]:
    """Of all matrices; of some, by DoRA, of another rank; of a single layer, that no other changes."""
    every = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    all_of = [layer + part for layer in LAYERS[:7] for part in every]
    some = [layer + part for layer in LAYERS[::3] for part in ("self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")]
    return {
        "all": random_adapter(model, all_of, 3, seed=1),
        "some": random_adapter(model, some, 2, seed=2, dora=True),
        "one": random_adapter(model, [LAYERS[7] + "mlp.down_proj"], 5, seed=3),
    }


@pytest.mark.parametrize("form", ["gpu", "compiled", "cpu", "unpacked"])
@pytest.mark.parametrize("kind", ["plain", "four bits", "mixed", "mxfp4"])
def test_sequences_of_one_step_have_each_its_own_adapter(kind: str, form: str) -> None:
    ids = np.random.default_rng(1).integers(0, 50, (6, 20))
    runner = Runner(packed(kind), kernels_of(form))
    adapters = adapters_of(runner.model)
    for name, adapter in adapters.items():
        assert name is not None
        runner.add_adapter(name, adapter)
    names = ["all", None, "some", "one", "all", None]
    want = {}
    for name in dict.fromkeys(names):
        model = packed(kind)
        if name is not None:
            attach(model, adapters[name])
        want[name] = np.array(model(ids))
    rows = [runner.make_caches(adapter=name) for name in names]
    for row, (name, caches) in enumerate(zip(names, rows, strict=True)):
        got = runner.head(runner.read(ids[row : row + 1, :11], None, caches))
        assert np.abs(np.array(got)[0] - want[name][row, :11]).max() < 1e-4
    for at in range(11, 20):  # all, then those without, then some of them
        chosen = [[0, 1, 2, 3, 4, 5], [1, 5], [0, 4], [3, 2]][at % 4]
        got = np.array(runner.step(mx.array(ids[chosen, at]), [rows[row] for row in chosen]))
        rest = [row for row in range(6) if row not in chosen]
        for one, row in zip(got, chosen, strict=True):
            assert np.abs(one - want[names[row]][row, at]).max() < 1e-4, (at, row)
        if rest:
            runner.step(mx.array(ids[rest, at]), [rows[row] for row in rest])
    assert np.abs(want["all"] - want[None]).max() > 0.1 and np.abs(want["one"] - want[None]).max() > 0.1


def test_what_another_sequence_computes_is_left_out_exactly() -> None:
    """Not multiplied by 0: another's infinity would be NaN then."""
    runner = Runner(random_model(tiny_config(vision=False)), kernels_of("gpu"))
    path = LAYERS[2] + "mlp.down_proj"
    shape = numbers_of(dict(runner.model.named_modules())[path]).shape
    wild = LowRank(mx.full((1, shape[1]), 1e38), mx.full((shape[0], 1), 1e38))
    runner.add_adapter("wild", {path: wild})
    rows = [runner.make_caches(adapter="wild"), runner.make_caches(), runner.make_caches()]
    for caches in rows:
        runner.read([[2, 3, 4]], None, caches)
    both = np.array(runner.step(mx.array([5, 5]), rows[:2]))
    alone = np.array(runner.step(mx.array([5]), rows[2:]))
    assert not np.isfinite(both[0]).all()
    assert np.abs(both[1] - alone[0]).max() < 1e-5


def test_arrays_side_by_side_are_kept_for_a_few_sets_of_adapters() -> None:
    runner = Runner(random_model(tiny_config(vision=False)), kernels_of("cpu"))
    for number in range(6):
        runner.add_adapter(f"{number}", random_adapter(runner.model, [LAYERS[0] + "mlp.up_proj"], 1, seed=number))
    terms = runner._adapters
    assert terms is not None and terms.of([None, None]) is None
    first = terms.of(["0", None])
    assert first is not None and first.slots is not None and first.slots.flatten().tolist() == [1, 0]
    alone = terms.of(["0", "0"])
    assert alone is not None and alone.slots is None and alone.layers is first.layers
    for number in range(1, 6):
        mixed = terms.of([f"{number}", "0", f"{number}"])
        assert mixed is not None and mixed.slots is not None and mixed.slots.flatten().tolist() == [2, 1, 2]
        assert len(terms._mixes) <= MIXES


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, two adapters, and each of the two melted into the base's weights: another way to the same answers."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {"base": tiny_adapter.write_base(folder / "base", CONFIG)}
    plans: dict[str, dict[str, Any]] = {
        "words": {"modules": ["q_proj", "v_proj", "down_proj"], "seed": 5},
        "sight": {"modules": ["q_proj", "fc1", "up_proj"], "vision": True, "dora": True, "seed": 6},
    }
    for name, plan in plans.items():
        found[name] = tiny_adapter.write(folder / name, CONFIG, **plan, form="mlx-lm" if name == "sight" else "PEFT")
        melted = tiny_adapter.melted(tiny.random_tensors(CONFIG, seed=4), tiny_adapter.update(CONFIG, **plan))
        found[f"melted {name}"] = shutil.copytree(found["base"], folder / f"melted {name}")
        (found[f"melted {name}"] / "model.safetensors").unlink()
        tiny.write_folder(found[f"melted {name}"], CONFIG, melted)
    return found


@pytest.fixture(scope="module")
def engine(places: dict[str, Path]) -> Any:
    adapters = {"words": places["words"], "sight": str(places["sight"])}
    with mlx_gemma3.load(places["base"], adapters=adapters) as made:
        yield made


@pytest.fixture(scope="module")
def want(places: dict[str, Path]) -> dict[str | None, list[list[int]]]:
    """Greedy answers of each model alone, in an engine of its own."""
    answers = {}
    for name in (None, "words", "sight"):
        with mlx_gemma3.load(places["base" if name is None else f"melted {name}"]) as alone:
            answers[name] = [
                alone.generate("Hello there", **GREEDY).tokens,
                alone.generate("What is this?", images=[HEART], **GREEDY).tokens,
            ]
    return answers


def test_each_answer_of_a_mixed_engine_is_that_of_the_melted_model(engine: Engine, want: dict[Any, Any]) -> None:
    """Eight at once: words and pictures, with one adapter, the other, and none."""
    asked = [(name, image) for name in (None, "words", "sight", "words") for image in (False, True)]
    streams = [
        engine.stream("What is this?" if image else "Hello there", images=[HEART] * image, adapter=name, **GREEDY)
        for name, image in asked
    ]
    for (name, image), stream in zip(asked, streams, strict=True):
        assert stream.reply.tokens == want[name][image], (name, image)
    assert len({str(answers) for answers in want.values()}) == 3
    assert engine.about["adapters"] == ["words", "sight"]


def test_nothing_that_was_read_with_one_serves_another(places: dict[str, Path]) -> None:
    """The same prompt and picture, again and again: what is reused was read with the same adapter; the tower is asked
    again only by the adapter that changes it.
    """
    adapters = {"words": places["words"], "again": places["words"], "sight": places["sight"]}
    seen = {}
    with mlx_gemma3.load(places["base"], adapters=adapters) as made:
        for turn in range(2):
            for name in (None, "words", "sight", "again"):
                reply = made.generate("What is this?", images=[HEART], adapter=name, **GREEDY)
                usage = reply.usage
                seen[turn, name] = usage["cached_tokens"] > 0, usage["images_encoded"]
    assert {key: value for key, value in seen.items() if key[0] == 0} == {
        (0, None): (False, 1),
        (0, "words"): (False, 0),  # its tower is the base's
        (0, "sight"): (False, 1),
        (0, "again"): (True, 0),  # the same files under another name
    }
    assert all(seen[1, name] == (True, 0) for name in adapters)


def test_several_answers_to_one_prompt_and_prompt_logprobs(engine: Engine, want: dict[Any, Any]) -> None:
    replies = engine.generate("Hello there", n=3, adapter="words", **GREEDY)
    assert [reply.tokens for reply in replies] == [want["words"][0]] * 3
    scored = engine.stream("Hello there", adapter="words", prompt_logprobs=0, **GREEDY).reply
    plain = engine.stream("Hello there", prompt_logprobs=0, **GREEDY).reply
    assert scored.tokens == want["words"][0] and plain.tokens == want[None][0]


def test_a_session_has_its_adapter_for_good(engine: Engine, places: dict[str, Path], tmp_path: Path) -> None:
    talk = engine.session(adapter="sight", system="Be brief.")
    talk.send("What is this?", images=[HEART], **GREEDY).reply
    file = tmp_path / "talk"
    talk.save(file)
    goes_on = talk.send("And now?", **GREEDY).reply.tokens
    with mlx_gemma3.load(places["melted sight"]) as alone:
        same = alone.session(system="Be brief.")
        same.send("What is this?", images=[HEART], **GREEDY).reply
        assert same.send("And now?", **GREEDY).reply.tokens == goes_on
    for adapter in (None, "sight"):
        resumed = engine.session(resume=file, adapter=adapter)
        assert resumed.send("And now?", **GREEDY).reply.tokens == goes_on
    with pytest.raises(SessionError, match="a conversation with the adapter sight, want one with words"):
        engine.session(resume=file, adapter="words")
    with pytest.raises(OptionError, match="adapter: got one for a turn, want none: it belongs to the session"):
        talk.send("x", adapter="words").reply
    plain = engine.session()
    plain.send("Hello", **GREEDY).reply
    plain.save(tmp_path / "plain")
    assert "adapter" not in json.dumps(_settings(tmp_path / "plain"))
    with pytest.raises(SessionError, match="a conversation with no adapter, want one with words"):
        engine.session(resume=tmp_path / "plain", adapter="words")
    with (
        mlx_gemma3.load(places["base"], adapters={"sight": places["words"]}) as other,
        pytest.raises(
            SessionError, match="an adapter that is not loaded, want that adapter, as it was then; load the model"
        ),
    ):
        other.session(resume=file)


def _settings(file: Path) -> Any:
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return json.loads(header["__metadata__"]["state"])["settings"]


def test_wrong_names_are_one_sentence(engine: Engine, places: dict[str, Path]) -> None:
    asks = (engine.generate, engine.count_tokens)
    for ask in (*(partial(one, "x", adapter="receipts") for one in asks), partial(engine.session, adapter="receipts")):
        with pytest.raises(OptionError, match="adapter: got 'receipts', want words, sight"):
            ask()
    with pytest.raises(OptionError, match=r"adapters: got .* want a path for each name"):
        mlx_gemma3.load(places["base"], adapters={"two words": places["words"]})
    with pytest.raises(OptionError, match=r"adapters: got .* want a path for each name"):
        mlx_gemma3.load(places["base"], adapters=[places["words"]])  # type: ignore[arg-type]
    with (
        mlx_gemma3.load(places["base"]) as bare,
        pytest.raises(OptionError, match="want none: the model was loaded without adapters; load it with adapters="),
    ):
        bare.generate("x", adapter="words")
    with pytest.raises(Gemma3Error, match=r"adapter .*nowhere: got no such folder"):
        mlx_gemma3.load(places["base"], adapters={"words": places["base"].parent / "nowhere"})


def test_without_its_tower_an_adapter_of_pictures_still_writes(places: dict[str, Path]) -> None:
    with mlx_gemma3.load(places["base"], adapters={"sight": places["sight"]}, text_only=True) as words:
        reply = words.generate("Hello there", adapter="sight", **GREEDY)
    with mlx_gemma3.load(places["melted sight"]) as alone:
        assert alone.generate("Hello there", **GREEDY).tokens == reply.tokens


def test_a_prompt_on_disk_serves_its_own_adapter_alone(places: dict[str, Path], tmp_path: Path) -> None:
    prompt = "word " * 150
    adapters = {"words": places["words"], "sight": places["sight"]}
    with mlx_gemma3.load(places["base"], adapters=adapters, prompt_cache=tmp_path / "kept") as made:
        first = made.generate(prompt, adapter="words", **GREEDY)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    renamed = {"other": places["sight"], "same": places["words"]}
    with mlx_gemma3.load(places["base"], adapters=renamed, prompt_cache=tmp_path / "kept") as made:
        replies = {name: made.generate(prompt, adapter=name, **GREEDY) for name in (None, "other", "same")}
    assert {name: reply.usage["cached_tokens"] > 256 for name, reply in replies.items()} == {
        None: False,
        "other": False,
        "same": True,
    }
    assert replies["same"].tokens == first.tokens != replies[None].tokens
    assert len(list((tmp_path / "kept").iterdir())) == 3
    with mlx_gemma3.load(places["base"], prompt_cache=tmp_path / "kept") as bare:
        assert bare.generate(prompt, **GREEDY).tokens == replies[None].tokens
        assert bare.about["notes"] == []

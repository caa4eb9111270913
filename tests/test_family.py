"""The family on tiny checkpoints: it calls, translates, thinks, classifies; and fine-tunes have words of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tiny
import tiny_family
import tiny_tokenizer
from PIL import Image

import mlx_gemma3 as g3
from convert.tokenizer_files import tokenizer_json
from mlx_gemma3.errors import CheckpointError, Gemma3Error, OptionError, PromptError
from mlx_gemma3.grammar import functions
from mlx_gemma3.grammar.matcher import Grammar
from mlx_gemma3.grammar.tools import read
from mlx_gemma3.prompt.vocabulary import CONTROL_NAMES, Vocabulary
from mlx_gemma3.runtime.answer import Answer

COMMAND = [sys.executable, "-W", "error", "-m", "mlx_gemma3.cli"]
GOLDENS = Path(__file__).parent / "goldens" / "family"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    for kind in tiny_family.KINDS:
        tiny_family.write(folder / kind, kind)
    return folder


@pytest.fixture(scope="module")
def caller(family: Path) -> Iterator[g3.Engine]:
    with g3.load(family / "functiongemma", dtype="float32") as engine:
        yield engine


def set_lamp(room: Literal["hall", "den"], on: bool, level: int = 1) -> str:
    """Switches a lamp.

    Args:
        room: Which.
        on: Whether.
        level: How bright.
    """
    return f"{room} {on} {level}"


# --- FunctionGemma


@pytest.mark.parametrize("seed", range(4))
def test_a_call_always_parses(caller: g3.Engine, seed: int) -> None:
    stream = caller.stream(
        "Lamp!", tools=[set_lamp], tool_choice="required", temperature=1.0, seed=seed, max_tokens=200
    )
    events = []
    while (event := stream.next())["kind"] not in ("done", "error"):
        events.append(event)
    reply = stream.reply
    assert reply.finish_reason == "tool_calls" and reply.text == "", event
    for call in reply.tool_calls:
        assert call["name"] == "set_lamp" and {"room", "on"} <= call["arguments"].keys() <= {"room", "on", "level"}
        assert call["arguments"]["room"] in ("hall", "den") and type(call["arguments"]["on"]) is bool
    told = [event for event in events if event["kind"] == "tool_call"]
    assert [json.loads(event["arguments"]) for event in told if event["arguments"]] == [
        call["arguments"] for call in reply.tool_calls
    ]
    raw = caller.tokenizer.decode(reply.tokens)
    parsed, _, wrong = g3.parse_tool_calls(raw, form="functiongemma")
    assert [one["arguments"] for one in parsed] == [call["arguments"] for call in reply.tool_calls] and not wrong


def test_one_call_words_or_the_named_one(caller: g3.Engine) -> None:
    def other() -> str:
        """Another."""
        return ""

    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 100}
    for seed in range(3):
        reply = caller.generate("a", tools=[set_lamp, other], tool_choice="other", seed=seed, **options)
        assert {call["name"] for call in reply.tool_calls} == {"other"}
        one = caller.generate(
            "a", tools=[other], tool_choice="required", parallel_tool_calls=False, seed=seed, **options
        )
        assert len(one.tool_calls) == 1
        free = caller.generate("a", tools=[other], seed=seed, temperature=1.0, max_tokens=8)
        assert free.tool_calls or free.text
    assert caller.generate("a", tools=[other], tool_choice="none", max_tokens=4).tool_calls == []


def test_tools_reach_the_template_and_a_developer_says_so(caller: g3.Engine, family: Path) -> None:
    template = g3.ChatTemplate.from_folder(family / "functiongemma")
    tool = {"type": "function", "function": read([set_lamp])[0].declaration}
    said = {"role": "developer", "content": "You are a model that can do function calling with the following functions"}
    asked = {"role": "user", "content": "Lamp!"}
    wanted = len(caller.tokenizer.encode(template.render([said, asked], tools=[tool])))
    assert caller.count_tokens("Lamp!", tools=[set_lamp]) == wanted
    own = {"role": "system", "content": "Be kind."}
    wanted = len(caller.tokenizer.encode(template.render([own, asked], tools=[tool])))
    assert caller.count_tokens([own, asked], tools=[set_lamp]) == wanted


def test_a_conversation_with_calls_and_what_they_found(caller: g3.Engine, family: Path) -> None:
    session = caller.session()
    options: dict[str, Any] = {"tools": [set_lamp], "temperature": 1.0, "max_tokens": 200}
    reply = session.send("Lamp!", tool_choice="required", parallel_tool_calls=False, seed=1, **options).reply
    (call,) = reply.tool_calls
    found = {"role": "tool", "tool_call_id": call["id"], "content": "done"}
    session.send([found], tool_choice="none", seed=1, max_tokens=3, tools=[set_lamp]).reply
    called = {"id": call["id"], "function": {"name": "set_lamp", "arguments": json.dumps(call["arguments"])}}
    whole = [
        {"role": "user", "content": "Lamp!"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        found,
    ]
    session.undo()
    assert session.messages[-1] == {"role": "assistant", "content": ""}
    before = session.send([found], tool_choice="none", max_tokens=1, tools=[set_lamp]).reply.usage["prompt_tokens"]
    assert before == caller.count_tokens(whole, tool_choice="none", tools=[set_lamp])
    rendered = g3.ChatTemplate.from_folder(family / "functiongemma").render(
        [whole[0], {**whole[1], "tool_calls": [{"function": {**call}}]}, {**found, "name": "set_lamp"}]
    )
    assert before == len(caller.tokenizer.encode(rendered)) and "response:set_lamp{value:<escape>done" in rendered


def test_functions_are_run(caller: g3.Engine) -> None:
    ran: list[str] = []
    caller.run(
        "Lamp!", tools=[set_lamp], tool_choice="required", limit=2, max_tokens=100, seed=1, temperature=1.0,
        asks=lambda name, _: not ran.append(name),
    )  # fmt: skip
    assert set(ran) == {"set_lamp"}


def test_the_grammar_follows_schemas(caller: g3.Engine) -> None:
    words = caller.tokenizer
    schema = {
        "type": "object",
        "properties": {
            "b": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "A": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
            "odd key": {"const": "x"},
            "any": {},
        },
        "required": ["A"],
        "$defs": {"tree": {"type": "object", "properties": {"of": {"$ref": "#/$defs/tree"}}}},
    }
    text = functions.lark(read([{"name": "f", "parameters": schema}]), words, choice="required", parallel=True)
    controls = frozenset(words.id(name) for name in ("<start_function_call>", "<end_function_call>", "<escape>"))
    grammar = Grammar(words, text, "tools", controls)

    def fits(inside: str) -> bool:
        matcher = grammar.start([1])
        for token in words.encode(f"<start_function_call>call:f{inside}<end_function_call>"):
            allowed = np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")
            if not allowed[token]:
                return False
            matcher.accept(token)
        return matcher.whole

    assert fits("{A:[]}") and fits("{A:[{of:{of:{}}},{}],any:{k:[1,true,<escape>t<escape>]},b:null}")
    assert fits("{A:[],b:-12,odd key:<escape>x<escape>}")
    for wrong in (
        "{}",
        "{b:1}",
        "{A:[],b:true}",
        "{A:[],odd key:<escape>y<escape>}",
        "{A:[1]}",
        "{b:1,A:[]}",
        "{A:[],}",
    ):
        assert not fits(wrong), wrong


# --- TranslateGemma


def test_languages(family: Path, tmp_path: Path) -> None:
    template = g3.ChatTemplate.from_folder(family / "translategemma")

    def prompt(*messages: Any) -> int:
        return len(engine.tokenizer.encode(template.render(list(messages))))

    def turn(text: str, source: str = "de", target: str = "en") -> dict[str, Any]:
        item = {"type": "text", "source_lang_code": source, "target_lang_code": target, "text": text}
        return {"role": "user", "content": [item]}

    with g3.load(family / "translategemma", dtype="float32") as engine:
        both = {"source_lang": "de", "target_lang": "en"}
        assert engine.about["translates"] and engine.about["own_template"]
        assert engine.count_tokens("der user", **both) == prompt(turn("der user"))
        assert engine.count_tokens([turn("x", "cs", "pt_BR")], **both) == prompt(turn("x", "cs", "pt_BR"))
        for wrong, told in (
            ({"source_lang": "de", "target_lang": "en_US"}, "the nearest are en"),
            ({"source_lang": "DE", "target_lang": "en"}, "the nearest are de"),
            ({"source_lang": "de"}, "--to"),
            ({**both, "system": "s"}, "system: got a text"),
            ({**both, "tools": [set_lamp]}, "TranslateGemma calls nothing"),
        ):
            with pytest.raises(OptionError, match=told):
                engine.count_tokens("x", **wrong)
        picture = tmp_path / "sign.png"
        Image.new("RGB", (8, 8), "red").save(picture)
        seen = engine.generate("", images=[picture], max_tokens=2, **both).usage
        assert seen["images"] == 1
        with pytest.raises(PromptError, match="got 2 items"):
            engine.generate("words", images=[picture], max_tokens=2, **both)
        session = engine.session()
        first = session.send("eins", max_tokens=2, **both).reply
        session.send("", images=[picture], max_tokens=2, source_lang="cs", target_lang="en").reply
        third = session.send("drei", max_tokens=2, **both).reply.usage
        assert third["images"] == 1 and third["cached_tokens"] > first.usage["prompt_tokens"]
        session.save(tmp_path / "talk")
        with pytest.raises(PromptError, match="pictures of a saved one"):
            engine.session(resume=tmp_path / "talk").send("vier", max_tokens=2, **both).reply
    asked = [*COMMAND, "generate", "-m", str(family / "translategemma"), "--from", "de", "--max-tokens", "2"]
    done = subprocess.run([*asked, "--to", "en", "hallo"], input="", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout, done.stderr
    lines = "hallo\n/set to fr\nwelt\n"
    chat = [*COMMAND, "chat", *asked[len(COMMAND) + 1 :], "--to", "en"]
    done = subprocess.run(chat, input=lines, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "target_lang  fr" in done.stderr, done.stderr


# --- MedGemma


def answered(words: g3.Tokenizer, *ids: int, thinks: bool = False) -> tuple[list[tuple[str, str]], Answer]:
    answer = Answer(words, eos_ids=frozenset([106]), thought=(100, 101), thinks=thinks)
    events = [answer.push(token) for token in ids] + [answer.finish()]
    return [(event["kind"], event["text"]) for event in events if event is not None and event["text"]], answer


def test_thoughts_are_told_apart(caller: g3.Engine) -> None:
    words = caller.tokenizer
    thought, said = words.encode("thought\nis it"), words.encode("the user")
    events, answer = answered(words, 100, *thought, 101, *said, 106)
    assert (answer.thinking, answer.text, answer.ended) == ("is it", "the user", True)
    assert "".join(text for kind, text in events if kind == "thinking") == "is it"
    assert "".join(text for kind, text in events if kind == "text") == "the user"
    _, answer = answered(words, 100, *words.encode("thou"))
    assert (answer.thinking, answer.text) == ("thou", ""), "never closed, and no title"
    _, answer = answered(words, *thought, 101, *said, thinks=True)
    assert (answer.thinking, answer.text) == ("thought\nis it", "the user"), "the prompt has opened it"
    _, answer = answered(words, *said, 100, *said)
    assert (answer.thinking, answer.text) == ("", "the user<unused94>the user"), "not in the middle of an answer"


def test_a_thought_is_not_sent_back(family: Path) -> None:
    with g3.load(family / "gemma-3", dtype="float32") as engine:
        session = engine.session()
        # Whatever the model says, it begins with a thought and ends it.
        grammar = 'start: "<unused94>" /[a-z]{3}/ "<unused95>" /[a-z]{4}/\n'
        reply = session.send("a", grammar=grammar, max_tokens=30).reply
        assert len(reply.thinking) == 3 and len(reply.text) == 4
        assert session.messages[-1] == {"role": "assistant", "content": reply.text}
        plain = [*session.messages, {"role": "user", "content": "b"}]
        usage = session.send("b", max_tokens=2).reply.usage
        assert usage["prompt_tokens"] <= engine.count_tokens(plain) + 4, "as many as without the thought"


def test_a_template_may_open_the_thought(family: Path) -> None:
    with g3.load(family / "thinking", dtype="float32") as engine:
        reply = engine.generate("a", template_args={"think": True}, max_tokens=6, temperature=0)
        assert reply.thinking and not reply.text
        assert not engine.generate("a", max_tokens=6, temperature=0).thinking
    asked = [*COMMAND, "generate", "-m", str(family / "thinking"), "--template-arg", "think=true", "--temperature", "0"]
    asked += ["--max-tokens", "6"]
    done = subprocess.run([*asked, "a"], input="", capture_output=True, timeout=60)
    assert done.stdout.strip() == b"" and reply.thinking.encode() in done.stderr
    done = subprocess.run([*asked, "--json", "a"], input="", capture_output=True, text=True, timeout=60)
    assert {json.loads(line)["kind"] for line in done.stdout.splitlines()} >= {"thinking", "done"}


def test_gemma_3s_own_template_takes_no_values(family: Path) -> None:
    with g3.load(family / "gemma-3", dtype="float32") as engine:
        for name, value in (("template_args", {"a": 1}), ("source_lang", "de")):
            with pytest.raises(OptionError, match=f"{name}: got"):
                engine.generate("a", **{name: value})  # type: ignore[call-overload]


# --- ShieldGemma 2


def test_probabilities_are_the_references(family: Path) -> None:
    with g3.load(family / "shieldgemma-2", dtype="float32") as engine:
        for row in json.loads((GOLDENS / "shield.json").read_text(encoding="utf-8")):
            random = np.random.default_rng(row["seed"])
            picture = Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8))
            asked: Any = row["policies"]
            if row["custom"]:
                asked = {name: row["custom"].get(name) for name in row["policies"]}
            found = engine.classify(picture, asked)
            assert list(found) == (row["policies"] or ["dangerous", "sexual", "violence"])
            assert np.allclose(list(found.values()), row["probabilities"], atol=1e-5, rtol=0)
        for wrong in (["nix"], {"mine": ""}, [], "violence", {"mine": None}):
            with pytest.raises(OptionError, match="policies: got"):
                engine.classify(picture, wrong)
        with pytest.raises(Gemma3Error, match="no such file"):
            engine.classify("/no/such.png")
        with pytest.raises(OptionError, match="want one"):
            engine.classify([picture, picture])


def test_classify_as_a_command(family: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 7), "blue").save(tmp_path / "a.png")
    asked = [*COMMAND, "classify", "-m", str(family / "shieldgemma-2"), "-i", str(tmp_path / "a.png")]
    done = subprocess.run([*asked, "--policy", "violence", "--policy", "mine=No blue."], capture_output=True, text=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[1] for row in rows] == ["violence", "mine"] and all(0 <= float(row[0]) <= 1 for row in rows)
    done = subprocess.run([*asked, "--json", "--policy", "sexual"], capture_output=True, text=True)
    assert list(json.loads(done.stdout)["policies"]) == ["sexual"]
    asked[asked.index(str(family / "shieldgemma-2"))] = str(family / "gemma-3")
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 1 and "load ShieldGemma 2" in done.stderr and done.stderr.count("\n") == 1


def test_a_converted_classifier_still_is_one(family: Path, tmp_path: Path) -> None:
    g3.convert(family / "shieldgemma-2", tmp_path / "out", bits=8, group_size=32)
    with g3.load(tmp_path / "out", dtype="float32") as engine:
        picture = Image.new("RGB", (9, 7), "blue")
        assert set(engine.classify(picture, ["sexual"])) == {"sexual"}
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "shieldgemma2" and config["yes_token_index"] == tiny_family.CLASSES[0]


# --- fine-tunes


def test_words_turns_and_a_head_of_ones_own(tmp_path: Path) -> None:
    known = [*tiny_tokenizer.pieces(), "<|im_start|>", "<|im_end|>"]
    names = set(tiny_tokenizer.PLACES.values())
    added = {piece for piece in known if piece in names or piece.startswith(("<unused", "<|"))}
    control = CONTROL_NAMES.intersection(known) | {"<|im_start|>", "<|im_end|>"}
    config = tiny.text_config(vocab_size=520, tie_word_embeddings=False)
    folder = tiny.write_folder(tmp_path / "tune", config, tiny.random_tensors(config), style="text")
    (folder / "tokenizer.json").write_bytes(
        tokenizer_json(Vocabulary("tests", tuple(known), frozenset(added), frozenset(control)))
    )
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    settings = {"chat_template": turns + "{{ '<|im_start|>assistant\n' }}", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with g3.load(folder, dtype="float32") as engine:
        end = engine.tokenizer.id("<|im_end|>")
        assert end == 513 and engine.about["own_template"]
        reply = engine.generate("hi <|im_end|>", logit_bias={end: 100}, temperature=0)
        assert (reply.tokens, reply.finish_reason, reply.text) == ([end], "stop", "")
        rendered = "<bos><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert engine.count_tokens("hi") == len(engine.tokenizer.encode(rendered))
        typed = engine.count_tokens("<|im_end|>")
        assert typed > engine.count_tokens("hi"), "what is typed is no end of a turn"
    inspected = subprocess.run([*COMMAND, "inspect", str(folder)], capture_output=True, text=True)
    assert "tokenizer_config.json: its own turns" in inspected.stdout


def test_an_adapter_alone_names_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "google/medgemma-4b-it"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="a LoRA adapter of google/medgemma-4b-it"):
        g3.load(tmp_path)

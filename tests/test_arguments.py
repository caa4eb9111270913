"""Every public function with odd values in every argument: it works, or says in one sentence what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_gemma3 as g3
from mlx_gemma3 import images
from mlx_gemma3.boundary.arguments import argument, described, takes
from mlx_gemma3.config import Config
from mlx_gemma3.errors import Gemma3Error, OptionError
from mlx_gemma3.worker.client import WorkerEngine


class Rude:
    """Says nothing of itself."""

    def __repr__(self) -> str:
        raise RuntimeError

    __str__ = __repr__


ODD: tuple[Any, ...] = (
    None, object(), Rude(), Rude, True, False, 0, -1, 5, 10**30, -(10**400), 10**5000, 0.5, -0.5, 1e300,
    float("nan"), float("inf"), 1j, "", "\0", "a", "\ud800", "x" * 10_000, b"", b"\xff", bytearray(b"a"),
    memoryview(b"a"), [], [None], ["a"], [b"a"], [5], [[]], [{}], (), ("a",), {}, {"a": 1}, {"role": "user"},
    [{"role": "user"}], [{"role": "user", "content": 5}], set(), {"a"}, range(3), iter("ab"), Path("/nowhere"),
    np.int64(3), np.float32(0.5), np.float64("nan"), np.bool_(True), np.zeros(3), np.zeros(()), np.array("a"),
    Image.new("RGB", (3, 3)), Image, len, slice(3), mx.array(3),
)  # fmt: skip


@pytest.fixture(scope="module")
def engine(chat_folder: Path) -> Iterator[g3.Engine]:
    with g3.load(chat_folder) as engine:
        yield engine


def calls(engine: g3.Engine, folder: Path, tmp_path: Path) -> dict[str, Callable[[Any], Any]]:
    """What is tried with each odd value, by a name that says where the value goes."""
    tokenizer, session = g3.Tokenizer.from_folder(folder), engine.session()
    config = Config.from_file(folder / "config.json")
    processor = g3.Processor(tokenizer, config)
    chat = [{"role": "user", "content": "hi"}]
    out = tmp_path / "out"
    made: dict[str, Callable[[Any], Any]] = {
        "stream(prompt)": lambda odd: engine.stream(odd, max_tokens=1).reply,
        "stream(content)": lambda odd: engine.stream([{"role": "user", "content": odd}], max_tokens=1).reply,
        "stream(item)": lambda odd: engine.stream([{"role": "user", "content": [odd]}], max_tokens=1).reply,
        "stream(role)": lambda odd: engine.stream([{"role": odd, "content": "hi"}], max_tokens=1).reply,
        "stream(tool_calls)": lambda odd: (
            engine.stream([{"role": "assistant", "content": "hi", "tool_calls": odd}], max_tokens=1).reply
        ),
        "stream(tool arguments)": lambda odd: (
            engine.stream(
                [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": odd}}]}],
                max_tokens=1,
            ).reply
        ),
        "stream(tool_call_id)": lambda odd: (
            engine.stream([{"role": "tool", "content": "found", "tool_call_id": odd}], max_tokens=1).reply
        ),
        "stream(tool result)": lambda odd: engine.stream([{"role": "tool", "content": {"x": odd}}], max_tokens=1).reply,
        "stream(source)": lambda odd: (
            engine.stream([{"role": "user", "content": [{"type": "image", "image": odd}]}], max_tokens=1).reply
        ),
        "stream(images)": lambda odd: engine.stream("hi", images=odd, max_tokens=1).reply,
        "stream(image)": lambda odd: engine.stream("hi", images=[odd], max_tokens=1).reply,
        "send(said)": lambda odd: session.send(odd, max_tokens=1).reply,
        "send(images)": lambda odd: session.send("hi", images=odd, max_tokens=1).reply,
        "next(timeout)": lambda odd: engine.stream("hi", max_tokens=1).next(timeout=odd),
        "wait_until_loaded(timeout)": lambda odd: engine.wait_until_loaded(odd),
        "session(system)": lambda odd: engine.session(system=odd),
        "session(resume)": lambda odd: engine.session(resume=odd),
        "save(path)": lambda odd: isinstance(odd, str | Path) or session.save(odd),
        "save(replace)": lambda odd: session.save(tmp_path / "s", replace=odd),
        "load(source)": lambda odd: g3.load(odd).close(),
        "Processor(tokenizer)": lambda odd: g3.Processor(odd, config),
        "Processor(config)": lambda odd: g3.Processor(tokenizer, odd),
        "prepare(prompt)": lambda odd: processor.prepare(odd),
        "prepare(images)": lambda odd: processor.prepare("<start_of_image>", odd),
        "encode(text)": lambda odd: tokenizer.encode(odd),
        "encode(bos)": lambda odd: tokenizer.encode("hi", bos=odd),
        "encode(special)": lambda odd: tokenizer.encode("hi", special=odd),
        "decode(ids)": lambda odd: tokenizer.decode(odd),
        "decode(id)": lambda odd: tokenizer.decode([odd]),
        "decode(skip)": lambda odd: tokenizer.decode([3], skip_special=odd),
        "id(piece)": lambda odd: tokenizer.id(odd),
        "piece(token)": lambda odd: tokenizer.piece(odd),
        "from_folder": g3.Tokenizer.from_folder,
        "Tokenizer.from_file": g3.Tokenizer.from_file,
        "Config.from_file": Config.from_file,
        "Config.from_dict": Config.from_dict,
        "load_model(source)": lambda odd: g3.load_model(odd),
        "load_model(dtype)": lambda odd: g3.load_model(folder, dtype=odd),
        "load_model(text_only)": lambda odd: g3.load_model(folder, text_only=odd),
        "render_chat(messages)": lambda odd: g3.render_chat(odd),
        "render_chat(content)": lambda odd: g3.render_chat([{"role": "user", "content": odd}]),
        "render_chat(role)": lambda odd: g3.render_chat([{"role": odd, "content": "hi"}]),
        "render_chat(second role)": lambda odd: g3.render_chat([*chat, {"role": odd, "content": "hi"}]),
        "load_image": images.load_image,
        "to_pixels(image)": lambda odd: images.to_pixels(odd, 8),
        "to_pixels(size)": lambda odd: images.to_pixels(Image.new("RGB", (3, 3)), odd),
        "boxes(width)": lambda odd: images.pan_and_scan_boxes(odd, 300),
        "boxes(height)": lambda odd: images.pan_and_scan_boxes(300, odd),
        "convert(source)": lambda odd: g3.convert(odd, out),
        "convert(out)": lambda odd: isinstance(odd, str | Path) or g3.convert(folder, odd),
        "Worker(source)": lambda odd: isinstance(odd, str | Path) or WorkerEngine(odd, command=("/nowhere",)),
    }
    for name in ("add_generation_prompt", "continue_final_message"):
        made[f"render_chat({name})"] = lambda odd, name=name: g3.render_chat(chat, **{name: odd})
        made[f"prepare({name})"] = lambda odd, name=name: processor.prepare(chat, **{name: odd})
    for name in ("pan_and_scan", "special"):
        made[f"prepare({name})"] = lambda odd, name=name: processor.prepare("hi", **{name: odd})
    options = (
        "system", "raw", "pan_and_scan", "continue_final_message", "stop", "temperature", "top_k", "top_p", "min_p",
        "repetition_penalty", "seed",
    )  # fmt: skip
    for name in options:
        made[f"stream({name})"] = lambda odd, name=name: engine.stream("hi", **{"max_tokens": 1, name: odd}).reply
    made["stream(max_tokens)"] = lambda odd: engine.stream("hi", max_tokens=odd).cancel()
    for name in ("dtype", "text_only", "kv_bits", "local_kv_bits", "max_context", "force"):
        made[f"load({name})"] = lambda odd, name=name: g3.load(folder, **{name: odd}).close()
    settings = (
        "bits", "group_size", "mode", "preset", "overrides", "search", "dtype", "dequantize", "text_only", "overwrite",
        "compare", "quiet", "max_shard_bytes", "command",
    )  # fmt: skip
    for name in settings:
        made[f"convert({name})"] = lambda odd, name=name: g3.convert(folder, out, **{"overwrite": True, name: odd})
    return made


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_only_our_errors(
    every: int, engine: g3.Engine, chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    faults, refused = [], 0
    for number, (name, call) in enumerate(calls(engine, chat_folder, tmp_path).items()):
        for odd in ODD[number % every :: every]:
            try:
                call(odd)
            except Gemma3Error as error:
                refused += 1
                if "\n" in str(error) or len(str(error)) > 1400 or error.code == "error":  # unforeseen
                    faults.append(f"{name} {described(odd)[:40]}: {error}")
            except Exception as error:
                faults.append(f"{name} {described(odd)[:40]}: {type(error).__name__}: {described(error)[:100]}")
    assert not faults, f"{len(faults)}:\n" + "\n".join(faults)
    assert refused > 1000 // every


def test_kinds() -> None:
    assert argument("n", np.int8(3), "whole") == 3 and type(argument("n", np.int8(3), "whole")) is int
    assert argument("n", np.float32(0.5), "number") == 0.5 and argument("n", 3, "number") == 3.0
    assert argument("n", np.bool_(True), "switch") is True
    assert argument("n", "a", "texts") == ("a",) and argument("n", ["a", "b"], "texts") == ("a", "b")
    assert argument("n", None, "whole", 7) == 7
    for kind, wrong in (
        ("whole", True), ("whole", 1.0), ("number", "1"), ("number", float("nan")), ("switch", 1), ("switch", "false"),
        ("text", b"a"), ("path", b"a"), ("texts", [1]), ("whole", None),
    ):  # fmt: skip
        with pytest.raises(OptionError, match="n: got"):
            argument("n", wrong, kind)


def test_arguments_by_place_and_by_name() -> None:
    @takes(first="whole", second="text")
    def function(first: int, second: str = "b", *, third: object = None) -> tuple[object, ...]:
        return first, second, third

    assert function(1) == (1, "b", None)
    assert function(1, None, third=2) == (1, "b", 2)  # type: ignore[arg-type]
    assert function(second="a", first=np.int64(4)) == (4, "a", None)
    with pytest.raises(OptionError, match="second: got 5, want a text"):
        function(1, second=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        function()  # type: ignore[call-arg]
    assert function.__name__ == "function"

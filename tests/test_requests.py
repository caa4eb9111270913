"""What a caller hands in: a request is as it was when it was made, pictures are waited for aside, turns go on."""

from __future__ import annotations

import base64
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from picture_server import serving
from PIL import Image
from places import PICTURES

import mlx_gemma3 as g3
from mlx_gemma3.errors import ImageError, OptionError, PromptError
from mlx_gemma3.prompt import images, snapshot
from mlx_gemma3.runtime.options import Options
from mlx_gemma3.worker.client import WorkerEngine

GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
HEART, TRIANGLE = (PICTURES / name for name in ("heart.png", "triangle.png"))


@pytest.fixture(scope="module")
def engine(chat_folder: Path) -> Iterator[g3.Engine]:
    with g3.load(chat_folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(HEART.read_bytes()) as url:
        yield url


@pytest.fixture
def session(engine: g3.Engine) -> g3.Session:
    return engine.session()


@pytest.fixture
def busy(engine: g3.Engine) -> Iterator[Callable[[], None]]:
    """Keeps the engine's thread until it is let go, so that what is asked meanwhile waits."""
    free = threading.Event()
    held = threading.Thread(target=lambda: engine._thread.call(lambda _: free.wait(20)))
    held.start()
    yield free.set
    free.set()
    held.join()


def prompted(stream: g3.Stream) -> tuple[int, list[int]]:
    reply = stream.reply
    return reply.usage["prompt_tokens"], reply.tokens


# ---- a snapshot --------------------------------------------------------------------------------------------------


def test_what_is_changed_after_the_call_changes_nothing(
    engine: g3.Engine, session: g3.Session, busy: Callable[[], None]
) -> None:
    """Whole chats, items, buffers, frames and lists, all changed while the request still waits."""
    heart = Image.open(HEART).convert("RGB")
    frame, buffer, stop = heart.copy(), bytearray(HEART.read_bytes()), ["zz"]
    carried: dict[str, Any] = {"type": "image", "image": frame}
    messages: list[dict[str, Any]] = [{"role": "user", "content": [carried, {"type": "text", "text": "hi"}]}]
    pictures: list[Any] = [frame, buffer, memoryview(buffer)]
    streams = [
        engine.stream(messages, stop=stop, **GREEDY),
        engine.stream("hi", images=pictures, **GREEDY),
        engine.stream("hi", images=frame, **GREEDY),
        engine.astream("hi", images=[frame], **GREEDY)._stream,
        session.send(messages[0]["content"], **GREEDY),
    ]
    frame.paste((0, 255, 0), (0, 0, *frame.size))
    buffer[:] = TRIANGLE.read_bytes()[: len(buffer)].ljust(len(buffer), b"\0")
    carried["image"] = str(TRIANGLE)
    messages[0]["content"].append({"type": "text", "text": "and " * 50})
    messages.append({"role": "assistant", "content": "…"})
    pictures.clear()
    stop.append("the")
    busy()
    got = [prompted(stream) for stream in streams]
    items = [{"type": "image", "image": heart}, {"type": "text", "text": "hi"}]
    assert got[0] == got[4] == prompted(engine.stream([{"role": "user", "content": items}], **GREEDY))
    assert got[1] == prompted(engine.stream("hi", images=[heart, HEART, HEART], **GREEDY))
    assert got[2] == got[3] == prompted(engine.stream("hi", images=[heart], **GREEDY))


def test_a_lazy_picture_is_read_at_once(engine: g3.Engine, busy: Callable[[], None], tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(HEART.read_bytes())
    with Image.open(path) as lazy:
        stream = engine.stream("hi", images=[lazy], **GREEDY)
    path.unlink()
    closed = engine.stream("hi", images=[lazy_and_closed()], **GREEDY)
    busy()
    assert stream.reply.tokens == engine.generate("hi", images=[HEART], **GREEDY).tokens
    with pytest.raises(ImageError, match="damaged"):  # told when its turn comes, as before
        closed.reply


def lazy_and_closed() -> Image.Image:
    image = Image.open(HEART)
    image.close()
    return image


def test_copies_are_whole_and_their_own() -> None:
    inner = {"b": [1, bytearray(b"x"), None]}
    value = snapshot.copied({"a": (inner, iter("yz"))})
    assert value == {"a": [{"b": [1, b"x", None]}, ["y", "z"]]}
    inner["b"].append(2)
    assert value["a"][0] == {"b": [1, b"x", None]}
    endless: list[Any] = []
    endless.append(endless)
    assert snapshot.copied(endless)


def test_pictures_may_be_handed_over_while_pillow_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", ModuleType("PIL.Image"))  # as another thread sees it half way
    assert snapshot.copied(snapshot.pictures([b"a", "b"])) == [b"a", "b"]


def test_one_picture_is_a_list_of_one(engine: g3.Engine) -> None:
    want = engine.generate("hi", images=[HEART], **GREEDY).tokens
    for one in (HEART, str(HEART), HEART.read_bytes(), bytearray(HEART.read_bytes()), Image.open(HEART), iter([HEART])):
        assert engine.generate("hi", images=one, **GREEDY).tokens == want
    assert engine.generate("hi", images=None, **GREEDY).usage["images"] == 0
    for wrong in (5, {"path": "a.png"}, object(), np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(OptionError, match="images: got"):
            engine.stream("hi", images=wrong)
    for prompt in (None, 5, {"role": "user", "content": "hi"}, b"hi"):
        with pytest.raises(PromptError, match="prompt: got"):
            engine.stream(prompt)  # type: ignore[arg-type]


# ---- pictures from elsewhere -------------------------------------------------------------------------------------


def test_a_picture_at_an_address(engine: g3.Engine, server: str) -> None:
    want = engine.generate("hi", images=[HEART], **GREEDY).tokens
    stream = engine.stream("hi", images=[f"{server}/good.png"], **GREEDY)
    stages = []
    while (event := stream.next())["kind"] not in ("done", "error"):
        stages += [event["stage"]] if "stage" in event else []
    assert event["tokens"] == want and stages[:2] == ["pictures", "download"]
    item = {"type": "image_url", "image_url": {"url": f"{server}/moved"}}
    message = {"role": "user", "content": [item, {"type": "text", "text": "hi"}]}
    assert engine.generate([message], **GREEDY).tokens == want
    assert engine.session().send([item, "hi"], **GREEDY).reply.tokens == want
    with pytest.raises(ImageError, match="404"):
        engine.generate("hi", images=f"{server}/missing", **GREEDY)


def test_the_worker_takes_the_same_pictures_and_messages(
    chat_folder: Path, engine: g3.Engine, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = engine.generate("hi", images=[HEART], **GREEDY).tokens
    encoded = base64.b64encode(HEART.read_bytes()).decode()
    (tmp_path / "heart.png").write_bytes(HEART.read_bytes())
    with WorkerEngine(chat_folder, kv_bits=None) as remote:
        monkeypatch.chdir(tmp_path)  # the worker stays where it was
        sources: list[Any] = [
            f"{server}/good.png", f"data:;base64,{encoded}", HEART.as_uri(), "heart.png", encoded,
            bytearray(HEART.read_bytes()), Image.open(HEART).convert("RGB").convert("CMYK").convert("RGB"),
        ]  # fmt: skip
        for source in sources:
            assert remote.generate("hi", images=source, **GREEDY).tokens == want, source
            message = {"role": "user", "content": [{"type": "image", "image": source}, {"type": "text", "text": "hi"}]}
            assert remote.generate([message], **GREEDY).tokens == want, source
        assert remote.session().send([{"type": "image", "image": "heart.png"}, "hi"], **GREEDY).reply.tokens == want
        assert remote.generate("hi", images=None, stop=None, max_tokens=np.int64(2), temperature=np.float32(0)).tokens
        event = remote.stream([{"role": "user", "content": [{"type": "input_audio"}]}]).next()
        assert event["code"] == "prompt" and "input_audio" in event["message"]
        begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the"}]
        assert (
            remote.generate(begun, continue_final_message=True, **GREEDY).tokens
            == engine.generate(begun, continue_final_message=True, **GREEDY).tokens
        )


@pytest.mark.parametrize("where", ["an address", "a long decode"])
def test_a_cancel_ends_the_waiting_for_a_picture(
    engine: g3.Engine, server: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, over = threading.Event(), threading.Event()
    source: Any = f"{server}/slow"
    if where == "a long decode":
        source = HEART

        def long(*_: Any, **__: Any) -> Any:
            begun.set()
            over.wait(20)
            raise ImageError("picture")

        monkeypatch.setattr(images, "load_image", long)
    session = engine.session()
    for start in (engine.stream, session.send):
        stream = start("hi", images=[source], **GREEDY)
        if where == "an address":
            while stream.next().get("done", 0) < 2:
                pass
        else:
            assert begun.wait(20)
        began = time.monotonic()
        stream.cancel()
        reply = stream.reply
        assert time.monotonic() - began < 2 and reply.finish_reason == "cancelled" and reply.text == ""
    assert session.messages == [], "nothing was said"
    monkeypatch.undo()
    over.set()
    assert engine.generate("hi", images=[HEART], **GREEDY).tokens, "the engine is free"


# ---- an answer that has begun ------------------------------------------------------------------------------------


def test_the_last_message_is_gone_on_with(engine: g3.Engine) -> None:
    question = {"role": "user", "content": "hi"}
    begun = [question, {"role": "assistant", "content": " the model "}]
    reply = engine.generate(begun, continue_final_message=True, **GREEDY)
    prompt = g3.render_chat(begun, continue_final_message=True)
    assert prompt.endswith("<start_of_turn>model\nthe model")
    assert reply.tokens == engine.generate(prompt, raw=True, **GREEDY).tokens
    assert reply.usage["prompt_tokens"] < engine.generate(begun, **GREEDY).usage["prompt_tokens"]
    with pytest.raises(OptionError, match="continue_final_message: got a text"):
        engine.generate("hi", continue_final_message=True)
    with pytest.raises(OptionError, match="continue_final_message"):
        engine.session().send("hi", continue_final_message=True).reply


def test_a_system_text_is_said_once(engine: g3.Engine) -> None:
    said = [{"role": "developer", "content": "brief"}, {"role": "user", "content": "hi"}]
    assert engine.generate(said, **GREEDY).tokens == engine.generate("hi", system="brief", **GREEDY).tokens
    with pytest.raises(OptionError, match="beside a system message"):
        engine.generate(said, system="brief")


def test_none_is_the_default_and_numpys_numbers_are_numbers(engine: g3.Engine) -> None:
    want = engine.generate("hi", max_tokens=8, temperature=0).tokens
    nothing: dict[str, Any] = dict.fromkeys(
        ("system", "raw", "pan_and_scan", "stop", "top_k", "top_p", "min_p", "seed")
    )
    assert engine.generate("hi", max_tokens=np.int32(8), temperature=np.float32(0), **nothing).tokens == want
    assert engine.generate("hi", max_tokens=8, temperature=0, pan_and_scan=np.bool_(False), stop=("zz",)).tokens == want
    assert Options.build({"max_tokens": None, "stop": None, "pan_and_scan": None}) == Options()


def test_a_picture_in_memory_is_like_its_file(engine: g3.Engine) -> None:
    buffer = io.BytesIO()
    Image.open(HEART).save(buffer, "PNG")
    encoded = {"type": "image", "base64": base64.b64encode(buffer.getvalue()).decode()}
    message = {"role": "user", "content": [encoded, {"type": "text", "text": "hi"}]}
    assert engine.generate([message], **GREEDY).tokens == engine.generate("hi", images=[HEART], **GREEDY).tokens

"""`mlx-gemma3 worker`: every request gets its end, whatever the lines hold."""

from __future__ import annotations

import base64
import io
import json
import os
import queue
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schema
from endless import endless
from PIL import Image
from worker_process import ENDS, Worker

import mlx_gemma3 as g3
from mlx_gemma3.errors import RequestError
from mlx_gemma3.runtime import thread
from mlx_gemma3.runtime.options import OptionValues
from mlx_gemma3.worker import protocol
from mlx_gemma3.worker.server import Limits, Server

ENDLESS: dict[str, Any] = {"max_tokens": 900, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
GREEDY: dict[str, Any] = {"max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def chat_folder(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless(chat_folder, tmp_path_factory.mktemp("endless"))


@pytest.fixture(scope="module")
def worker(chat_folder: Path) -> Iterator[Worker]:
    with Worker() as worker:
        loaded = worker.ask({"id": 1, "op": "load", "model": str(chat_folder)})
        assert loaded["id"] == 1 and loaded["result"]["instruct"] and loaded["result"]["vision"], loaded
        yield worker


@pytest.fixture(scope="module")
def engine(chat_folder: Path) -> Iterator[g3.Engine]:
    with g3.load(chat_folder) as engine:
        yield engine


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40), "green").save(buffer, "PNG")
    return buffer.getvalue()


def test_an_answer_is_the_engines(worker: Worker, engine: g3.Engine, tmp_path: Path) -> None:
    path = tmp_path / "green.png"
    path.write_bytes(picture())
    wanted = engine.generate("hi", images=[path], **GREEDY)
    encoded = base64.b64encode(picture()).decode()
    data = f"data:image/png;base64,{encoded}"
    item = {"type": "image_url", "image_url": {"url": data}}
    requests: list[dict[str, Any]] = [
        {"prompt": "hi", "images": [{"path": str(path)}]},
        {"prompt": "hi", "images": [{"base64": encoded}]},
        {"messages": [{"role": "user", "content": [item, {"type": "text", "text": "hi"}]}]},
    ]
    for number, request in enumerate(requests):
        worker.send({"id": f"picture {number}", "op": "generate", **request, "options": GREEDY})
        events = [worker.next()]
        while (event := events[-1])["kind"] not in ENDS:  # type: ignore[index]
            events.append(worker.next())
        assert event is not None and event["kind"] == "done", event
        assert {one["id"] for one in events} == {f"picture {number}"}  # type: ignore[index]
        assert event["tokens"] == wanted.tokens and event["finish_reason"] == wanted.finish_reason
        assert event["text"] == wanted.text == "".join(one.get("text", "") for one in events[:-1])  # type: ignore[union-attr]


def test_several_answers_are_on_their_way_at_once(worker: Worker) -> None:
    worker.send(
        {"id": "a", "op": "generate", "prompt": "the", "options": ENDLESS},
        {"id": "c", "op": "generate", "prompt": "the", "options": {"max_tokens": 2, "logprobs": 1}},
        {"id": "d", "op": "session.open", "session": "beside"},
    )
    ends = {event["id"]: event for event in worker.ends(2)}
    assert set(ends) == {"c", "d"} and len(ends["c"]["logprobs"]) == len(ends["c"]["tokens"])
    status = worker.ask({"id": "s", "op": "status"})["result"]
    assert (status["running"], status["answering"], status["waiting"]) == ("a", ["a"], [])
    worker.send({"id": "y", "op": "cancel", "target": "a"}, {"id": "e", "op": "session.close", "session": "beside"})
    assert {event["id"] for event in worker.ends(3)} == {"a", "y", "e"}


def test_requests_begin_in_order_and_cancel_and_status_are_done_at_once(worker: Worker, chat_folder: Path) -> None:
    load = {"op": "load", "model": str(chat_folder)}
    assert worker.ask({"id": 0, "parallel": 1, **load})["kind"] == "ok"
    worker.send(
        {"id": "a", "op": "generate", "prompt": "the", "options": ENDLESS},
        {"id": "b", "op": "generate", "prompt": "the", "options": ENDLESS},
        {"id": "c", "op": "generate", "prompt": "the", "options": {"max_tokens": 2}},
        {"id": "d", "op": "session.open", "session": "never"},
        {"id": "s", "op": "status"},
        {"id": "x", "op": "cancel", "target": "b"},
        {"id": "y", "op": "cancel", "target": "a"},
        {"id": "w", "op": "cancel", "target": "d"},
        {"id": "z", "op": "cancel", "target": "a stranger"},
    )
    ends = {event["id"]: event for event in worker.ends(9)}
    assert set(list(ends)[-3:]) == {"b", "c", "d"} and set(list(ends)[:6]) == {"a", "s", "x", "y", "w", "z"}
    status = ends["s"]["result"]
    assert status["running"] in ("a", None) and status["waiting"][-3:] == ["b", "c", "d"]
    assert status["memory"]["active_bytes"] > 0 and status["pid"] == worker.process.pid
    assert ends["x"]["result"] == ends["y"]["result"] == {"found": True} != ends["z"]["result"]
    assert ends["a"]["finish_reason"] == ends["b"]["finish_reason"] == "cancelled"
    assert ends["b"]["tokens"] == [] and 0 < len(ends["c"]["tokens"]) <= 2
    assert ends["d"]["code"] == "closed"
    assert worker.ask({"id": 0, **load})["kind"] == "ok"


def test_a_conversation_is_kept_saved_and_gone_on_with(worker: Worker, engine: g3.Engine, tmp_path: Path) -> None:
    talk = engine.session(system="be brief")
    said = [talk.send("hi", **GREEDY).reply.tokens, talk.send("and", **GREEDY).reply.tokens]
    path, options = str(tmp_path / "talk.session"), GREEDY
    assert worker.ask({"id": 2, "op": "session.open", "session": "t", "system": "be brief"})["result"]["tokens"] == 0
    assert worker.ask({"id": 3, "op": "session.open", "session": "t"})["code"] == "request"
    first = worker.ask({"id": 4, "op": "session.send", "session": "t", "content": "hi", "options": options})
    assert first["tokens"] == said[0]
    assert worker.ask({"id": 5, "op": "session.save", "session": "t", "path": path})["kind"] == "ok"
    items = [{"type": "text", "text": "and"}]
    second = worker.ask({"id": 6, "op": "session.send", "session": "t", "content": items, "options": options})
    assert second["tokens"] == said[1] and second["usage"]["cached_tokens"] > 0
    assert worker.ask({"id": 7, "op": "session.retry", "session": "t", "options": options})["tokens"] == said[1]
    assert worker.ask({"id": 8, "op": "session.undo", "session": "t"})["result"] == {}
    messages = worker.ask({"id": 9, "op": "session.messages", "session": "t"})["result"]["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert worker.ask({"id": 10, "op": "session.close", "session": "t"})["kind"] == "ok"
    assert worker.ask({"id": 11, "op": "session.retry", "session": "t"})["code"] == "request"
    resumed = worker.ask({"id": 12, "op": "session.open", "session": "t", "resume": path})
    assert resumed["result"]["messages"] == messages
    again = worker.ask({"id": 13, "op": "session.send", "session": "t", "content": "and", "options": options})
    assert again["tokens"] == said[1]
    assert worker.ask({"id": 14, "op": "session.close", "session": "t"})["kind"] == "ok"


WRONG: list[tuple[bytes, str]] = [
    (b"", "JSON object"),
    (b"hello", "JSON object"),
    (b"[1]", "JSON object"),
    (b'{"id":1,"op":"status"} {}', "JSON object"),
    (b"\xff\xfe{}", "UTF-8"),
    (b'{"id":1,"op":"generate","prompt":"a","options":{"temperature":NaN}}', "JSON object"),
    (b"[" * 100_000, "RecursionError"),
    (b'{"op":"status"}', "id: got null"),
    (b'{"id":true,"op":"status"}', "id: got true"),
    (b'{"id":"","op":"status"}', "id: got"),
    (b'{"id":1.5,"op":"status"}', "id: got 1.5"),
    (b'{"id":1,"op":"dance"}', "op: got"),
    (b'{"id":1}', "op: got null"),
    (b'{"id":1,"op":"status","loud":1}', "status: loud"),
    (b'{"id":1,"op":"load"}', "no model"),
    (b'{"id":1,"op":"load","model":"m","kv_bits":true}', "load: kv_bits"),
    (b'{"id":1,"op":"generate"}', "either prompt or messages"),
    (b'{"id":1,"op":"generate","prompt":"a","messages":[]}', "either prompt or messages"),
    (b'{"id":1,"op":"generate","messages":["a"]}', "a list of objects"),
    (b'{"id":1,"op":"generate","prompt":"a","images":[{}]}', "images"),
    (b'{"id":1,"op":"generate","prompt":"a","images":[{"base64":"*"}]}', "base64"),
    (b'{"id":1,"op":"generate","prompt":"a","images":[{"path":"a","base64":"b"}]}', "images"),
    (b'{"id":1,"op":"session.send","session":"none","content":"a"}', "none of that name"),
]


@pytest.mark.parametrize(("line", "why"), WRONG)
def test_a_line_that_is_no_request_is_an_error_event(worker: Worker, line: bytes, why: str) -> None:
    event = worker.ask(line)
    assert (event["kind"], event["code"]) == ("error", "request") and why in event["message"], event
    assert "\n" not in event["message"] and len(event["message"]) < 400


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": "a", "options": {"top_k": 1.5}}, "option"),
        ({"prompt": "a", "options": {"stop": 5}}, "option"),
        ({"prompt": "a", "options": {"raw": "yes"}}, "option"),
        ({"prompt": "a", "options": {"system": ["a"]}}, "option"),
        ({"prompt": "a", "options": {"max_tokens": 0}}, "option"),
        ({"prompt": "a", "options": {"images": []}}, "option"),
        ({"prompt": "a", "options": {"self": 1}}, "option"),
        ({"prompt": "a", "images": [{"path": "/nowhere.png"}]}, "image"),
        ({"prompt": "a", "images": [{"base64": "AAAA"}]}, "image"),
        ({"messages": [{"role": "sheep", "content": "a"}]}, "template"),
        ({"prompt": "the " * 5000}, "context"),
    ],
)
def test_what_the_engine_refuses_is_an_error_event_with_its_code(
    worker: Worker, fields: dict[str, Any], code: str
) -> None:
    event = worker.ask(json.dumps({"id": "r", "op": "generate", **fields}).encode())
    assert (event["id"], event["kind"], event["code"]) == ("r", "error", code), event
    assert worker.ask({"id": "r", "op": "generate", "prompt": "a", "options": {"max_tokens": 1}})["kind"] == "done"


def test_an_id_in_use_is_refused_without_ending_the_request_that_uses_it(worker: Worker) -> None:
    worker.send({"id": 5, "op": "generate", "prompt": "the", "options": ENDLESS}, {"id": 5, "op": "status"})
    refused = worker.ends()[0]
    assert (refused["id"], refused["code"]) == (None, "request")
    worker.send({"id": 6, "op": "cancel", "target": 5})
    assert {event["id"] for event in worker.ends(2)} == {5, 6}


def test_without_a_model_there_is_an_error_and_unloading_frees_it(chat_folder: Path) -> None:
    with Worker() as worker:
        assert worker.ask({"id": 1, "op": "generate", "prompt": "hi"})["code"] == "request"
        assert worker.ask({"id": 2, "op": "load", "model": "gemma-9"})["code"] == "not_found"
        assert worker.ask({"id": 3, "op": "status"})["result"]["model"] is None
        for number in (4, 5):  # the second takes the first one's place
            assert worker.ask({"id": number, "op": "load", "model": str(chat_folder)})["kind"] == "ok"
            assert worker.ask({"id": "o", "op": "session.open", "session": "s"})["kind"] == "ok"
        assert worker.ask({"id": 6, "op": "unload"})["result"] == {}
        status = worker.ask({"id": 7, "op": "status"})["result"]
        assert (status["model"], status["sessions"], status["memory"]) == (None, [], {})
        assert worker.ask({"id": 8, "op": "session.retry", "session": "s"})["code"] == "request"
        worker.send({"id": 9, "op": "shutdown"}, {"id": 10, "op": "status"})
        assert worker.ends()[0] == {"id": 9, "kind": "ok", "result": {}}
        assert worker.next() is None and worker.process.wait(10) == 0
        worker.close()
        assert worker.said == b"" and worker.raw == []


def test_the_end_of_its_input_ends_it_whatever_it_does(chat_folder: Path) -> None:
    with Worker() as worker:
        worker.ask({"id": 1, "op": "load", "model": str(chat_folder), "parallel": 2})
        endless = {"op": "generate", "prompt": "the", "options": ENDLESS}
        worker.send({"id": 2, **endless}, {"id": 4, **endless}, {"id": 3, **endless})
        while (worker.next() or {})["kind"] != "text":
            pass
        began = time.monotonic()
        assert worker.close() == 0 and time.monotonic() - began < 20
        ends = {event["id"]: event for event in worker.ends(3)}
        assert ends[2]["finish_reason"] == ends[4]["finish_reason"] == "cancelled" and ends[3]["code"] == "closed"
        assert worker.said == b""


def test_it_ends_though_nobody_takes_what_it_says(chat_folder: Path) -> None:
    """A parent that waits for the end with a full pipe in its hands."""
    import subprocess

    command = [sys.executable, "-m", "mlx_gemma3.cli", "worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        load = {"id": 0, "op": "load", "model": str(chat_folder)}
        lines = [load, *({"id": n, "op": "session.messages", "session": "x" * 60_000} for n in range(1, 60))]
        process.stdin.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        process.stdin.close()
        assert process.wait(30) == 0


def test_a_load_can_be_cancelled(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, fetch = threading.Event(), thread.resolve
    monkeypatch.setattr(thread, "resolve", lambda *a, **k: (go.wait(20), fetch(*a, **k))[1])
    ours, theirs = os.pipe()
    events: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with os.fdopen(ours, "rb") as source, os.fdopen(theirs, "wb", buffering=0) as sink:
        server = threading.Thread(target=Server(source, events.put, Limits(), "0").run)
        server.start()
        sink.write(json.dumps({"id": 1, "op": "load", "model": str(chat_folder)}).encode() + b"\n")
        sink.write(b'{"id": 2, "op": "cancel", "target": 1}\n')
        found = [json.loads(events.get(timeout=20)) for _ in range(3)]
        assert {event.get("id"): event.get("code") for event in found} == {None: None, 2: None, 1: "closed"}
        sink.write(b'{"id": 3, "op": "status"}\n')
        assert json.loads(events.get(timeout=20))["result"]["model"] is None
        go.set()
        sink.close()
        server.join(20)
    assert not server.is_alive()


def test_limits_are_kept_and_said(chat_folder: Path) -> None:
    with Worker("--max-line", "1", "--max-queued", "2", "--max-sessions", "1") as worker:
        assert worker.ask({"id": 1, "op": "load", "model": str(chat_folder)})["kind"] == "ok"
        long = worker.ask(b'{"id":2,"op":"generate","prompt":"' + b"a" * (3 << 20) + b'"}')
        assert (long["id"], long["code"]) == (None, "request") and "1048576" in long["message"]
        assert worker.ask({"id": 3, "op": "session.open", "session": "one"})["kind"] == "ok"
        assert worker.ask({"id": 4, "op": "session.open", "session": "two"})["code"] == "busy"
        worker.send({"id": 5, "op": "generate", "prompt": "the", "options": ENDLESS})
        while (worker.next() or {})["kind"] != "text":
            pass
        worker.send(*({"id": n, "op": "generate", "prompt": "the", "options": ENDLESS} for n in (6, 7, 8)))
        busy = worker.ends()[0]
        assert (busy["id"], busy["code"]) == (8, "busy")
        worker.send(*({"id": 10 + n, "op": "cancel", "target": n} for n in (5, 6, 7)))
        assert sorted(event["id"] for event in worker.ends(6)) == [5, 6, 7, 15, 16, 17]


def test_nothing_but_events_comes_out(chat_folder: Path) -> None:
    """Prints of Python and of libraries below it go to stderr; nothing below it reads our requests."""
    code = (
        "import os, sys\n"
        "from mlx_gemma3.worker import server\n"
        "check = server.Server._status\n"
        "def chatty(self):\n"
        "    print('from Python', flush=True); os.write(1, b'from C\\n'); os.system('echo from a child; cat')\n"
        "    assert sys.stdin.read() == ''\n"
        "    return check(self)\n"
        "server.Server._status = chatty\n"
        "sys.argv = ['mlx-gemma3', 'worker']\n"
        "from mlx_gemma3.cli import main\n"
        "main()\n"
    )
    with Worker(command=(sys.executable, "-c", code)) as worker:
        worker.send({"id": 1, "op": "status"}, {"id": 2, "op": "status"})
        assert [event["id"] for event in worker.ends(2)] == [1, 2]
        assert worker.close() == 0 and worker.raw == []
        assert worker.said.count(b"from C\n") == 2 and worker.said.count(b"from a child\n") == 2


def test_the_schema_and_the_program_take_the_same_requests(chat_folder: Path) -> None:
    values: dict[str, Any] = {"text": "a", "bool": True, "int": 16, "id": 7, "object": {}, "list": [{}], "content": "a"}
    values["pictures"] = [{"path": "a"}, {"base64": "YQ=="}]
    for op, fields in protocol.REQUESTS.items():
        whole = {"id": 1, "op": op, **{name: values[field.kind] for name, field in fields.items()}}
        if op == "generate":
            assert schema.problems(whole, "request")
            del whole["messages"]
        assert protocol.check(whole)[0] == op and not schema.problems(whole, "request"), op
        for name in whole:
            for other in ({key: value for key, value in whole.items() if key != name}, {**whole, name: 1.5}):
                needed = bool(schema.problems(other, "request"))
                try:
                    protocol.identity(other)
                    protocol.check(other)
                    refused = False
                except RequestError:
                    refused = True
                assert needed == refused, other
    assert set(OptionValues.__annotations__) == set(schema.ROOT["$defs"]["options"]["properties"])


def fuzz_lines(count: int, folder: Path, seed: int) -> Iterator[bytes]:
    """Requests as they should be, with one part changed, or with bytes changed; and bytes that mean nothing."""
    chance = random.Random(seed)
    odd: list[Any] = [
        None,
        True,
        -1,
        0,
        10**30,
        1.5,
        "",
        "x" * 300,
        "\ud800",
        "\0",
        [],
        [1],
        {},
        {"a": {}},
        [[]],
        "the",
    ]
    encoded = base64.b64encode(picture()).decode()
    plans: list[dict[str, Any]] = [
        {"op": "generate", "prompt": "the", "options": {"max_tokens": 3, "temperature": 1.0}},
        {"op": "generate", "prompt": "a", "images": [{"base64": encoded}], "options": {"max_tokens": 2}},
        {
            "op": "generate",
            "messages": [{"role": "user", "content": "hi"}],
            "options": {"max_tokens": 2, "stop": ["e"]},
        },
        {"op": "session.open", "session": "s"},
        {"op": "session.send", "session": "s", "content": "hi", "options": {"max_tokens": 2}},
        {"op": "session.retry", "session": "s", "options": {"max_tokens": 1}},
        {"op": "session.undo", "session": "s"},
        {"op": "session.messages", "session": "s"},
        {"op": "session.save", "session": "s", "path": "saved"},
        {"op": "session.close", "session": "s"},
        {"op": "cancel", "target": 3},
        {"op": "status"},
        {"op": "load", "model": str(folder)},
        {"op": "load", "model": "nowhere"},
    ]
    made = 0
    while made < count:
        plan = json.loads(json.dumps(chance.choice(plans[:-2] if chance.random() < 0.98 else plans)))
        request = {"id": made if chance.random() < 0.9 else chance.choice(odd), **plan}
        kind = chance.random()
        if kind > 0.4:  # another value somewhere
            holder: Any = request
            while isinstance(holder, dict | list) and holder:
                keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
                key = chance.choice(keys)
                if not isinstance(holder[key], dict | list) or chance.random() < 0.3:
                    holder[key] = chance.choice(odd)
                    break
                holder = holder[key]
            if chance.random() < 0.2:
                request[chance.choice(["images", "options", "prompt", "strange"])] = chance.choice(odd)
        line = bytearray(json.dumps(request).encode())
        if kind > 0.8:
            for _ in range(chance.randint(1, 6)):
                at = chance.randrange(len(line))
                line[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
        if kind > 0.97:
            line = bytearray(chance.randbytes(chance.randint(0, 500)))
        out = bytes(line).replace(b"\n", b"")
        if b"shutdown" in out or (b"save" in out and (b"/" in out or b"\\" in out)):
            continue  # would end it, or write somewhere else
        made += 1
        yield out


@pytest.mark.parametrize(
    ("count", "seed"), [(500, 1), pytest.param(10_000, 2, marks=pytest.mark.slow, id="10000 lines")]
)
def test_random_and_mutated_lines_each_get_their_end(chat_folder: Path, tmp_path: Path, count: int, seed: int) -> None:
    tally: dict[str, int] = {}
    with Worker(cwd=tmp_path) as worker:
        worker.ask({"id": "first", "op": "load", "model": str(chat_folder)})
        open_lines = 0
        for line in fuzz_lines(count, chat_folder, seed):
            worker.send(line)
            open_lines += 1
            for event in worker.ends(open_lines - 90 if open_lines > 90 else 0):  # more than fit in the queue
                open_lines -= 1
                tally[event.get("code", event["kind"])] = tally.get(event.get("code", event["kind"]), 0) + 1
        for event in worker.ends(open_lines):
            tally[event.get("code", event["kind"])] = tally.get(event.get("code", event["kind"]), 0) + 1
        assert sum(tally.values()) == count
        assert worker.ask({"id": "alive", "op": "status"})["id"] == "alive", "one end a line, no more"
        reply = worker.ask({"id": "last", "op": "load", "model": str(chat_folder)})
        assert reply["id"] == "last" and reply["kind"] == "ok"
        assert worker.close() == 0 and worker.said == b"", worker.said
    assert {"ok", "done", "request", "option"} <= tally.keys(), tally
    assert tally.get("error", 0) == 0, tally  # of no known kind

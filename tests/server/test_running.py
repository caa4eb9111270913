"""A server's life: its start, its end, clients that come back and clients that go away, several models."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from serving import Server, events, serving
from slowed import slowed

CHAT = "/v1/chat/completions"
LONG = {"prompt": "one two three", "max_tokens": 4000, "temperature": 1, "logit_bias": {"1": -100, "5": -100}}
# As the demo, and slow enough that tests can do something meanwhile.
SLOW = slowed("mlx_gemma3.model.runner", "Runner.step", 0.02)


def begin(server: Server, path: str, body: dict[str, Any]) -> http.client.HTTPConnection:
    """Ask for a streamed answer, and wait for its first bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", path, json.dumps({**body, "stream": True}))
    answer = connection.getresponse()
    assert answer.status == 200
    answer.read(20)
    connection.answer = answer  # type: ignore[attr-defined]
    return connection


@pytest.fixture(scope="module")
def slow() -> Any:
    with serving("-m", "demo", "--no-speculation", code=SLOW) as running:
        yield running


def cached_tokens(server: Server) -> float:
    lines = server.ask("/metrics")[1].splitlines()
    line = next((line for line in lines if 'tokens_total{kind="cached"}' in line), "none 0")
    return float(line.rpartition(" ")[2])


def idle(server: Server) -> None:
    until = time.monotonic() + 20
    while server.metric("mlx_gemma3_answers_in_work"):
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_is_not_answered_any_more(slow: Server, stream: bool) -> None:
    idle(slow)
    before = slow.metric("mlx_gemma3_answers_total")
    if stream:
        connection = begin(slow, "/v1/completions", LONG)
        connection.sock.close()
        connection.answer.close()  # type: ignore[attr-defined]
        connection.close()
    else:
        content = json.dumps(LONG).encode()
        with socket.create_connection(("127.0.0.1", slow.port)) as raw:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
            raw.sendall(head.encode() + content)
            while not slow.metric("mlx_gemma3_answers_in_work"):
                time.sleep(0.02)
    idle(slow)
    assert slow.metric("mlx_gemma3_answers_total") == before + 1
    assert 'mlx_gemma3_answers_total{reason="cancelled"}' in slow.ask("/metrics")[1]


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/messages", "/api/chat"])
def test_a_next_turn_reads_only_what_is_new(server: Server, path: str) -> None:
    topic = f"Tell me of {path} and more of it. " * 270  # of 8,192 tokens that fit
    said = [{"role": "user", "content": topic}]
    key = "input" if path == "/v1/responses" else "messages"

    def ask(messages: list[Any]) -> tuple[str, int, int]:
        """What was answered, tokens of the prompt, and how many of them were not read again."""
        settings = {
            CHAT: {"max_tokens": 8},
            "/v1/responses": {},
            "/v1/messages": {"max_tokens": 8},
            "/api/chat": {"stream": False, "options": {"num_predict": 8}},
        }
        cached_before = cached_tokens(server)
        status, told = server.ask(path, {key: messages, **settings[path]})
        assert status == 200, told
        if path == CHAT:
            usage = told["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            return told["choices"][0]["message"]["content"], usage["prompt_tokens"], cached
        if path == "/v1/responses":
            usage = told["usage"]
            cached = usage["input_tokens_details"]["cached_tokens"]
            return told["output"][0]["content"][0]["text"], usage["input_tokens"], cached
        if path == "/v1/messages":
            usage = told["usage"]
            cached = usage["cache_read_input_tokens"]
            return told["content"][0]["text"], usage["input_tokens"] + cached, cached
        cached = int(cached_tokens(server) - cached_before)  # which Ollama's protocol does not tell
        return told["message"]["content"], told["prompt_eval_count"], cached

    text, first, cached = ask(said)
    assert cached < first / 2
    text, again, cached = ask([*said, {"role": "assistant", "content": text}, {"role": "user", "content": "And?"}])
    assert again > first and cached >= first


def test_sigterm_lets_answers_end() -> None:
    with serving("-m", "demo", "--grace", "20", code=SLOW) as running:
        body = {"prompt": "one", "max_tokens": 60, "temperature": 1, "logit_bias": LONG["logit_bias"]}
        connection = begin(running, "/v1/completions", body)
        running.process.send_signal(signal.SIGTERM)
        text = connection.answer.read().decode()  # type: ignore[attr-defined]
        connection.close()
        assert events(text)[-1] == "[DONE]"
        assert running.wait() == 0
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", running.port), timeout=5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(number: signal.Signals) -> None:
    with serving("-m", "demo", "--grace", "600", code=SLOW) as running:
        connection = begin(running, "/v1/completions", LONG)
        running.process.send_signal(number)
        time.sleep(0.3)
        assert running.process.poll() is None
        began = time.monotonic()
        assert running.end(number) in (130, 143) and time.monotonic() - began < 10
        connection.answer.close()  # type: ignore[attr-defined]
        connection.close()


def test_the_grace_has_an_end() -> None:
    with serving("-m", "demo", "--grace", "1", code=SLOW) as running:
        connection = begin(running, "/v1/completions", LONG)
        began = time.monotonic()
        assert running.end() == 0 and time.monotonic() - began < 20
        connection.answer.close()  # type: ignore[attr-defined]
        connection.close()


def test_what_cannot_be_served(tmp_path: Path, server: Server) -> None:
    for arguments, why in (
        (["-m", str(tmp_path / "nothing")], "nothing"),
        (["-m", "demo", "--port", str(server.port)], "address: got"),
        (["-m", "demo", "--alias", "x"], "--alias"),
        (["-m", "demo", "--alias", "x=other"], "--alias"),
        (["-m", "demo", "--host", "999.1.1.1", "--no-auth"], "address: got"),
    ):
        command = [sys.executable, "-m", "mlx_gemma3.cli", "serve", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and done.stderr.startswith("mlx-gemma3: ") and done.stderr.count("\n") == 1, done
        assert why in done.stderr and done.stdout == ""


BROKEN = """
from mlx_gemma3.model.runner import Runner
def fails(*given, **options): raise RuntimeError("[METAL] Command buffer execution failed")
Runner.step = Runner.read = fails
from mlx_gemma3.cli import main
main()
"""


@pytest.mark.parametrize("stream", [True, False])
def test_a_server_ends_with_the_gpu(stream: bool) -> None:
    """For a new process may do better."""
    with serving("-m", "demo", code=BROKEN) as running:
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": stream}
        for _ in range(2):
            assert "Command buffer" in str(running.ask(CHAT, body)[1])
        status, told = running.ask(CHAT, body)
        assert (status, told["error"]["code"]) == (503, "device_lost") and running.headers["retry-after"]
        assert running.wait() == 1


def test_several_models(text_folder: Path, chat_folder: Path) -> None:
    with serving("-m", str(text_folder), "-m", str(chat_folder), "--alias", f"second={chat_folder}") as running:
        listed = running.ask("/v1/models")[1]["data"]
        assert [model["loaded"] for model in listed] == [True, False, False]
        first, second = listed[0]["id"], listed[1]["id"]
        assert "/" not in first + second
        for name in ("second", second, second.upper(), f"{second}:latest"):
            status, told = running.ask(
                CHAT, {"model": name, "messages": [{"role": "user", "content": "the"}], "max_tokens": 2}
            )
            assert (status, told["model"]) == (200, second), told
        status, told = running.ask("/v1/completions", {"model": first, "prompt": "the", "max_tokens": 2})
        assert (status, told["model"]) == (200, first)
        assert all(model["loaded"] for model in running.ask("/v1/models")[1]["data"])
        assert running.metric("mlx_gemma3_models_loaded") == 2
        assert running.ask("/v1/completions", {"model": "third", "prompt": "the"})[0] == 404


def test_doubled_slashes_and_unknown_paths(server: Server) -> None:
    assert server.ask("//v1/models")[0] == 200 and server.ask("//v1//models")[0] == 404
    assert server.ask("/v1/models", method="POST", body={})[0] == 405
    assert server.ask("/v1/nothing", {})[1]["error"]["message"].startswith("POST /v1/nothing")


def test_many_at_once_some_cut_off_some_wrong(server: Server) -> None:
    """A tenth of the thousand that `make test-slow` sends."""
    storm(server, 100)


@pytest.mark.slow
def test_a_thousand_at_once_some_cut_off_some_wrong(server: Server) -> None:
    storm(server, 100)
    before = resident(server)
    storm(server, 1000)
    assert resident(server) < before + (32 << 20)


def resident(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("no /proc here")
    return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmRSS"))) << 10


def storm(server: Server, count: int) -> None:
    wanted = server.ask(CHAT, {"messages": [{"role": "user", "content": "hello 5"}], "temperature": 0})[1]["choices"]
    statuses: list[int] = []
    numbers = iter(range(count))
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            body = {"messages": [{"role": "user", "content": f"hello {number % 7}"}], "temperature": 0}
            if number % 10 == 0:
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
                connection.request("POST", CHAT, json.dumps({**body, "stream": number % 20 == 0}))
                connection.sock.close()
                connection.close()
                continue
            if number % 10 == 1:
                assert server.ask(CHAT, b'{"messages": 5}')[0] == 400
                statuses.append(400)
                continue
            status, told = server.ask(CHAT, body)
            if status == 200 and number % 7 == 5:
                assert told["choices"][0]["message"] == wanted[0]["message"]
            statuses.append(status)

    threads = [threading.Thread(target=client) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses.count(400) == count // 10 and statuses.count(200) == count * 8 // 10
    idle(server)
    assert server.metric("mlx_gemma3_queue") == 0


def test_the_document_of_requests(server: Server) -> None:
    status, told = server.ask("/openapi.json")
    assert status == 200 and told["info"]["title"] == "mlx-gemma3"
    for path, methods in told["paths"].items():
        schema = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        if schema:
            assert schema["schema"]["$ref"].rpartition("/")[2] in told["components"]["schemas"]
            assert server.ask(path, {"nothing": 1})[0] == 400

"""Processes around the engine: forks, clients of what is no worker, signals, and the ends of workers."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from endless import endless
from worker_process import Worker

from mlx_gemma3.errors import OptionError, WorkerError
from mlx_gemma3.runtime import loading
from mlx_gemma3.worker import client, server
from mlx_gemma3.worker.client import WorkerEngine
from mlx_gemma3.worker.server import Limits, Server

FORK = """
import os, signal, sys, time, warnings
warnings.simplefilter("ignore")
import mlx_gemma3 as g3
from mlx_gemma3.worker.client import WorkerEngine

def in_child(*calls):
    child = os.fork()
    if child == 0:
        for call in calls:
            try:
                print("answered", call(), flush=True)
            except g3.Gemma3Error as error:
                print(error.code, "spawn" in str(error), "worker" in str(error), flush=True)
        os._exit(0)
    until = time.monotonic() + 20
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            print("hangs", flush=True)
            return
        time.sleep(0.02)

folder = sys.argv[1]
options = {"max_tokens": 900, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
engine, remote = g3.load(folder), WorkerEngine(folder)
session, there = engine.session(), remote.session()
running, far = engine.stream("the", **options), remote.stream("the", **options)
while running.next()["kind"] == "pending":
    pass
def read(stream):
    return list(stream)
in_child(
    lambda: engine.generate("the"), lambda: read(running), lambda: read(session.send("the")), lambda: session.messages,
    lambda: session.save("x"), lambda: engine.about, lambda: g3.load(folder),
    lambda: remote.generate("the"), lambda: read(far), lambda: there.messages,
)
print("then", flush=True)
in_child(lambda: engine.close(), lambda: running.cancel(), lambda: remote.close(), lambda: far.cancel())
for stream in (running, far):
    stream.cancel()
    assert stream.reply.finish_reason in ("cancelled", "stop")
assert engine.generate("the", max_tokens=2).tokens and remote.generate("the", max_tokens=2).tokens
child = os.fork()
if child == 0:
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0, "a child that does nothing ends as any"
remote.close()
engine.close()
print("parent goes on")
"""


def test_a_forked_process_is_told_and_its_parent_goes_on(chat_folder: Path, tmp_path: Path) -> None:
    chat_folder = endless(chat_folder, tmp_path)
    done = subprocess.run([sys.executable, "-c", FORK, str(chat_folder)], capture_output=True, text=True, timeout=60)
    told = ["closed True True"] * 10 + ["then"] + ["answered None"] * 4 + ["parent goes on"]
    assert (done.stdout.splitlines(), done.stderr) == (told, "")


def test_engines_opened_one_after_another_leave_no_thread(chat_folder: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("counts the threads in /proc")
    code = (
        "import os, sys, mlx_gemma3 as g3\n"
        "counts = []\n"
        "for _ in range(8):\n"
        "    with g3.load(sys.argv[1]) as engine:\n"
        "        engine.generate('the', max_tokens=2)\n"
        "    counts.append(len(os.listdir('/proc/self/task')))\n"
        "print(max(counts[2:]) - min(counts[2:]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(chat_folder)], capture_output=True, text=True, timeout=120)
    assert int(done.stdout) <= 1, "a thread that has just ended may still be counted"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exec sleep 1000", "nothing said in 2 seconds"),
        ("sleep 1000; true", "nothing said in 2 seconds"),
        ("exec >&-; sleep 1000", "closed its output"),
        ("echo hello; sleep 1000", "hello"),
        ("echo 1; cat", "1"),
        ("echo '{}'; cat", "{}"),
        ('echo \'{"kind": "hello", "protocol": 1}\'; cat', "protocol 1"),
        ("yes | tr -d '\\n'", "y"),
        ("exit 7", "status 7"),
        ("kill -9 $$", "killed by SIGKILL"),
        ("kill -40 $$", "killed by signal 40"),
    ],
)
def test_what_is_no_worker_is_an_error(script: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_SILENT_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        WorkerEngine("any", command=("sh", "-c", script), start_timeout=2)
    assert why in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - began < 15


HELLO = '{"kind": "hello", "protocol": 1, "limits": {"line_bytes": 1000000}}'
LOADED = '{"id": 1, "kind": "ok", "result": {}}'


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("kill -36 $$", "killed by signal 36"),
        ("echo nonsense; cat >/dev/null", "nonsense"),
        ('echo \'{"id": [], "kind": "x"}\'; echo \'[1]\'; cat >/dev/null', "[1]"),
        ('echo \'{"id": null, "kind": "error", "code": "request", "message": "what?"}\'; cat >/dev/null', "what?"),
        ("exec >&-; sleep 1000", "closed its output"),
    ],
)
def test_a_worker_that_goes_wrong_ends_its_requests(script: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_SILENT_SECONDS", 0.5)
    command = ("sh", "-c", f"echo '{HELLO}'; read line; echo '{LOADED}'; read line; {script}")
    with WorkerEngine("any", command=command) as remote:
        streams = [remote.stream("a")]
        for stream in streams:
            event = stream.next(timeout=20)
            assert event["kind"] == "error" and why in event["message"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x", {"deep": [1.0, float("nan")]}])
def test_what_json_cannot_hold_is_refused_before_it_is_sent(chat_folder: Path, value: Any) -> None:
    with WorkerEngine(chat_folder) as remote:
        with pytest.raises(OptionError, match=r"temperature|deep"):
            remote.generate("the", temperature=value)
        assert remote.generate("the", max_tokens=1).tokens


def test_ctrl_c_in_the_programs_group_is_not_for_the_worker(chat_folder: Path) -> None:
    code = (
        "import os, signal, sys, time\n"
        "from mlx_gemma3.worker.client import WorkerEngine\n"
        "with WorkerEngine(sys.argv[1]) as remote:\n"
        "    signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "    os.killpg(0, signal.SIGINT)\n"
        "    time.sleep(0.3)\n"
        "    print(remote.generate('the', max_tokens=2, seed=1).finish_reason)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(chat_folder)],
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert (done.stdout, done.stderr) == ("length\n", "")
    with Worker() as worker:  # started by another program, in its own group
        worker.process.send_signal(signal.SIGINT)
        assert worker.ask({"id": 1, "op": "status"})["kind"] == "ok"


@pytest.mark.parametrize("options", [("--max-line", "9" * 20), ("--max-queued", "0"), ("--max-sessions", "-1")])
def test_limits_out_of_range_are_usage_errors(options: tuple[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlx_gemma3.cli", "worker", *options], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and options[0] in done.stderr and "Traceback" not in done.stderr


def test_what_cannot_be_stopped_gets_its_last_event_all_the_same(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that is inside one long step, and a request that waits, when the input ends."""
    go = threading.Event()
    monkeypatch.setattr(server, "LEAVE_SECONDS", 0.5)
    monkeypatch.setattr(loading, "open_checkpoint", lambda *a, **k: go.wait(30))
    ours, theirs = os.pipe()
    events: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with os.fdopen(ours, "rb") as source, os.fdopen(theirs, "wb", buffering=0) as sink:
        run = threading.Thread(target=Server(source, events.put, Limits(), "0").run)
        run.start()
        for line in ({"id": 1, "op": "load", "model": str(chat_folder)}, {"id": 2, "op": "generate", "prompt": "a"}):
            sink.write(json.dumps(line).encode() + b"\n")
        while not any(thread.name == "mlx-gemma3" for thread in threading.enumerate()):
            time.sleep(0.01)
        sink.close()
        run.join(20)
        assert not run.is_alive()
        found = [json.loads(events.get(timeout=1)) for _ in range(3)]
        assert {event.get("id"): event.get("code") for event in found} == {None: None, 1: "closed", 2: "closed"}
        go.set()
        time.sleep(0.3)
        assert events.empty(), "the load's own end comes too late"


@pytest.mark.slow
def test_a_prompt_of_sixty_megabytes_gets_its_last_event(chat_folder: Path) -> None:
    with Worker() as worker:
        worker.send({"id": 1, "op": "load", "model": str(chat_folder)})
        worker.send(json.dumps({"id": 2, "op": "generate", "prompt": "the user " * (6 << 20)}).encode())
        worker.close()
        assert {event["id"] for event in worker.ends(2)} == {1, 2}

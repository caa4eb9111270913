"""A step on several machines over networks of different latency, beside the model of docs/macs.md.

    python bench/macs.py [-m MODEL] [--machines 2] [--latency 0,0.1,1,5]

The machines are processes here; between each two of them stands a relay that holds every byte back for the latency in
milliseconds. Prints milliseconds a step: measured, and what the model makes of the step without a relay.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

STEPS, RUNS = 12, 3

RANK = """
import json, sys, time
import mlx.core as mx
from mlx_gemma3.checkpoint.source import resolve
from mlx_gemma3.generation.prefill import prefill
from mlx_gemma3.runtime.loaded import EngineOptions
from mlx_gemma3.runtime.loading import follow, load_runner
from mlx_gemma3.runtime.machines import join

machines = join()
if machines.rank:
    follow(machines, print)
    sys.exit()
_, runner = load_runner(resolve(sys.argv[1]), EngineOptions(text_only=True))
calls, own = 0, machines.all_sum
def counted(x):
    global calls
    calls += 1
    return own(x)
machines.all_sum = counted
caches, found = runner.make_caches(), []
prefill(runner, [2, 5, 6, 7], caches)
for run in range(int(sys.argv[3]) + 1):
    calls, began = 0, time.perf_counter()
    for _ in range(int(sys.argv[2])):
        mx.eval(runner.step(mx.array([5]), [caches]))
    if run:
        found.append((time.perf_counter() - began) / int(sys.argv[2]) * 1000)
print(json.dumps({"milliseconds": found, "sums": calls / int(sys.argv[2])}))
runner.close()
"""


def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        found: int = held.getsockname()[1]
        return found


def first_in_line() -> None:
    """Let this thread run when it wakes up: MLX's ring keeps every core busy while it listens. Linux, as root."""
    if sys.platform == "linux":
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -20)


class Relay:
    """Takes connections for a port, and holds back what goes through them."""

    def __init__(self, target: int, milliseconds: float) -> None:
        self.target, self.delay = target, milliseconds / 1000
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            one, _ = self.listening.accept()
            while True:
                try:
                    other = socket.create_connection(("127.0.0.1", self.target))
                    break
                except OSError:
                    time.sleep(0.05)
            for source, sink in ((one, other), (other, one)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                held: list[tuple[float, int, bytes]] = []
                arrived = threading.Condition()
                threading.Thread(target=self._take, args=(source, held, arrived), daemon=True).start()
                threading.Thread(target=self._give, args=(sink, held, arrived), daemon=True).start()

    def _take(self, source: socket.socket, held: list[tuple[float, int, bytes]], arrived: threading.Condition) -> None:
        first_in_line()
        number = 0
        while data := source.recv(1 << 16):
            with arrived:
                heapq.heappush(held, (time.perf_counter() + self.delay, number, data))
                arrived.notify()
            number += 1

    @staticmethod
    def _give(sink: socket.socket, held: list[tuple[float, int, bytes]], arrived: threading.Condition) -> None:
        first_in_line()
        while True:
            with arrived:
                while not held:
                    arrived.wait()
                due, _, data = heapq.heappop(held)
            time.sleep(max(0.0, due - time.perf_counter()))
            sink.sendall(data)


def measure(model: str, machines: int, milliseconds: float) -> tuple[list[float], float]:
    """Milliseconds a step, several times; sums a step."""
    own = [port() for _ in range(machines)]
    to = [Relay(one, milliseconds).port for one in own] if milliseconds else own
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(machines):
            hosts = [[f"127.0.0.1:{own[one] if one == rank else to[one]}"] for one in range(machines)]
            file = Path(folder) / f"{rank}.json"
            file.write_text(json.dumps(hosts), encoding="utf-8")
            environment = {**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(file)}
            words = [sys.executable, "-c", RANK, model, str(STEPS), str(RUNS)]
            started.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL))
        out, _ = started[0].communicate(timeout=600)
        for one in started[1:]:
            one.wait(60)
    found = json.loads(out)
    return found["milliseconds"], found["sums"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--machines", type=int, default=2)
    parser.add_argument("--latency", default="0,0.1,1,5", help="milliseconds one way, with commas between them")
    given = parser.parse_args()
    base = 0.0
    print("latency, ms  measured, ms (lowest to highest)  model, ms  sums a step")
    for latency in map(float, given.latency.split(",")):
        found, sums = measure(given.model, given.machines, latency)
        middle = statistics.median(found)
        base = middle if not latency else base
        model = base + sums * 2 * (given.machines - 1) * latency
        spread = f"({min(found):.1f} to {max(found):.1f})"
        print(f"{latency:>11g}  {middle:>12.1f} {spread:<19}  {model:>9.1f}  {sums:>11g}", flush=True)


if __name__ == "__main__":
    main()

"""Eight clients of `mlx-gemma3 serve` at once against one: tokens a second, and whether the answers are the same.

    python bench/serving.py [--model gemma-3-270m] [--clients 8] [--tokens 48] [--rounds 3]

Prints the medians of the rounds; in each the clients ask one after the other, then all together.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

TOPICS = (
    "rivers",
    "bridges",
    "winter",
    "bread",
    "sailing",
    "letters",
    "gardens",
    "clocks",
    "maps",
    "glass",
    "wool",
    "salt",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    serve = ["serve", "--no-speculation"]  # what batching brings, by itself
    command = [sys.executable, "-m", "mlx_gemma3.cli", *serve, "-m", options.model, "--port", "0", "--quiet"]
    server = subprocess.Popen([*command, "--parallel", str(options.clients)], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        port = next(int(line.rpartition(":")[2]) for line in server.stderr if line.startswith("serving"))
        ones, manys = [], []
        for turn in range(options.rounds):
            prompts = [f"Round {turn}. A short history of {topic}:" for topic in TOPICS[: options.clients]]
            for prompt in prompts:
                answer(port, prompt, 1)  # read before, so that writing is what is measured
            began = time.perf_counter()
            alone = [answer(port, prompt, options.tokens) for prompt in prompts]
            ones.append(sum(count for _, count in alone) / (time.perf_counter() - began))
            began = time.perf_counter()
            with ThreadPoolExecutor(options.clients) as clients:
                together = list(clients.map(lambda prompt: answer(port, prompt, options.tokens), prompts))
            manys.append(sum(count for _, count in together) / (time.perf_counter() - began))
            same = sum(one == other for one, other in zip(alone, together, strict=True))
            print(
                f"round {turn}: one {ones[-1]:.1f} tokens/s, {options.clients} {manys[-1]:.1f}, {same} answers the same"
            )
        one, many = statistics.median(ones), statistics.median(manys)
        print(f"median: one {one:.1f} tokens/s, {options.clients} at once {many:.1f}: {many / one:.2f} times")
    finally:
        server.terminate()
        server.wait()
        server.stderr.close()


def answer(port: int, prompt: str, tokens: int) -> tuple[str, int]:
    """The text and its tokens, greedy."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    told = json.loads(connection.getresponse().read())
    connection.close()
    return told["choices"][0]["text"], told["usage"]["completion_tokens"]


if __name__ == "__main__":
    main()

"""How fast: kernels a step, the first prompt, command buffers, and beside mlx-lm and mlx-vlm. On the real 270M."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import mlx.core as mx

import mlx_gemma3 as g3
from mlx_gemma3.checkpoint.load import load_model
from mlx_gemma3.model.fused import gpu_kernels
from mlx_gemma3.model.runner import Runner
from mlx_gemma3.runtime.thread import IDLE

from .here import REAL, ROOT, metal, need_metal, need_real
from .judge import Report, Skipped

# What no kernel stands behind: other views of the same numbers.
VIEWS = frozenset("Transpose ExpandDims Squeeze Reshape Flatten Unflatten Broadcast Split Slice Full".split())
A_LAYER, OUTSIDE = 17, 8  # kernels of a step: of a layer; a packed embedding, its scale, the last norm, the head
OPERATIONS = (12, 24, 40, 80)
DEPTHS = (512, 32_000)
WARM = 0.25  # seconds by which the first prompt may be slower than the second
PEERS = ("mlx-lm", "mlx-vlm")
BEHIND = 0.9  # of mlx-lm's speed, at least
ROUNDS = 3


def kernels(report: Report) -> None:
    """The graph of one step as MLX gives it to the GPU, by kind of kernel."""
    need_real()
    made = Runner(load_model(REAL, dtype="bfloat16"), gpu_kernels())
    counts = drawn(made.step(mx.array([2]), [made.make_caches()]))
    layers = made.config.text.num_hidden_layers
    report.note(f"{counts.total()} kernels, {counts.total() / layers:.1f} for each of {layers} layers")
    report.note(", ".join(f"{count} {name}" for name, count in counts.most_common(12)))
    if not metal():
        raise Skipped(
            "the CPU builds norms, RoPE and attention of several primitives; how many kernels is Metal's to tell"
        )
    # Matrices that read the same rows and are packed in two ways are two products and a joining.
    parts = [len(matrices) for layer in made._decoder.layers for matrices in (layer.before[1], layer.after[3])]
    report.at_most("kernels", counts.total(), A_LAYER * layers + OUTSIDE + sum(2 * (count - 1) for count in parts))


def drawn(output: mx.array) -> Counter[str]:
    """The kernels of a graph that is not computed yet."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), output)
        names = Counter(re.findall(r'label ="([^"]+)"', path.read_text(encoding="utf-8")))
    return Counter({name: count for name, count in names.items() if name not in VIEWS})


def warm_up(report: Report) -> None:
    """Seconds to the first token of the first prompt and of the second: kernels are built while nobody waits."""
    need_real()
    took = {}
    for name, idle in (("at once", 0.0), ("after warming up", 10 * IDLE)):
        with g3.load(REAL) as engine:
            time.sleep(idle)
            if idle:
                engine._thread.call(lambda _: None)  # it waits for the end of that
            took[name] = [first_token(engine, number) for number in range(3)]
        report.note(f"{name}: " + ", ".join(f"{seconds * 1000:.0f}" for seconds in took[name]) + " ms")
    if not metal():
        raise Skipped("a CPU has no kernels to build")
    first, *later = took["after warming up"]
    report.at_most("the first prompt after the second", first - statistics.median(later), WARM, "s")


def first_token(engine: g3.Engine, number: int) -> float:
    """Seconds to the first token after a prompt of some 200, of words of its own: no cache knows them."""
    text = f"{number} " + " ".join(f"w{number}{other}" for other in range(60))
    began = time.perf_counter()
    with engine.stream(text, raw=True, max_tokens=2, temperature=0.0) as stream:
        next(iter(stream))
        return time.perf_counter() - began


def command_buffers(report: Report, source: str = REAL, depths: tuple[int, ...] = DEPTHS) -> None:
    """Decoding by MLX_MAX_OPS_PER_BUFFER: with few buffers a step, the host runs ahead and caches are copied."""
    if source == REAL:
        need_metal("the CPU has no command buffers")
        need_real()
    some, many = (OPERATIONS[::3], depths[:1]) if report.settings.quick else (OPERATIONS, depths)
    speeds = {}
    for operations in ("", *map(str, some)):
        speeds[operations] = decoding(source, many, operations)
        cells = (f"{depth:,}: {speed:.0f} tokens/s" for depth, speed in zip(many, speeds[operations], strict=True))
        report.note(f"{operations or 'unset':<6} {', '.join(cells)}")
    for place, depth in enumerate(many):
        best = max(speeds, key=lambda name: speeds[name][place])
        gain = speeds[best][place] / speeds[""][place] - 1
        report.note(f"at {depth:,} tokens {best or 'unset'} is best: {gain:+.1%} over unset")


def decoding(source: str, depths: tuple[int, ...], operations: str) -> list[float]:
    """Tokens a second after so many tokens each, in a process with this setting ("" for MLX's own)."""
    environment = {name: value for name, value in os.environ.items() if name != "MLX_MAX_OPS_PER_BUFFER"}
    environment |= {"MLX_MAX_OPS_PER_BUFFER": operations} if operations else {}
    words = ["bench", "-m", source, "--prompt-tokens", "16", "--context", ",".join(map(str, depths)), "--text-only"]
    done = subprocess.run(
        [sys.executable, "-m", "mlx_gemma3.cli", *words, "--json"], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"bench: {done.stderr.strip()}")
    return [row["tokens_per_second"]["median"] for row in json.loads(done.stdout)["decoding"]]


def peers(report: Report) -> None:
    """Tokens a second of prompts and of decoding, taking turns in one run; what bench/speed.py calls "words"."""
    if report.settings.quick:
        raise Skipped("not in a quick run: they have to be installed")
    need_real()
    python = report.settings.peers or installed()
    report.note(versions(python))
    dtype = "bfloat16" if metal() else "float32"
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / REAL
        g3.convert(REAL, folder, dequantize=True, dtype="bfloat16")
        for _ in range(ROUNDS if metal() else 1):
            for who in ("mlx-gemma3", *PEERS):
                try:
                    figures = words(who, python, folder, dtype)
                except RuntimeError as error:
                    if who not in PEERS:
                        raise
                    report.note(f"{who}: skipped, it does not run here: {error}")
                else:
                    found.setdefault(who, []).append(figures)
    for figure in ("prompt", "decode"):
        medians = {who: statistics.median(each[figure] for each in rounds) for who, rounds in found.items()}
        report.note(f"{figure}: " + ", ".join(f"{who} {speed:,.1f}" for who, speed in medians.items()) + " tokens/s")
        if metal() and "mlx-lm" in medians:
            share = medians["mlx-gemma3"] / medians["mlx-lm"]
            report.expect(share >= BEHIND, f"{figure} beside mlx-lm", got=f"{share:.2f}", want=f"at least {BEHIND}")


def versions(python: str) -> str:
    """Of the peers and of their MLX, as "mlx-lm 0.32.2, …"."""
    code = "import sys, importlib.metadata as m; print(', '.join(f'{x} {m.version(x)}' for x in sys.argv[1:]))"
    done = subprocess.run([python, "-c", code, *PEERS, "mlx"], capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"{python}: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    return done.stdout.strip()


def words(who: str, python: str, folder: Path, dtype: str) -> dict[str, float]:
    """One program's figures, in a process of its own."""
    script = "own_speed.py" if who == "mlx-gemma3" else f"{who.replace('-', '_')}_speed.py"
    command = [sys.executable if who == "mlx-gemma3" else python, str(ROOT / "bench" / "peers" / script)]
    done = subprocess.run([*command, "words", str(folder), dtype], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.strip().splitlines()[-1:]) or f"exit {done.returncode}")
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def installed() -> str:
    """An interpreter with the peers, in an environment of their own, which is kept for the next run."""
    folder = ROOT / ".venv-peers"
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-q", *PEERS, *(["mlx[cpu]"] if sys.platform != "darwin" else [])]
    for command in ([sys.executable, "-m", "venv", str(folder)], pip):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = " ".join(done.stderr.strip().splitlines()[-1:])
            raise Skipped(f"mlx-lm and mlx-vlm could not be installed: {reason}")
    return str(python)

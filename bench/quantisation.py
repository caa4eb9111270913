"""What packing costs: the 270M at several bits, as this project and as mlx-lm pack it, against its bfloat16 weights.

    python bench/quantisation.py [--mlx-lm-python PYTHON] [--text FILE] [--max-tokens 1536] [--source FOLDER]

Prints the table and writes docs/quantisation.md. Ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

import mlx_gemma3
from mlx_gemma3.checkpoint.safetensors import canonical_name
from mlx_gemma3.convert.converter import convert
from mlx_gemma3.convert.recipe import PRESETS
from mlx_gemma3.measure.evaluate import Opened, evaluate, open_model, read_text
from mlx_gemma3.measure.scores import Scores
from mlx_gemma3.model.gemma3 import Gemma3

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "bench" / "text" / "public.txt"
DOC = ROOT / "docs" / "quantisation.md"
SOURCE = "gemma-3-270m"

# A row of the table → what `convert` is told.
OURS: Mapping[str, Mapping[str, Any]] = {
    "8 bits": {"bits": 8},
    "8 bits, float32 scales": {"bits": 8, "dtype": "float32"},
    "6 bits": {"bits": 6},
    "5 bits": {"bits": 5},
    "5 bits, searched": {"bits": 5, "search": True},
    "4 bits": {"bits": 4},
    "4 bits, searched": {"bits": 4, "search": True},
    "4 bits, groups of 32": {"bits": 4, "group_size": 32},
    "preset small": {"preset": "small"},
    "preset balanced": {"preset": "balanced"},
    "preset quality": {"preset": "quality"},
}
MLX_LM = {"mlx-lm, `mlx_lm.convert -q`": [], "mlx-lm, `mlx_lm.convert -q --q-bits 8`": ["--q-bits", "8"]}
HEAD = (
    "| weights | MiB | bits a weight | KL divergence, mean | 99th percentile | same likeliest token | perplexity |\n"
    "|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Row:
    name: str
    nbytes: int  # of the tensors
    parameters: int
    scores: Scores
    same_as: str = ""  # another row, whose tensors are the same

    def __str__(self) -> str:
        cells = [self.name + (f" (the same as {self.same_as})" if self.same_as else "")]
        cells += [f"{self.nbytes / 2**20:.1f}", f"{8 * self.nbytes / self.parameters:.2f}"]
        if (distance := self.scores.distance) is None:
            cells += ["", "", ""]
        else:
            error = float(distance.divergence.std() / np.sqrt(self.scores.tokens))
            cells += [
                f"{distance.mean:.5f} ± {error:.5f}",
                f"{distance.quantile(0.99):.4f}",
                f"{distance.agreement:.2%}",
            ]
        return f"| {' | '.join([*cells, f'{self.scores.perplexity:.3f}'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mlx-lm-python", help="interpreter with mlx-lm, for its row")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--max-tokens", type=int, default=1536)
    parser.add_argument("--source", default=SOURCE, help="what is packed; its bfloat16 form is the reference")
    options = parser.parse_args()
    began = time.perf_counter()
    rows: list[Row] = []
    facts: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        plain = Path(name) / "bfloat16"
        parameters = convert(options.source, plain, dequantize=True, dtype="bfloat16", text_only=True).parameters
        reference = unpacked(open_model(plain, dtype="float32"))
        text = read_text(options.text)
        seen: dict[str, Row] = {}
        print(HEAD)
        candidates = packed(plain, Path(name), options.mlx_lm_python, facts)
        for label, folder in chain([("bfloat16", plain)], candidates):
            tensors = checksum(folder)
            if tensors in seen:
                row = replace(seen[tensors], name=label, same_as=seen[tensors].name)
            else:
                model = reference if folder == plain else unpacked(open_model(folder, dtype="float32"))
                against = None if folder == plain else reference
                scores = evaluate(model, text=text, against=against, max_tokens=options.max_tokens).words
                assert scores is not None
                row = seen[tensors] = Row(label, tensor_bytes(folder), parameters, scores)
            rows.append(row)
            print(row, flush=True)
    arguments = f" --source {options.source}" * (options.source != SOURCE)
    arguments += f" --max-tokens {options.max_tokens}" * (options.max_tokens != parser.get_default("max_tokens"))
    where = options.text.resolve()
    report = REPORT.format(
        command="python bench/quantisation.py" + " --mlx-lm-python PYTHON" * bool(facts) + arguments,
        table="\n".join([HEAD, *map(str, rows)]),
        tokens=rows[0].scores.tokens,
        text=where.relative_to(ROOT) if where.is_relative_to(ROOT) else where.name,
        lm=f", mlx-lm {facts['mlx-lm']} (MLX {facts['mlx']})" if facts else "",
        own=mlx_gemma3.__version__,
        mlx=version("mlx"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        minutes=(time.perf_counter() - began) / 60,
        source=options.source,
        presets="\n".join(f"- {name}: {what}" for name, (what, _) in PRESETS.items()),
        caveat=CAVEAT if options.source == SOURCE else "",
    )
    DOC.write_text(report, encoding="utf-8")


def packed(plain: Path, work: Path, mlx_lm: str | None, facts: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """Each row's name and a folder for it, one at a time: the folder is gone when the next is asked for."""
    for label, settings in OURS.items():
        with tempfile.TemporaryDirectory(dir=work) as name:
            folder = Path(name) / "packed"
            convert(plain, folder, **settings)
            yield label, folder
    for label, words in MLX_LM.items() if mlx_lm else ():
        with tempfile.TemporaryDirectory(dir=work) as name:
            folder = Path(name) / "packed"
            run(mlx_lm, "-m", "mlx_lm", "convert", "--hf-path", str(plain), "--mlx-path", str(folder), "-q", *words)
            asked = (
                "import json; from importlib.metadata import version as v; print(json.dumps([v('mlx-lm'), v('mlx')]))"
            )
            facts["mlx-lm"], facts["mlx"] = json.loads(run(mlx_lm, "-c", asked))
            yield label, folder


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def tensors_of(folder: Path) -> Iterator[tuple[str, mx.array]]:
    for path in sorted(folder.glob("model*.safetensors")):
        loaded = mx.load(str(path))
        assert isinstance(loaded, dict)
        yield from loaded.items()


def tensor_bytes(folder: Path) -> int:
    return sum(array.nbytes for _, array in tensors_of(folder))


def checksum(folder: Path) -> str:
    """Of every tensor, its canonical name and its type: two folders with one checksum are the same weights."""
    digests = []
    for name, array in tensors_of(folder):
        data = np.array(array.view(mx.uint8), copy=False).data
        digests.append(f"{canonical_name(name)} {array.dtype} {array.shape} {hashlib.sha256(data).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def unpacked(opened: Opened) -> Opened:
    """The same numbers as plain float32 matrices: MLX's CPU backend multiplies packed ones forty times slower."""
    packings = {
        path: module
        for path, module in opened.model.named_modules()
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
    }
    if not packings or mx.default_device().type == mx.DeviceType.gpu:
        return opened
    weights = []
    for name, array in tree_flatten(opened.model.parameters()):
        path, _, part = name.rpartition(".")
        if path not in packings:
            weights.append((name, array))
        elif part == "weight":
            module = packings[path]
            weights.append(
                (name, mx.dequantize(array, module.scales, module.biases, module.group_size, module.bits, module.mode))
            )
    model = Gemma3(replace(opened.model.config, quantization=None))
    model.load_weights(weights)
    mx.eval(model.parameters())
    return replace(opened, model=model)


CAVEAT = """\
**What this cannot show.** The only Gemma 3 weights at hand without an account are those of a GGUF file that is itself
quantised (Q4_K_M: the embedding Q8_0, the other matrices Q5_0, Q4_K, Q6_K and Q8_0). Its numbers, written out in
bfloat16, are the source here: they were rounded once before, on other grids. And it is the smallest Gemma 3, for which
plain 4 bits are too few (Google trained a version of it for them); larger models lose far less, by what others report.
They were not at hand, so nothing here says how much.
"""

REPORT = """\
# Quantisation

Written by `bench/quantisation.py`; do not edit. The command:

    {command}

{source} from its bfloat16 weights to MLX's packed groups: of 64 numbers where nothing else is said, with bfloat16
scales and biases. Measured against those bfloat16 weights on the first {tokens:,} tokens of `{text}` (English, Spanish,
Chinese, German; bench/text/SOURCES.md), activations in float32, so that only the weights differ. KL divergence is that
of the packed model from the plain one, in nats a token, with the standard error of the mean.

{table}

Codes are chosen for the scales as they are written, in bfloat16; mlx-lm chooses them before it rounds the scales, which
nearly doubles the divergence at 8 bits. "Searched" (`--search`, and the presets small and balanced) tries three ranges
for each group, each improved once by least squares, and keeps the one with the smallest squared error.

The presets:

{presets}

{caveat}
This project {own}, MLX {mlx}{lm}. Python {python}, {system}; {minutes:.0f} minutes.
"""


if __name__ == "__main__":
    main()

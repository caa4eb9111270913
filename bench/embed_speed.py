"""Vectors of many texts: this project beside sentence-transformers, on one generated folder, in one run.

    python bench/embed_speed.py --layers 6 --texts 1000 --peer .peers/bin/python

The folder has EmbeddingGemma's shapes (or with --tiny those of the tests) and random weights, and texts of 20 to 2,000
tokens, as many short as long ones by their logarithm. Each side runs in a process of its own, loads, embeds a few
texts to warm up, and is timed from texts to vectors; --rounds times in turn, the best of each counts. --peer: a Python
with sentence-transformers; its vectors are compared with ours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SHAPES: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 2048,
}
TINY: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "head_dim": 24,
    "query_pre_attn_scalar": 24,
    "sliding_window": 16,
}
SHORTEST, LONGEST = 20, 2000  # tokens

PEER = """
import json, sys, time
import numpy as np, torch
from sentence_transformers import SentenceTransformer
folder, texts, out = sys.argv[1:]
texts = json.load(open(texts))
model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float32})
model.encode(texts[:8])
began = time.perf_counter()
vectors = model.encode(texts)
print(json.dumps({"seconds": time.perf_counter() - began, "threads": torch.get_num_threads()}))
np.save(out, vectors)
"""
OURS = """
import json, sys, time
import numpy as np
import mlx_gemma3 as g3
folder, texts, out = sys.argv[1:]
texts = json.load(open(texts))
with g3.load(folder) as engine:
    engine.embed(texts[:8])
    began = time.perf_counter()
    work = engine.embedding(texts, normalize=False)
    vectors = work.array()
    print(json.dumps({"seconds": time.perf_counter() - began, "tokens": sum(work.tokens)}))
np.save(out, vectors)
"""


def make_folder(folder: Path, *, layers: int, tiny: bool) -> Path:
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    import tiny as tiny_checkpoint
    import tiny_embedding

    config = tiny_embedding.CONFIG | SHAPES | (TINY if tiny else {}) | {"num_hidden_layers": layers}
    tiny_embedding.CONFIG, tiny_embedding.MAX_LENGTH = config, 2048
    tiny_embedding.WIDTH, tiny_embedding.INNER = config["hidden_size"], 4 * config["hidden_size"]
    assert tiny_checkpoint.tensor_shapes(config)
    return tiny_embedding.write(folder, "plain")


def make_texts(count: int) -> list[str]:
    """Random words: a letter or two a token."""
    random = np.random.default_rng(1)
    lengths = np.exp(random.uniform(np.log(SHORTEST), np.log(LONGEST), count)).astype(int)
    letters = np.array(list("bcdfgjklpqvwxyz"))
    return ["".join(random.choice(letters, length - 2)) for length in lengths]


def run(python: str, code: str, *words: str) -> dict[str, Any]:
    done = subprocess.run([python, "-c", code, *words], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=6, help="EmbeddingGemma has 24")
    parser.add_argument("--tiny", action="store_true", help="the tests' width instead of EmbeddingGemma's")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--peer", help="a Python with sentence-transformers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        folder = make_folder(place / "model", layers=options.layers, tiny=options.tiny)
        (place / "texts.json").write_text(json.dumps(make_texts(options.texts)))
        words = (str(folder), str(place / "texts.json"))
        best: dict[str, float] = {}
        tokens = 0
        for _ in range(options.rounds):
            for name, python, code in (("ours", sys.executable, OURS), ("theirs", options.peer, PEER)):
                if python is None:
                    continue
                found = run(python, code, *words, str(place / f"{name}.npy"))
                tokens = found.get("tokens", tokens)
                best[name] = min(best.get(name, np.inf), found["seconds"])
        about: dict[str, Any] = {"texts": options.texts, "tokens": tokens, "layers": options.layers}
        about |= {"width": 48 if options.tiny else 768, "at": time.strftime("%Y-%m-%d")}
        about |= {f"{name}_tokens_per_second": round(tokens / seconds) for name, seconds in best.items()}
        if options.peer:
            about["ratio"] = round(best["theirs"] / best["ours"], 2)
            apart = np.abs(np.load(place / "ours.npy") - np.load(place / "theirs.npy")).max()
            about["largest_difference"] = float(apart)
        print(json.dumps(about))


if __name__ == "__main__":
    main()

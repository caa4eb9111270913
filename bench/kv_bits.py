"""What 8- and 4-bit keys and values cost: KL divergence and top-1 agreement against 16 bits, on one text.

    python bench/kv_bits.py [--model gemma-3-270m] [--tokens 4000] [--text FILE]

The text is read once with each kind of cache, side by side, in chunks; each position's next-token distribution is
compared. Prints a table; docs/conversations.md carries it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_gemma3.checkpoint.load import load_model, open_checkpoint
from mlx_gemma3.checkpoint.source import resolve
from mlx_gemma3.model.runner import on_device

KINDS = ((8, 16), (4, 16), (8, 8), (4, 4))  # bits of global and of local layers
CHUNK, SLICE = 256, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--text", type=Path, default=sorted((Path(__file__).parent / "text").glob("*.txt"))[0])
    options = parser.parse_args()
    checkpoint = open_checkpoint(resolve(options.model), text_only=True)
    runner = on_device(load_model(checkpoint, text_only=True))
    ids = checkpoint.tokenizer().encode(options.text.read_text(encoding="utf-8"), bos=True)[: options.tokens]
    exact = runner.make_caches()
    others = [runner.make_caches(kv_bits=far, local_kv_bits=near) for far, near in KINDS]
    divergence: list[list[float]] = [[] for _ in KINDS]
    agree: list[list[bool]] = [[] for _ in KINDS]
    for start in range(0, len(ids), CHUNK):
        piece = [ids[start : start + CHUNK]]
        rows = [runner.read(piece, caches=caches) for caches in (exact, *others)]
        for at in range(0, len(piece[0]), SLICE):
            want, *got = (runner.head(hidden[:, at : at + SLICE])[0] for hidden in rows)
            p = want - mx.logsumexp(want, axis=-1, keepdims=True)
            for n, logits in enumerate(got):
                q = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                divergence[n] += (mx.exp(p) * (p - q)).sum(axis=-1).tolist()  # type: ignore[operator]
                agree[n] += (mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)).tolist()  # type: ignore[operator]
    print(f"{options.model}, {len(ids)} tokens of {options.text.name}")
    print("| global | local | bytes of the caches | KL mean | KL 99 % | top-1 agreement |")
    print("|---|---|---|---|---|---|")
    print(f"| 16 | 16 | {exact.nbytes / 2**20:.1f} MiB | | | |")
    for (far, near), caches, kl, same in zip(KINDS, others, divergence, agree, strict=True):
        high = np.quantile(kl, 0.99)
        size = caches.nbytes / 2**20
        print(f"| {far} | {near} | {size:.1f} MiB | {np.mean(kl):.5f} | {high:.4f} | {100 * np.mean(same):.2f} % |")


if __name__ == "__main__":
    main()

"""Peer: logits of mlx-vlm (float32) for the prompts of an npz. Runs in an interpreter of its own.

    python mlx_vlm_logits.py FOLDER PROMPTS.npz LOGITS.npz

The files are those of transformers_logits.py. The model gets what mlx_vlm's generate_step gives it: ids, pixels and a
mask of ones into get_input_embeddings, all that comes out of that into the language model, with its prompt cache. To be
sure of it, generate_step itself runs too, and the logits of its first token must be ours of the last position.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx_vlm
import numpy as np
from mlx.utils import tree_map
from mlx_vlm.generate import generate_step
from mlx_vlm.models.cache import make_prompt_cache
from mlx_vlm.utils import load_model


def main(folder: str, prompts: str, out: str) -> None:
    model = load_model(Path(folder))
    # Weights that the file holds in bfloat16 become float32 without a change; else the sums would be in bfloat16.
    model.update(tree_map(lambda array: array.astype(mx.float32), model.parameters()))
    data = np.load(prompts)
    results = {}
    for name in (key.removesuffix(".ids") for key in data.files if key.endswith(".ids")):
        ids = mx.array(data[f"{name}.ids"].astype(np.int32))[None]
        pixels = data[f"{name}.pixels"]
        pixel_values = mx.array(pixels.transpose(0, 3, 1, 2)) if len(pixels) else None  # (n, 3, H, W)
        results[f"{name}.logits"] = logits = logits_of(model, ids, pixel_values)
        generated = first_of_generate(model, ids, pixel_values)
        if np.abs(log_softmax(logits[-1]) - generated).max() > 1e-3:
            sys.exit(f"{name}: not the logits that mlx_vlm's generate_step computes")
    facts = {"mlx-vlm": mlx_vlm.__version__, "mlx": mx.__version__, "hidden_size": model.config.hidden_size}
    np.savez(out, facts=json.dumps(facts), **results)


def logits_of(model: object, ids: mx.array, pixel_values: mx.array | None) -> np.ndarray:
    """(L, V) float32 at every position."""
    given = model.get_input_embeddings(ids, pixel_values, mask=mx.ones(ids.shape, mx.int32)).to_dict()
    rows = given.pop("inputs_embeds")
    rest = {name: value for name, value in given.items() if value is not None}
    cache = make_prompt_cache(model.language_model)
    return np.array(model.language_model(ids, inputs_embeds=rows, cache=cache, **rest).logits[0].astype(mx.float32))


def first_of_generate(model: object, ids: mx.array, pixel_values: mx.array | None) -> np.ndarray:
    """(V) float32 log-probabilities from which mlx_vlm's own generation takes its first token."""
    mask = mx.ones(ids.shape, mx.int32)
    _, logprobs = next(generate_step(ids, model, pixel_values, mask, max_tokens=1, temperature=0.0))
    return np.array(logprobs.astype(mx.float32)).reshape(-1)


def log_softmax(row: np.ndarray) -> np.ndarray:
    high = row.max()
    return row - high - np.log(np.exp(row - high).sum())


if __name__ == "__main__":
    main(*sys.argv[1:4])

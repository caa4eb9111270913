"""mlx-lm's side of bench/speed.py: python mlx_lm_speed.py words FOLDER DTYPE"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from words_plan import as_graph, build_time, measure, prompt


def words(folder: str, dtype: str) -> dict[str, float]:
    model, _ = load(folder)
    model.set_dtype(getattr(mx, dtype))
    mx.eval(model.parameters())

    def generate(ids: list[int], count: int) -> Iterator[int]:
        return (int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=count))

    found = measure(generate)
    found |= as_graph(found)  # it has no other
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([prompt(32)]), cache=cache))
    token = mx.array([5])
    found["build"] = build_time(lambda: mx.argmax(model(token[None], cache=cache)[:, -1], axis=-1), mx.eval)
    return found


if __name__ == "__main__":
    print(json.dumps({"words": words}[sys.argv[1]](*sys.argv[2:])))

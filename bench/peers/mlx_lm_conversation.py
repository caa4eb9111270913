"""mlx-lm's side of bench/conversation.py: the same prompts through its own prompt cache.

    python mlx_lm_conversation.py MODEL < plan.json

Does what mlx-lm's server does: the longest common prefix is kept where the cache can be trimmed to it, else the prompt
is read from the start.
"""

from __future__ import annotations

import json
import sys
import time

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache


def main() -> None:
    model, _ = load(sys.argv[1])
    model.set_dtype(mx.float32)
    cache, held, rows = make_prompt_cache(model), [], []
    for _, prompt in json.load(sys.stdin):
        began = time.perf_counter()
        pairs = enumerate(zip(held, prompt, strict=False))
        shared = next((n for n, (old, new) in pairs if old != new), min(len(held), len(prompt)))
        shared = min(shared, len(prompt) - 1)
        surplus = len(held) - shared
        if surplus and can_trim_prompt_cache(cache):
            trim_prompt_cache(cache, surplus)
        elif surplus:
            cache, shared = make_prompt_cache(model), 0
        # max_tokens=0 chooses the first token and computes no step ahead: the cache then holds the prompt exactly.
        for _ in generate_step(mx.array(prompt[shared:]), model, max_tokens=0, prompt_cache=cache):
            pass
        rows.append((len(prompt) - shared, time.perf_counter() - began))
        assert cache[0].offset == len(prompt), (cache[0].offset, len(prompt))
        held = prompt
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

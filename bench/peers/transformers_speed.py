"""transformers' side of bench/speed.py, on PyTorch's CPU backend: python transformers_speed.py words FOLDER DTYPE"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM
from words_plan import measure


def words(folder: str, dtype: str) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    @torch.no_grad()
    def generate(ids: list[int], count: int) -> Iterator[int]:
        given, cache = torch.tensor([ids]), None
        for _ in range(count):
            out = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, given = out.past_key_values, out.logits[:, -1:].argmax(-1)
            yield int(given)

    return measure(generate)


if __name__ == "__main__":
    print(json.dumps({"words": words}[sys.argv[1]](*sys.argv[2:])))

"""mlx-vlm's side of bench/speed.py: one measurement in a process of its own, printed as JSON.

    python mlx_vlm_speed.py words FOLDER DTYPE
    python mlx_vlm_speed.py picture FOLDER DTYPE
    python mlx_vlm_speed.py question FOLDER DTYPE PICTURE

A second question gets what mlx-vlm's own chat gives it: the prompt cache of the first, and a cache of picture rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map
from mlx_vlm import VisionFeatureCache, load, stream_generate
from mlx_vlm.generate import PromptCacheState, generate_step
from mlx_vlm.prompt_utils import apply_chat_template
from mlx_vlm.utils import load_model
from pictures_plan import QUESTIONS, measure_picture, measure_questions
from words_plan import measure


def words(folder: str, dtype: str) -> dict[str, float]:
    model = in_dtype(load_model(Path(folder)), dtype)

    def generate(ids: list[int], count: int) -> Iterator[int]:
        steps = generate_step(mx.array([ids]), model, None, None, max_tokens=count, temperature=0.0)
        return (int(token) for token, _ in steps)

    return measure(generate)


def picture(folder: str, dtype: str) -> dict[str, float]:
    model = in_dtype(load_model(Path(folder)), dtype)

    def encode(pixels: mx.array) -> None:
        """As the model's get_input_embeddings does it."""
        rows, _, _ = model.vision_tower(pixels.astype(getattr(mx, dtype)), output_hidden_states=True)
        mx.eval(model.multi_modal_projector(rows))

    return measure_picture(encode, model.config.vision_config.image_size)


def question(folder: str, dtype: str, path: str) -> dict[str, float]:
    model, processor = load(folder)
    in_dtype(model, dtype)
    kept = {"prompt_cache_state": PromptCacheState(), "vision_cache": VisionFeatureCache()}

    def ask(text: str) -> None:
        words = apply_chat_template(processor, model.config, text, num_images=1)
        for _ in stream_generate(model, processor, words, image=[path], max_tokens=1, temperature=0.0, **kept):
            pass

    return measure_questions(ask, QUESTIONS)


def in_dtype(model: object, dtype: str) -> object:
    """Every float in another type; packed words stay packed."""
    kind = getattr(mx, dtype)
    model.update(tree_map(lambda x: x.astype(kind) if mx.issubdtype(x.dtype, mx.floating) else x, model.parameters()))
    mx.eval(model.parameters())
    return model


if __name__ == "__main__":
    print(json.dumps({"words": words, "picture": picture, "question": question}[sys.argv[1]](*sys.argv[2:])))

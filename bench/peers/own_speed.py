"""This project's side of bench/speed.py: one measurement in a process of its own, printed as JSON.

python own_speed.py words FOLDER DTYPE
python own_speed.py picture FOLDER DTYPE
python own_speed.py question FOLDER DTYPE PICTURE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
from pictures_plan import QUESTIONS, measure_picture, measure_questions
from words_plan import as_graph, build_time, measure, prompt

import mlx_gemma3 as g3
from mlx_gemma3.checkpoint.load import load_model
from mlx_gemma3.generation.batch import decode
from mlx_gemma3.generation.prefill import prefill
from mlx_gemma3.generation.sampling import Sampling
from mlx_gemma3.model.fused import gpu_kernels
from mlx_gemma3.model.runner import Runner, on_device

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conversation import here

GREEDY = Sampling(temperature=0)


def words(folder: str, dtype: str) -> dict[str, float]:
    runner = on_device(load_model(folder, dtype=dtype, text_only=True))

    def generate(ids: list[int], count: int) -> Iterator[int]:
        caches = runner.make_caches()
        return decode(runner, prefill(runner, ids, caches), caches, sampling=GREEDY, max_tokens=count)

    found = measure(generate)
    runner = Runner(runner.model, gpu_kernels())
    found |= as_graph(measure(generate))
    caches = runner.make_caches()
    prefill(runner, prompt(32), caches)
    token = mx.array([5])
    found["build"] = build_time(lambda: mx.argmax(runner.step(token, [caches]), axis=-1), mx.eval)
    return found


def picture(folder: str, dtype: str) -> dict[str, float]:
    runner = on_device(load_model(folder, dtype=dtype))
    return measure_picture(lambda pixels: mx.eval(runner.encode_images(pixels)), runner.config.vision.image_size)


def question(folder: str, dtype: str, path: str) -> dict[str, float]:
    with g3.load(folder, dtype=dtype) as engine:

        def ask(text: str) -> None:
            engine.generate(text, images=[Path(path)], max_tokens=1, temperature=0.0, raw=False)

        return measure_questions(ask, QUESTIONS)


def turns(folder: str) -> list[tuple[int, float]]:
    return here(folder, json.load(sys.stdin))


if __name__ == "__main__":
    measured = {"words": words, "picture": picture, "question": question, "turns": turns}
    print(json.dumps(measured[sys.argv[1]](*sys.argv[2:])))

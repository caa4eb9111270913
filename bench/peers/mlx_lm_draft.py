"""Does a draft change mlx-lm's answer past the sliding window? And ours? One random checkpoint, one run.

    python bench/peers/mlx_lm_draft.py --peer-python PYTHON

PYTHON is an interpreter with mlx-lm. The checkpoint is tiny, random, float32, of window 16, without a tokenizer; its
draft is the same with a little noise on its weights, so that some of its tokens are right and some are not. Greedy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
TOKENS, DEPTH = 80, 4
PROMPTS = (4, 40)  # tokens: within the window at first, and past it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter with mlx-lm")
    parser.add_argument("--folders", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folders:
        print(json.dumps([peer(*options.folders, prompt(count)) for count in PROMPTS]))
        return
    if options.peer_python is None:
        parser.error("--peer-python is needed")
    with tempfile.TemporaryDirectory() as name:
        folders = [write(Path(name) / kind, noise) for kind, noise in (("model", 0.0), ("draft", 0.05))]
        done = subprocess.run(
            [options.peer_python, __file__, "--folders", *folders], capture_output=True, text=True, check=True
        )
        theirs = json.loads(done.stdout.splitlines()[-1])
        for count, (version, plain, drafted, error) in zip(PROMPTS, theirs, strict=True):
            print(f"{count} tokens of prompt, window 16, {TOKENS} of answer")
            print(f"  mlx-lm {version}: {told(plain, drafted)}{' ' + error if error else ''}")
            own = ours(*folders, prompt(count))
            print(f"  mlx-gemma3: {told(*own)}; its plain tokens are mlx-lm's for {agree(own[0], plain)}")


def prompt(count: int) -> list[int]:
    return [2, *np.random.default_rng(count).integers(110, 499, count - 1).tolist()]


def agree(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def told(plain: list[int], drafted: list[int]) -> str:
    same = agree(plain, drafted)
    return (
        f"with a draft the same {same} tokens" if same == len(plain) else f"with a draft another text from token {same}"
    )


def write(folder: Path, noise: float) -> Path:
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    tensors = tiny.random_tensors(tiny.text_config(), seed=4)
    random = np.random.default_rng(1)
    for name, values in tensors.items():
        tensors[name] = (values * (1 + noise * random.standard_normal(values.shape))).astype(np.float32)
    return Path(tiny.write_folder(folder, tiny.text_config(), tensors, style="text"))


def peer(folder: Path, draft_folder: Path, ids: list[int]) -> tuple[str, list[int], list[int], str | None]:
    from importlib.metadata import version

    from mlx_lm.generate import generate_step, speculative_generate_step
    from mlx_lm.utils import load_model

    model, draft = load_model(folder)[0], load_model(draft_folder)[0]
    model.set_dtype(mx.float32)
    draft.set_dtype(mx.float32)
    plain = [int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=TOKENS)]
    drafted: list[int] = []
    error = None
    try:
        for token, *_ in speculative_generate_step(
            mx.array(ids), model, draft, max_tokens=TOKENS, num_draft_tokens=DEPTH
        ):
            drafted.append(int(token))
    except Exception as failed:
        error = f"{type(failed).__name__}: {failed}"
    return version("mlx-lm"), plain, drafted, error


def ours(folder: Path, draft_folder: Path, ids: list[int]) -> tuple[list[int], list[int]]:
    from mlx_gemma3 import load_model
    from mlx_gemma3.generation.batch import Batch, Row
    from mlx_gemma3.generation.choice import Chooser
    from mlx_gemma3.generation.depth import Depth
    from mlx_gemma3.generation.prefill import prefill
    from mlx_gemma3.generation.sampling import Sampling
    from mlx_gemma3.generation.speculation import DraftModel
    from mlx_gemma3.model.runner import on_device

    class Always(Depth):
        def depths(self, odds: object, rows: int, prices: object = ()) -> list[int]:
            return [min(DEPTH, len(chances)) for chances in odds]  # type: ignore[attr-defined]

    runner, draft = (on_device(load_model(path, dtype="float32")) for path in (folder, draft_folder))
    found = []
    for guesses in (False, True):
        caches, chooser = runner.make_caches(), Chooser(Sampling(temperature=0))
        logits = prefill(runner, ids, caches)
        row = Row(caches, chooser, TOKENS)
        if guesses:
            other = draft.make_caches()
            prefill(draft, ids, other)
            row.proposers = [DraftModel(draft, other, chooser, None)]
        batch = Batch(runner, Always())
        batch.join(row, logits)
        written: list[int] = []
        while not row.over:
            written += [one.token for one in batch.next()]
        if guesses:
            print(f"  ({row.accepted} of {row.drafted} guessed tokens were right)")
        found.append(written)
    return found[0], found[1]


if __name__ == "__main__":
    main()

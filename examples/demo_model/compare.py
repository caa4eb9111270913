"""The demo's answers against transformers, and against the network as it was trained.

    python -m examples.demo_model.compare [--count 50] [--run RUN]

transformers opens the plain folder that `convert --dequantize` writes; both get the same ids and pixels and answer
greedily. With --run, the float32 weights of a training run answer too, before they were packed. Needs the `reference`
extra (torch, transformers).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Gemma3ForConditionalGeneration

import mlx_gemma3 as g3
from mlx_gemma3.prompt.processor import Prompt

from .accuracy import ANSWER_TOKENS, SEED, answers, messages, share
from .network import Gemma3, Sizes
from .questions import Sample, sample

NextToken = Callable[[list[int], Prompt], int]


def reference(folder: Path) -> NextToken:
    """transformers on a plain folder, the whole sequence anew for each token."""
    model = Gemma3ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)

    def step(tokens: list[int], prompt: Prompt) -> int:
        ids = torch.tensor([tokens])
        pixels = None if prompt.pixels is None else torch.from_numpy(prompt.pixels).permute(0, 3, 1, 2)
        types = (ids == model.config.image_token_id).long()
        return int(model(input_ids=ids, pixel_values=pixels, token_type_ids=types).logits[0, -1].argmax())

    return step


def trained(run: Path, image_token: int) -> NextToken:
    """The training network with a run's weights."""
    state = torch.load(run / "state.pt")["model"]
    model = Gemma3(Sizes(len(state["language_model.model.embed_tokens.weight"])))
    model.load_state_dict(state)

    def step(tokens: list[int], prompt: Prompt) -> int:
        ids = torch.tensor([tokens])
        image = ids == image_token
        starts = image & ~torch.nn.functional.pad(image, (1, 0))[:, :-1]
        batch = {
            "tokens": ids,
            "positions": torch.arange(len(tokens))[None],
            "branches": torch.zeros_like(ids),
            "blocks": torch.where(image, starts.long().cumsum(1), 0),
            "image_at": image[0].nonzero()[:, 0],
            "asked": torch.tensor([len(tokens) - 1]),
        }
        levels = torch.zeros(0, model.sizes.image, model.sizes.image, 3)
        if prompt.pixels is not None:
            levels = ((torch.from_numpy(prompt.pixels) + 1) * 127.5).round()
        return int(model(batch, model.see(levels)).argmax())

    return step


@torch.no_grad()
def answered(step: NextToken, processor: g3.Processor, one: Sample) -> str:
    """A greedy answer, token by token."""
    prompt = processor.prepare(messages(one.question, len(one.pictures)), list(one.pictures), special=False)
    tokens = list(prompt.tokens)
    while len(tokens) < len(prompt.tokens) + ANSWER_TOKENS:
        token = step(tokens, prompt)
        if token in processor.config.eos_token_ids:
            break
        tokens.append(token)
    return processor.tokenizer.decode(tokens[len(prompt.tokens) :]).strip()


def main() -> None:
    """Print how many answers are the same."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="demo")
    options.add_argument("--count", type=int, default=50)
    options.add_argument("--seed", type=int, default=SEED)
    options.add_argument("--run", type=Path, help="a folder that train.py wrote")
    chosen = options.parse_args()
    samples = list(sample(chosen.seed, chosen.count))
    with tempfile.TemporaryDirectory() as place, g3.load(chosen.model) as engine:
        plain = Path(place) / "plain"
        g3.convert(chosen.model, plain, dequantize=True, dtype="float32")
        processor = g3.Processor(g3.Tokenizer.from_folder(plain), g3.Config.from_file(plain / "config.json"))
        ours = answers(engine, samples)
        others = {"transformers, plain folder": reference(plain)}
        if chosen.run:
            others["the training network"] = trained(chosen.run, processor.config.image_token_id)
        sys.stdout.write(f"mlx-gemma3, packed: {share(samples, ours):.1%} right\n")
        for name, step in others.items():
            theirs = [answered(step, processor, one) for one in samples]
            same = sum(a == b for a, b in zip(ours, theirs, strict=True))
            sys.stdout.write(f"{name}: {same} of {len(samples)} answers the same, {share(samples, theirs):.1%} right\n")


if __name__ == "__main__":
    main()

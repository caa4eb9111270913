"""`mlx-gemma3 tune`: teach a model with an adapter."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from ..boundary.sizes import read_size
from .terminal import Pace, Status, emit, leave, say, tell


def tune(
    data: Annotated[
        str, typer.Option(help="A .jsonl, .json or .txt file, a folder, or a data set of the Hub.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The adapter's folder.", show_default=False)],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Alias, folder, owner/name on the Hub, or .gguf file.")
    ] = "gemma-3-4b-it",
    valid: Annotated[str | None, typer.Option(help="More data, to validate on.", show_default=False)] = None,
    valid_share: Annotated[float, typer.Option(help="Or a share of the data, 0 to 0.9.")] = 0.0,
    rank: Annotated[int, typer.Option(help="Of the adapter's matrices.")] = 8,
    alpha: Annotated[float | None, typer.Option(help="The scale is alpha / rank.", show_default="2 * rank")] = None,
    kind: Annotated[str, typer.Option(help="lora or dora.")] = "lora",
    matrices: Annotated[str, typer.Option(help="all, attention, mlp, or names as q_proj,v_proj.")] = "all",
    layers: Annotated[int | None, typer.Option(help="The last ones alone.", show_default="all")] = None,
    tower: Annotated[bool, typer.Option("--tower", help="The vision tower learns too.")] = False,
    projector: Annotated[bool, typer.Option("--projector", help="The matrix between tower and decoder too.")] = False,
    steps: Annotated[int | None, typer.Option(help="Of the optimizer.", show_default="epochs")] = None,
    epochs: Annotated[float, typer.Option(help="Times that all data is learnt.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Examples that go through the model together.")] = 4,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Fill batches up to so many tokens instead.", show_default=False)
    ] = None,
    accumulate: Annotated[int, typer.Option(help="Batches of one step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = 2e-4,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which it rises.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of a step's gradients; 0: any.")] = 1.0,
    max_length: Annotated[int, typer.Option(help="Tokens of an example.")] = 2048,
    loss_on: Annotated[str, typer.Option(help="assistant or all.")] = "assistant",
    prompt: Annotated[
        str, typer.Option(help="Asked about the pictures of a folder of pictures and texts.")
    ] = "Describe this picture.",
    beta: Annotated[float, typer.Option(help="Of preferences: how close the model stays to what it was.")] = 0.1,
    eval_every: Annotated[int, typer.Option(help="Steps between validations; 0: at the end.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between states to go on from; 0: at the end.")] = 100,
    patience: Annotated[int, typer.Option(help="Validations without a better loss that end it; 0: never.")] = 0,
    examples: Annotated[int, typer.Option(help="Answers shown at each validation.")] = 3,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Less memory, a third more time.")] = False,
    picture_cache: Annotated[str, typer.Option(help="Disk for rows of pictures, of all models.")] = "4GB",
    form: Annotated[str, typer.Option("--format", help="Of the adapter: peft or mlx-lm.")] = "peft",
    seed: Annotated[int, typer.Option(help="Of the first numbers and the order.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per event.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")] = False,
) -> int:
    """Train a LoRA or DoRA adapter on words and pictures. Ctrl-C saves what is needed to go on with --resume."""
    from ..tune import tune as run

    shown = _Shown(as_json=as_json, quiet=quiet)
    with _stopping() as stop:
        report = run(
            model, data, out, valid=valid, valid_share=valid_share, rank=rank, alpha=alpha, kind=kind,
            matrices=matrices, layers=layers, tower=tower, projector=projector, steps=steps, epochs=epochs,
            batch_size=batch_size, batch_tokens=batch_tokens, accumulate=accumulate, learning_rate=learning_rate,
            warmup=warmup, weight_decay=weight_decay, clip=clip, max_length=max_length, loss_on=loss_on, prompt=prompt,
            beta=beta, eval_every=eval_every, save_every=save_every, patience=patience, examples=examples,
            checkpointing=checkpointing, picture_cache=read_size("--picture-cache", picture_cache), form=form,
            seed=seed, dtype=dtype, resume=resume, overwrite=overwrite, progress=shown, stop=stop,
        )  # fmt: skip
    shown.status.clear()
    if as_json:
        emit({"kind": "done", **report.to_dict()})
    else:
        say(report.text())
    if report.ended == "stopped":
        tell("stopped; go on with the same command and --resume")
        return 130
    return 0


class _Shown:
    """What happens, on stderr, or as JSON lines on stdout."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet
        self.status, self.pace = Status(not quiet and not as_json), Pace()

    def __call__(self, event: Mapping[str, Any]) -> None:
        kind = event["kind"]
        if self.as_json:
            if kind in ("note", "memory", "step", "evaluation"):
                emit(event)
            return
        if kind in ("check", "pictures", "reference"):
            what = {"check": "checking lines", "pictures": "looking at pictures", "reference": "reading pairs"}[kind]
            self.status.show(what, event["done"], event["total"])
        elif kind == "step":
            left = event["seconds_left"]
            time = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
            speed = event["tokens"] / max(event["seconds"], 1e-9)
            words = f"loss {event['loss']:.4f} · {speed:,.0f} tokens/s · {time} left"
            self.status.bar(event["step"], event["steps"], words)
        elif not self.quiet and kind == "note":
            self._line(f"note: {event['text']}")
        elif not self.quiet and kind == "memory":
            self._line(f"memory: about {event['bytes'] / 2**30:.1f} of {event['budget'] / 2**30:.1f} GiB")
        elif not self.quiet and kind == "evaluation":
            best = ", the best so far" if event["best"] else ""
            self._line(f"step {event['step']}: validation {event['loss']:.4f}{best}")
            for example in event["examples"]:
                self._line(f"  {example['answer']!r}, wanted {example['wanted']!r}")

    def _line(self, text: str) -> None:
        self.status.clear()
        tell(text)


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Ctrl-C once ends after the step, twice at once."""
    asked = False

    def end(number: int, _: FrameType | None) -> None:
        nonlocal asked
        if asked:
            leave()
        asked = True

    before = signal.signal(signal.SIGINT, end)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)

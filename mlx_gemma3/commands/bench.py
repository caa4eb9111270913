"""`mlx-gemma3 bench`: how fast a model is on this machine, and how near that is to what its memory can give."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import OptionError
from ..visible import one_line
from .inspect import amount, machine_lines, table
from .terminal import Status, emit, print_notes, say

if TYPE_CHECKING:
    from ..measure.benchmark import Benchmark, Spread


def bench(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Alias, folder, owner/name on the Hub, or .gguf file.")
    ] = "gemma-3-270m",
    prompt_tokens: Annotated[
        str | None, typer.Option(help="Prompts to read, in tokens, as 128,512,4k.", show_default="512")
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Depths to decode at, in tokens, as 512,4k,32k.", show_default="512,4k")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens that are decoded at each depth, a run.")] = 64,
    batch: Annotated[int, typer.Option(help="Rows that are decoded together.")] = 1,
    images: Annotated[
        int | None,
        typer.Option(help="Pictures through the vision tower; 0 leaves it out.", show_default="1 where the model sees"),
    ] = None,
    kv_bits: Annotated[int, typer.Option(help="Of the keys and values of global layers: 16, 8 or 4.")] = 16,
    repeat: Annotated[int, typer.Option(help="Runs of each figure, after one that is not counted.")] = 3,
    text_only: Annotated[bool, typer.Option("--text-only", help="Leave the vision tower out.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Try a model that does not fit into memory.")] = False,
    speculation: Annotated[
        bool, typer.Option("--speculation", help="Instead: what guessing brings, by kind of text.")
    ] = False,
    draft: Annotated[
        str | None, typer.Option(metavar="MODEL", help="With it: the model that guesses.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the figures into this .png or .svg.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")] = False,
) -> None:
    """Measure prompts, decoding, pictures, sampling and memory, and the share of the machine's memory bandwidth."""
    sizes, depths = parse_sizes("--prompt-tokens", prompt_tokens), parse_sizes("--context", context)
    if draft is not None and not speculation:
        raise OptionError("--draft", got="no --speculation", want="both")
    if speculation:
        if plot is not None:
            raise OptionError("--plot", got="--speculation as well", want="one or the other")
        _speculation(model, draft, dtype, tokens, repeat, force=force, as_json=as_json, quiet=quiet)
        return
    if plot is not None:
        from ..measure.plot import check_plot

        check_plot(plot)
    from ..measure.benchmark import Plan, measure

    if text_only and images:
        raise OptionError("--images", got=f"{images} and --text-only", want="one or the other")
    plan = Plan(
        prompts=sizes,
        contexts=depths,
        tokens=tokens,
        batch=batch,
        images=0 if text_only else images,
        kv_bits=kv_bits,
        repeat=repeat,
    )
    status = Status(not quiet and not as_json)
    found = measure(
        model, plan, dtype=dtype, force=force, progress=lambda what, done, all_: status.show(what, done, all_)
    )
    status.clear()
    print_notes(found.notes, quiet=quiet or as_json)
    if plot is not None:
        from .bench_plot import draw

        draw(found, plot)
    if as_json:
        emit(found.to_dict())
    else:
        say("\n".join(report(found)))


def _speculation(
    model: str, draft: str | None, dtype: str, tokens: int, repeat: int, *, force: bool, as_json: bool, quiet: bool
) -> None:
    from ..measure.speculation import measure

    status = Status(not quiet and not as_json)
    found = measure(model, draft=draft, dtype=dtype, tokens=tokens, repeat=repeat, force=force, progress=status.show)
    status.clear()
    if as_json:
        emit({"model": model, "draft": draft, "texts": [{**asdict(one), "gain": one.gain} for one in found]})
        return
    rows = [["text", "repeats", "guessed right", "passes", "tokens/s", "without", "gain", "same tokens"]]
    for one in found:
        rows.append(
            [
                one.kind, "yes" if one.repeats else "no", f"{one.accepted} of {one.drafted}",
                f"{one.passes} for {one.tokens}", _number(one.tokens / one.seconds),
                _number(one.tokens / one.plain_seconds), f"{one.gain:.2f}", "yes" if one.same else "NO",
            ]
        )  # fmt: skip
    say("\n".join(table(rows, "<<>>>>>>")))


def parse_sizes(name: str, text: str | None) -> tuple[int, ...] | None:
    """Tokens from "128,512,4k" (1,024 each k), each once and in order; None from None.

    Raises:
        OptionError: something else, or a 0.
    """
    if text is None:
        return None
    found = [re.fullmatch(r"(\d+)(k?)", part.strip().lower(), re.ASCII) for part in text.split(",")]
    sizes = {int(part[1]) * (1024 if part[2] else 1) if part else 0 for part in found}
    if min(sizes) < 1:
        raise OptionError(name, got=repr(text), want="tokens with commas between them, as 128,512,4k")
    return tuple(sorted(sizes))


def report(found: Benchmark) -> list[str]:
    """The figures as lines of text: medians, and behind them the lowest and the highest."""
    plan, speed = found.plan, found.bandwidth
    size = f" ({found.size})" if found.size else ""
    lines = [
        *machine_lines(found.machine),
        "",
        f"{one_line(found.model)}{size}, "
        f"{found.dtype}, KV {plan.kv_bits} bits, median of {plan.repeat} (lowest to highest)",
        f"mlx-gemma3 {found.versions['mlx-gemma3']}, {found.platform}",
        f"load {found.load_seconds:.2f} s, weights {amount(found.weights)}",
        f"memory bandwidth {speed.bytes_per_second / 1e9:.0f} GB/s, {speed.source}",
        "",
    ]
    rows = [["prompt", "tokens/s", "", "first token, s", "", "peak memory"]]
    for row in found.prompts:
        speeds, first = _cells(row.tokens_per_second), _cells(row.first_token_seconds)
        rows.append([f"{row.tokens:,}", *speeds, *first, amount(row.peak_memory)])
    lines += [*table(rows, ">>>>>>"), ""]
    decode = "decode at" if plan.batch == 1 else f"{plan.batch} rows at"
    rows = [[decode, "tokens/s", "", "MB a step", "of them KV", "of bandwidth", "peak memory"]]
    for depth in found.decoding:
        read = depth.weight_bytes + depth.kv_bytes
        rows.append(
            [
                f"{depth.context:,}",
                *_cells(depth.tokens_per_second),
                f"{read / 1e6:,.1f}",
                f"{depth.kv_bytes / 1e6:,.1f}",
                f"{depth.bandwidth_share:.1%}",
                amount(depth.peak_memory),
            ]
        )
    lines += [*table(rows, ">>>>>>>"), ""]
    if found.pictures is not None:
        rows = [["pictures", "seconds", "", "peak memory"]]
        pictures = found.pictures
        rows.append([f"{pictures.count}", *_cells(pictures.seconds), amount(pictures.peak_memory)])
        lines += [*table(rows, ">>>>"), ""]
    rows = [["sampling", "ms a token", ""]]
    rows += [[how, *_cells(milliseconds)] for how, milliseconds in found.sampling.items()]
    return [*lines, *table(rows, "<>>")]


def _cells(spread: Spread) -> list[str]:
    """The median, and the range in brackets."""
    return [_number(spread.median), f"({_number(spread.low)} to {_number(spread.high)})"]


def _number(value: float) -> str:
    """Three digits that count: 0.0123, 1.23, 12.3, 1,234."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 1 else f"{value:.{2 if value < 10 else 1}f}"

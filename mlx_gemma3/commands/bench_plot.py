"""A benchmark as a picture: prompts by their length, and decoding by depth under what the memory could give."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..boundary.writing import refusal, replacing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from ..measure.benchmark import Benchmark, Spread


def draw(found: Benchmark, path: Path) -> None:
    """Two panels; the file appears whole, and replaces what was there. Needs `check_plot` before.

    Raises:
        OutputError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "mlx-gemma3"}):  # the same numbers, the same bytes
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        speed = found.bandwidth
        figure.suptitle(f"{found.model}, {found.dtype}, {speed.device}", fontsize="medium", wrap=True)
        left, right = figure.subplots(1, 2)
        _line(left, [row.tokens for row in found.prompts], [row.tokens_per_second for row in found.prompts], "measured")
        left.set_title("reading a prompt", fontsize="medium")
        left.set_xlabel("tokens of the prompt")
        depths = [row.context for row in found.decoding]
        _line(right, depths, [row.tokens_per_second for row in found.decoding], "measured")
        limits = [
            speed.bytes_per_second / (row.weight_bytes + row.kv_bytes) * found.plan.batch for row in found.decoding
        ]
        limit = f"all of {speed.bytes_per_second / 1e9:.0f} GB/s"
        right.plot(depths, limits, "_--" if len(limits) == 1 else "--", color="black", linewidth=1, label=limit)
        for axes in (left, right):
            axes.set_ylim(bottom=0)
        right.set_title("decoding", fontsize="medium")
        right.set_xlabel("tokens before it")
        right.legend(fontsize="small")
        kind = path.suffix.lower().removeprefix(".")
        try:
            with replacing(path, mode=0o666) as file:
                figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        except OSError as error:
            raise refusal(path, error) from None


def _line(axes: Axes, places: Sequence[int], spreads: Sequence[Spread], label: str) -> None:
    """Medians, with bars from the lowest to the highest."""
    medians = [spread.median for spread in spreads]
    below = [spread.median - spread.low for spread in spreads]
    above = [spread.high - spread.median for spread in spreads]
    axes.errorbar(places, medians, yerr=[below, above], fmt="o-", capsize=4, color="tab:blue", label=label)
    axes.set_xticks(list(places), [f"{place:,}" for place in places])
    axes.set_ylabel("tokens a second")

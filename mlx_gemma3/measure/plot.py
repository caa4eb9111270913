"""An evaluation as a picture: how the divergence is spread over the tokens, and where along the text it stands.

matplotlib is loaded when something is drawn and not before; it comes with the extra `plot`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..boundary.writing import refusal, replacing
from ..errors import OptionError, OutputError
from .scores import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg")
_FLOOR = 1e-8  # nats: what is less than float32 can tell is drawn here, the scale being logarithmic
_QUANTILES = ((0.5, "median"), (0.99, "99 %"))


def check_plot(path: Path) -> None:
    """Refuse, before any work, what `plot` would refuse at its end.

    Raises:
        OptionError: not a .png or .svg, or no matplotlib.
        OutputError: its folder is not there.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError("plot", got=repr(path.name), want="a file name that ends in .png or .svg")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise OptionError("plot: matplotlib is not installed", do="pip install 'mlx-gemma3[plot]'") from None
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}", got="no such folder", want="a place for the plot")


def plot(evaluation: Evaluation, path: Path) -> None:
    """Draw a row of two panels for the text and one for the pictures: a histogram, and the divergence by token.

    Args:
        evaluation: with a reference.
        path: a .png or .svg; it appears whole, and replaces what was there.

    Raises:
        OptionError: another kind of file, no matplotlib, or an evaluation without a reference.
        OutputError: the file cannot be written.
    """
    check_plot(path)
    import matplotlib
    from matplotlib.figure import Figure

    rows = [
        (name, scores.distance)
        for name, scores in (("text", evaluation.words), ("pictures", evaluation.pictures))
        if scores is not None and scores.distance is not None
    ]
    if not rows:
        raise OptionError("plot", got="one checkpoint", want="another as well, to compare with (against)")
    with matplotlib.rc_context({"svg.hashsalt": "mlx-gemma3"}):  # the same numbers, the same bytes
        figure = Figure(figsize=(10, 3.6 * len(rows)), layout="constrained")
        figure.suptitle(f"{evaluation.model} against {evaluation.against}", fontsize="medium", wrap=True)
        for (left, right), (name, distance) in zip(figure.subplots(len(rows), 2, squeeze=False), rows, strict=True):
            shown = np.maximum(np.nan_to_num(distance.divergence, nan=np.inf, posinf=1e8), _FLOOR)
            _draw_histogram(left, shown)
            left.set_title(f"{name}: mean {distance.mean:.4g} nats, {distance.agreement:.1%} same likeliest token")
            _draw_course(right, shown)
        kind = path.suffix.lower().removeprefix(".")
        try:
            with replacing(path, mode=0o666) as file:
                figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        except OSError as error:
            raise refusal(path, error) from None


def _draw_histogram(axes: Axes, divergence: NDArray[np.float32]) -> None:
    low, high = np.log10(divergence.min()), np.log10(divergence.max())
    axes.hist(divergence, bins=np.logspace(low - 0.1, high + 0.1, 41).tolist(), color="tab:blue")
    for share, label in _QUANTILES:
        value = float(np.quantile(divergence, share))
        axes.axvline(value, color="black", linewidth=1, linestyle="--")
        axes.annotate(
            f" {label} {value:.2g}", (value, 1), xycoords=("data", "axes fraction"), va="top", fontsize="small"
        )
    axes.set_xscale("log")
    axes.set_xlabel("KL divergence, nats")
    axes.set_ylabel("tokens")


def _draw_course(axes: Axes, divergence: NDArray[np.float32]) -> None:
    """Every token as a dot, and the mean of a fiftieth of the text around it as a line."""
    width = max(1, len(divergence) // 50)
    counts = np.convolve(np.ones(len(divergence)), np.ones(width), "same")
    mean = np.convolve(divergence.astype(np.float64), np.ones(width), "same") / counts
    axes.plot(divergence, ".", color="tab:blue", markersize=2, alpha=0.5, label="a token")
    axes.plot(mean, color="black", linewidth=1.2, label=f"mean of {width}")
    axes.set_yscale("log")
    axes.set_xlabel("token")
    axes.set_ylabel("KL divergence, nats")
    axes.legend(loc="lower right", fontsize="small")

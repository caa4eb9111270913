"""The course of a training as a picture: `python -m examples.demo_model.plot RUN docs/demo_loss.svg`.

Reads RUN/log.csv (phase, step, loss, share right) and writes plain SVG.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 760, 300, 48  # pixels
LOSS, RIGHT = "#1f5fbf", "#c04a1a"
TOP, BOTTOM = 6.0, 0.1  # loss, on a logarithmic scale


def read(run: Path) -> list[tuple[str, int, float, float]]:
    """(phase, step, loss, share right) of each line, the last of each step where a training was resumed."""
    with (run / "log.csv").open(newline="") as file:
        rows = {(phase, int(step)): (float(loss), float(right)) for phase, step, loss, right in csv.reader(file)}
    return [(phase, step, *values) for (phase, step), values in rows.items()]


def draw(rows: list[tuple[str, int, float, float]]) -> str:
    """The SVG text: phases side by side, as wide as they have steps."""
    lengths: dict[str, int] = {}
    for phase, step, *_ in rows:
        lengths[phase] = max(lengths.get(phase, 0), step)
    scale = (WIDTH - 2 * MARGIN) / sum(lengths.values())
    inner = HEIGHT - 2 * MARGIN
    starts, x = {}, float(MARGIN)
    for phase, steps in lengths.items():
        starts[phase] = x
        x += steps * scale
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for loss in (5, 2, 1, 0.5, 0.2, 0.1):
        y = _height(loss, inner)
        parts.append(f'<path d="M{MARGIN} {y:.1f}H{WIDTH - MARGIN}" stroke="#ddd"/>')
        parts.append(f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end" fill="{LOSS}">{loss}</text>')
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = MARGIN + (1 - share) * inner
        parts.append(f'<text x="{WIDTH - MARGIN + 6}" y="{y + 4:.1f}" fill="{RIGHT}">{share:.0%}</text>')
    for phase, start in starts.items():
        parts.append(f'<path d="M{start:.1f} {MARGIN}V{HEIGHT - MARGIN}" stroke="#999"/>')
        label = f"{phase}, {lengths[phase]} steps"
        parts.append(f'<text x="{start + 4:.1f}" y="{HEIGHT - MARGIN + 18}">{label}</text>')
        mine = [(start + step * scale, loss, right) for name, step, loss, right in rows if name == phase]
        for colour, points in (
            (LOSS, [(x, _height(loss, inner)) for x, loss, _ in mine]),
            (RIGHT, [(x, MARGIN + (1 - right) * inner) for x, _, right in mine]),
        ):
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    parts.append(f'<text x="{MARGIN}" y="{MARGIN - 16}" fill="{LOSS}">loss</text>')
    parts.append(
        f'<text x="{WIDTH - MARGIN}" y="{MARGIN - 16}" text-anchor="end" fill="{RIGHT}">'
        "right on pictures never seen before: patches, then answer tokens</text>"
    )
    return "\n".join([*parts, "</svg>\n"])


def _height(loss: float, inner: float) -> float:
    share = math.log(min(TOP, max(BOTTOM, loss)) / BOTTOM) / math.log(TOP / BOTTOM)
    return MARGIN + (1 - share) * inner


def main() -> None:
    """Draw a run's log."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("run", type=Path)
    options.add_argument("picture", type=Path)
    chosen = options.parse_args()
    temporary = chosen.picture.with_suffix(".tmp")
    temporary.write_text(draw(read(chosen.run)), encoding="utf-8")
    temporary.replace(chosen.picture)


if __name__ == "__main__":
    main()

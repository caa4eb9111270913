"""The tables of docs/performance.md from the rows that bench/speed.py has measured."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from pathlib import Path

OURS = "mlx-gemma3"
QUIET = 4.0  # load average, on two cores
MARKS = ("<!-- measured -->\n", "<!-- /measured -->")
# more is better; of all others less
RATES = {"prompt", "decode", "prompt cpu", "decode cpu", "graph prompt", "graph decode"}
# what is shown of a figure, in this order: section → (figure, its name and unit)
SECTIONS: dict[str, dict[str, str]] = {
    "Words: a prompt of 512 tokens, and decoding after it": {
        "prompt": "prompt, tokens/s",
        "prompt cpu": "prompt, tokens a CPU second",
        "decode": "decode, tokens/s",
        "decode cpu": "decode, tokens a CPU second",
        "graph prompt": "prompt, tokens/s, the GPU's graph",
        "graph decode": "decode, tokens/s, the GPU's graph",
        "build": "building one step's graph, ms of the host",
    },
    "From a command's start to its end with one token": {"start": "seconds", "start cpu": "CPU seconds"},
    "One picture of 896 x 896 through the tower and the projector": {
        "picture": "seconds",
        "picture cpu": "CPU seconds",
        "picture memory": "peak of MLX's memory, MiB",
        "picture growth": "growth of the process, MiB",
    },
    "Two questions about one picture": {
        "first question": "first, seconds",
        "second question": "second, seconds",
    },
    "The next turn of a long conversation": {
        "history": "reading it, seconds",
        "next turn": "next turn of 40 tokens, seconds",
        "the same again": "the same again, seconds",
        "last turn edited": "last turn edited, seconds",
        "two turns back edited": "two turns back edited, seconds",
    },
}
Values = dict[tuple[str, str, str], dict[str, float]]  # (figure, setting, program) → round → value


def write(rows_path: Path, command_path: Path, page: Path) -> None:
    """Put the tables, and what `bench` itself printed, between the page's marks."""
    with rows_path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    body = tables(rows)
    if command_path.is_file():
        body += f"\n### `mlx-gemma3 bench` there\n\n```\n{command_path.read_text(encoding='utf-8')}```\n"
    head, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    page.write_text(head + MARKS[0] + body + MARKS[1] + rest.split(MARKS[1])[1], encoding="utf-8")


def quiet_rounds(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Without the rounds in which the machine was busier than QUIET, wherever there is a quieter one."""
    rounds: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        rounds[row["figure"], row["setting"]][row["round"]].append(float(row["load"]))
    quiet = {
        place: {number for number, loads in numbers.items() if max(loads) < QUIET and len(loads) > 1}
        for place, numbers in rounds.items()
    }
    return [row for row in rows if not (chosen := quiet[row["figure"], row["setting"]]) or row["round"] in chosen]


def tables(rows: list[dict[str, str]]) -> str:
    rows = quiet_rounds(rows)
    values: Values = defaultdict(dict)
    for row in rows:  # a later measurement of the same replaces an earlier one
        values[row["figure"], row["setting"], row["program"]][row["round"]] = float(row["value"])
    loads = [float(row["load"]) for row in rows]
    about = {name: sorted({row[name] for row in rows}) for name in ("machine", "versions", "commit")}
    lines = [
        f"Machine: {'; '.join(about['machine'])}; load average while measuring {min(loads):.1f} to {max(loads):.1f}.",
        f"Versions: {' / '.join(about['versions'])}. Commit: {', '.join(about['commit'])}.",
        "",
        "Median (lowest to highest, of several rounds). Ratio: here / other, the median of the rounds; bold where it",
        "is better here: below 1 for seconds, ms and MiB, above 1 for tokens a second.",
        "",
    ]
    for title, figures in SECTIONS.items():
        body = [line for figure, name in figures.items() for line in _lines(values, figure, name)]
        if body:
            lines += [f"### {title}", "", "| figure | setting | here | other | | ratio |", "|---|---|---|---|---|---|"]
            lines += [*body, ""]
    return "\n".join(lines)


def _lines(values: Values, figure: str, name: str) -> list[str]:
    lines = []
    settings = dict.fromkeys(setting for kind, setting, _ in values if kind == figure)
    for setting in settings:
        ours = values.get((figure, setting, OURS))
        others = [program for kind, place, program in values if (kind, place) == (figure, setting) and program != OURS]
        for program in others if ours else ():
            theirs = values[figure, setting, program]
            ratios = [ours[number] / theirs[number] for number in ours.keys() & theirs.keys()]
            better = statistics.median(ratios) if ratios else float("nan")
            good = (better >= 1) == (figure in RATES)
            shown = f"{better:.2f}" if better >= 0.1 else f"{better:.3f}"
            ratio = f"**{shown}**" if good else shown
            lines.append(f"| {name} | {setting} | {_shown(ours)} | {program} | {_shown(theirs)} | {ratio} |")
    return lines


def _shown(values: dict[str, float]) -> str:
    found = list(values.values())
    middle = _number(statistics.median(found))
    return middle if len(found) == 1 else f"{middle} ({_number(min(found))} to {_number(max(found))})"


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2g}" if value < 1 else f"{value:.{2 if value < 10 else 1}f}"

"""Writes what the documentation can take from the code.

docs/commands.md: every command. README.md: a line for each room. docs/architecture.md: a line for each file.
docs/worker.schema.json: the options of an answer.

python docs/generate.py          write them
python docs/generate.py --check  write nothing; exit 1 and name what is out of date
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer.main

from mlx_gemma3.cli import app
from mlx_gemma3.runtime.options import SETTINGS, schema_of

ROOT = Path(__file__).resolve().parent.parent


def commands() -> str:
    """docs/commands.md: every command with its arguments and options."""
    program: Any = typer.main.get_command(app)
    lines = ["# Commands", "", "Made from the program by `make docs`.", ""]
    for name, command in sorted(program.commands.items()):
        lines += [
            f"## mlx-gemma3 {name}",
            "",
            command.help.strip(),
            "",
            "| setting | meaning | default |",
            "|---|---|---|",
        ]
        for setting in command.params:
            if setting.name == "help":
                continue
            names = f"`{setting.name.upper()}`" if setting.param_type_name == "argument" else _code(setting.opts)
            lines.append(f"| {names} | {setting.help} | {_default(setting)} |")
        lines.append("")
    return "\n".join(lines)


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _default(setting: Any) -> str:
    if isinstance(setting.show_default, str):
        return setting.show_default
    return "" if setting.default in (None, False) or setting.show_default is False else f"`{setting.default}`"


def rooms() -> str:
    """One line a room: a folder of the package, and what its docstring says."""
    folders = sorted(path.parent for path in (ROOT / "mlx_gemma3").glob("*/__init__.py"))
    lines = [_line(folder, folder / "__init__.py") for folder in (*folders, ROOT / "convert")]
    return "\n".join(lines) + "\n"


def tree() -> str:
    """One line a file: its path and the first sentence of its docstring."""
    files = [path for room in ("mlx_gemma3", "convert") for path in (ROOT / room).rglob("*.py")]
    files.sort(key=lambda path: (path.is_relative_to(ROOT / "convert"), len(path.parts), path))
    return "\n".join(_line(path, path) for path in files) + "\n"


def _line(place: Path, file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert text, f"{file}: no docstring"
    first = text.split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")
    return f"{place.relative_to(ROOT)!s:<40} {first}"


def between(text: str, name: str, made: str) -> str:
    """The text with what stands between its two marks replaced."""
    start, end = f"<!-- {name} -->\n```\n", f"```\n<!-- /{name} -->"
    head, rest = text.split(start)
    return head + start + made + end + rest.split(end)[1]


def schema(text: str) -> str:
    """docs/worker.schema.json with the options of an answer as the program takes them."""
    parsed = json.loads(text)
    parsed["$defs"]["options"]["properties"] = {name: schema_of(name) for name in SETTINGS}
    return json.dumps(parsed, indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    docs = ROOT / "docs"
    made: dict[Path, Callable[[str], str]] = {
        ROOT / "README.md": lambda text: between(text, "rooms", rooms()),
        docs / "architecture.md": lambda text: between(text, "tree", tree()),
        docs / "worker.schema.json": schema,
        docs / "commands.md": lambda _: commands(),
    }
    wanted = {path: make(path.read_text(encoding="utf-8")) for path, make in made.items()}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            sys.stderr.write(f"{path.relative_to(ROOT)}: out of date; run make docs\n")
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

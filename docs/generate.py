"""Writes what the documentation can take from the code: the commands' pages and the README's file tree.

python docs/generate.py          write docs/commands.md and the tree in README.md
python docs/generate.py --check  write nothing; exit 1 and name what is out of date
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import typer.main

from mlx_gemma3.cli import app

ROOT = Path(__file__).resolve().parent.parent
TREE = ("<!-- tree -->\n```\n", "```\n<!-- /tree -->")


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


def tree() -> str:
    """One line a file: its path and the first sentence of its docstring."""
    lines = []
    files = [path for room in ("mlx_gemma3", "convert") for path in (ROOT / room).rglob("*.py")]
    for path in sorted(files, key=lambda path: (path.is_relative_to(ROOT / "convert"), len(path.parts), path)):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert text, f"{path}: no docstring"
        first = text.split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")
        lines.append(f"{path.relative_to(ROOT)!s:<40} {first}")
    return "\n".join(lines) + "\n"


def readme(text: str) -> str:
    start, end = TREE
    head, rest = text.split(start)
    return head + start + tree() + end + rest.split(end)[1]


def main() -> int:
    readme_path, commands_path = ROOT / "README.md", ROOT / "docs" / "commands.md"
    wanted = {readme_path: readme(readme_path.read_text(encoding="utf-8")), commands_path: commands()}
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

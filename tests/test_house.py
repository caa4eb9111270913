"""The house: imports go downwards, nothing heavy loads before it is needed, the documents are up to date."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mlx_gemma3"
CONVERT = ROOT / "convert"  # installed as mlx_gemma3.convert
# A room imports from itself and from lower ranks only.
RANKS = {
    "visible": 0, "errors": 1, "boundary": 2, "embedder_config": 2.5, "config": 3,
    "prompt": 4, "model": 5, "checkpoint": 6, "grammar": 6, "generation": 7, "runtime": 8,
    "measure": 9, "tune": 9, "worker": 9, "server": 9, "convert": 10, "__init__": 11, "commands": 12, "cli": 13,
}  # fmt: skip


def imports() -> dict[str, set[str]]:
    """Module → the modules of this package that it imports anywhere, as dotted names below mlx_gemma3."""
    graph: dict[str, set[str]] = {}
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    modules |= {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in CONVERT.rglob("*.py")}
    for name, path in modules.items():
        found = graph.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            module = node.module or ""
            if node.level:
                target = ".".join(filter(None, [*name.split(".")[: -node.level], module]))
            elif module.split(".")[0] == "mlx_gemma3":
                target = module.removeprefix("mlx_gemma3").lstrip(".")
            else:
                continue
            for alias in node.names:
                inner = f"{target}.{alias.name}" if target else alias.name
                found.add(next(n for n in (inner, target, f"{target}.__init__".lstrip(".")) if n in modules))
    return graph


def test_imports_go_downwards_and_never_in_a_circle() -> None:
    graph = imports()
    room = {name: name.split(".")[0] for name in graph}
    for name, targets in graph.items():
        for target in targets:
            up = RANKS[room[target]] >= RANKS[room[name]] and room[target] != room[name]
            assert not up, f"{name} imports {target}"
    list(TopologicalSorter({name: targets - {name} for name, targets in graph.items()}).static_order())


def test_every_room_is_installed() -> None:
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert set(installed) == rooms | {"mlx_gemma3.convert"}


def test_prompt_knows_nothing_of_mlx_and_generation_nothing_of_text() -> None:
    for path in (PACKAGE / "prompt").glob("*.py"):
        assert "import mlx" not in path.read_text(encoding="utf-8"), path
    for name, targets in imports().items():
        if name.startswith(("generation", "model")):
            assert not any(target.startswith("prompt") for target in targets), name


def test_commands_call_the_upper_rooms_and_open_pictures() -> None:
    rooms = {
        "runtime",
        "measure",
        "convert",
        "worker",
        "server",
        "tune",
        "errors",
        "config",
        "boundary",
        "visible",
        "__init__",
        "commands",
    }
    pictures = {"prompt.address", "prompt.images"}
    for name, targets in imports().items():
        if name.startswith("commands"):
            for target in targets:
                assert target.split(".")[0] in rooms or target in pictures, f"{name} imports {target}"


def loaded_after(code: str) -> set[str]:
    """Top-level modules in sys.modules of a fresh interpreter after `code`."""
    script = f"import sys\n{code}\nsys.stderr.write(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stderr.split())


def test_importing_the_package_loads_neither_mlx_nor_pillow() -> None:
    heavy = {"mlx", "PIL", "numpy", "sentencepiece", "huggingface_hub", "gguf", "transformers", "torch", "mlx_lm"}
    assert not loaded_after("import mlx_gemma3") & heavy
    assert not loaded_after("import mlx_gemma3.cli") & heavy


def test_the_generate_path_imports_nothing_heavy_even_when_all_of_it_is_loaded() -> None:
    modules = [name.removesuffix(".__init__") for name in imports() if name != "__init__"]
    code = "\n".join(f"import mlx_gemma3.{name}" for name in modules)
    assert not loaded_after(code) & {"transformers", "torch", "mlx_lm", "PIL", "huggingface_hub", "gguf"}


def test_every_public_name_is_there() -> None:
    import mlx_gemma3

    for name in mlx_gemma3.__all__:
        assert getattr(mlx_gemma3, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = mlx_gemma3.nothing_like_it


def test_documents_made_from_the_code_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_test_command_of_ci_is_the_readmes() -> None:
    command = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1]
    assert command.startswith("python3 -m venv") and command in (ROOT / "README.md").read_text(encoding="utf-8")

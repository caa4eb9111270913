"""The model card (README.md) of a converted folder: what it is, how it was made, what it lost, whose terms apply."""

from __future__ import annotations

from pathlib import Path

from mlx_gemma3.checkpoint.load import Checkpoint

from .report import Report

TERMS = "https://ai.google.dev/gemma/terms"


def write_card(folder: Path, report: Report, checkpoint: Checkpoint, command: str) -> None:
    """Write README.md, with the front matter that the Hub reads."""
    vision = checkpoint.config.vision is not None
    name = checkpoint.name
    base = [f"base_model: {name}"] if name.count("/") == 1 and not Path(name).exists() else []
    front = [
        "---",
        "library_name: mlx",
        "license: gemma",
        f"license_link: {TERMS}",
        f"pipeline_tag: {'image-text-to-text' if vision else 'text-generation'}",
        *base,
        "tags: [mlx, gemma3]",
        "---",
    ]
    lines = [
        *front,
        "",
        f"# {folder.name if not folder.name.startswith('.') else Path(report.out).name}",
        "",
        f"Gemma 3, made from {name} for MLX by mlx-gemma3:",
        "",
        "```",
        command or f"mlx-gemma3 convert {name}",
        "```",
        "",
        "```",
        report.text(),
        "```",
        "",
        "The errors are root mean squares of the differences from the source, over those of its numbers.",
        "",
        "Run it with `mlx-gemma3 generate -m FOLDER`; mlx-lm and mlx-vlm load it too.",
        "",
        f"The weights carry Google's own terms: <{TERMS}>.",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")

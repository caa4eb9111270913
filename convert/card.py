"""The model card (README.md) of a converted folder: what it is, how it was made, what it lost, whose terms apply."""

from __future__ import annotations

from pathlib import Path

from mlx_gemma3.checkpoint.entries import read_note
from mlx_gemma3.checkpoint.load import Checkpoint

from .report import Report

TERMS = "https://ai.google.dev/gemma/terms"
# The words that section 3.1 of the terms asks for.
NOTICE = f"Gemma is provided under and subject to the Gemma Terms of Use found at <{TERMS}>."


def write_card(folder: Path, report: Report, checkpoint: Checkpoint, command: str) -> None:
    """Write README.md, with the front matter that the Hub reads. What the source's own card says of it goes first."""
    name = report.source
    source = read_note(checkpoint.path)
    gemma = source.license in ("", "gemma")
    repository = name.partition("@")[0]
    embeds = checkpoint.config.embedder is not None
    task = "image-text-to-text" if checkpoint.config.vision is not None else "text-generation"
    front = [
        "library_name: mlx",
        *(["license: gemma", f"license_link: {TERMS}"] if gemma else [f"license: {source.license}"]),
        f"pipeline_tag: {'sentence-similarity' if embeds else task}",
        *([f"base_model: {repository}"] if repository.count("/") == 1 and not Path(checkpoint.name).exists() else []),
        "tags: [mlx, gemma3]",
    ]
    paragraphs = [
        "\n".join(("---", *front, "---")),
        f"# {Path(report.out).resolve().name}",
        source.text or "Gemma 3 for MLX.",
        f"Made from {name} by mlx-gemma3:",
        f"```\n{command or f'mlx-gemma3 convert {name}'}\n```",
        f"```\n{report.text()}\n```",
        "The errors are root mean squares of the differences from the source, over those of its numbers.",
        "Use it with `mlx-gemma3 embed -m FOLDER`."
        if embeds
        else "Run it with `mlx-gemma3 generate -m FOLDER`; mlx-lm and mlx-vlm load it too.",
        *([NOTICE] if gemma else []),
    ]
    (folder / "README.md").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")

"""What is done with a hostile file, by kind: each function opens one as a user would, and raises what is wrong."""

from __future__ import annotations

from pathlib import Path


def config(path: Path) -> None:
    """A config.json."""
    from mlx_gemma3 import Config

    Config.from_file(path)


def template(path: Path) -> None:
    """A folder whose chat template is such a file: `path` is called by its beginning, as in 17-chat_template.json."""
    import json
    import tempfile

    import tiny

    from mlx_gemma3.checkpoint.load import open_checkpoint
    from mlx_gemma3.checkpoint.source import Source

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "config.json").write_text(json.dumps(tiny.text_config()), encoding="utf-8")
        (folder / path.name.partition("-")[2]).symlink_to(path.absolute())
        open_checkpoint(Source(str(folder), folder))

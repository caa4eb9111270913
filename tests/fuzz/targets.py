"""What is done with a hostile file, by kind: each function opens one as a user would, and raises what is wrong."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_gemma3 import Engine


def config(path: Path) -> None:
    """A config.json."""
    from mlx_gemma3 import Config

    Config.from_file(path)


@functools.cache
def _engine(folder: Path) -> Engine:
    from mlx_gemma3 import load

    return load(folder, quiet=True)


def session(path: Path) -> None:
    """A saved conversation, with the model in the folder `model` beside it: it is gone on with."""
    talk = _engine(path.parent / "model").session(resume=path)
    options = {"max_tokens": 2, "temperature": 0.0}
    _ = talk.messages, talk.tokens
    if talk.messages[-1:] != [] and talk.messages[-1]["role"] == "assistant":
        talk.retry(**options).reply
    talk.send("the user", **options).reply
    for _ in range(2):
        talk.undo()
    talk.send("the", **options).reply
    talk.save(path.with_name("again"))


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


def picture(path: Path) -> None:
    """A picture's file, by its path and by its bytes, which must come to the same."""
    from mlx_gemma3 import Gemma3Error, images

    try:
        by_path = images.load_image(path)
    except Gemma3Error:
        by_path = None
    by_bytes = images.load_image(path.read_bytes())
    assert by_path is not None and by_path.mode == "RGB" and by_path.size == by_bytes.size
    images.to_pixels(by_bytes, 56)


def tokenizer(path: Path) -> None:
    """A folder with such a vocabulary's file: `path` is called by its end, as in 17-tokenizer.json; what else the
    folder holds lies in the folder of that name beside it.
    """
    import tempfile

    from mlx_gemma3 import Gemma3Error, Tokenizer
    from mlx_gemma3.checkpoint.load import open_checkpoint
    from mlx_gemma3.checkpoint.source import Source
    from mlx_gemma3.convert.tokenizer_files import write_side_files

    name = path.name.partition("-")[2]
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "in", Path(place) / "out"
        for made in (folder, out):
            made.mkdir()
        (folder / name).symlink_to(path.absolute())
        for other in (path.parent / name).iterdir():
            if not (folder / other.name).exists():
                (folder / other.name).symlink_to(other.absolute())
        try:
            tokenizer = Tokenizer.from_folder(folder)
        except Gemma3Error:
            tokenizer = None
        write_side_files(open_checkpoint(Source(str(folder), folder)), out)
        again = Tokenizer.from_folder(out)
        text = "the user<end_of_turn>\n  \u2581\u2581 is <b> in\0 é"
        ids = again.encode(text)
        assert tokenizer is not None and tokenizer.encode(text) == ids
        assert again.decode(ids) == text.replace("\u2581", " ")
        again.encode(text, special=False)


def checkpoint(path: Path) -> None:
    """A model's folder: opened, held against the machine's memory, loaded, asked for two tokens."""
    from mlx_gemma3 import Engine

    with Engine(path, quiet=True) as engine:
        engine.generate("the user", max_tokens=2)

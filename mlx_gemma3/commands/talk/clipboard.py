"""The clipboard: a picture, or text."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import PromptError

if TYPE_CHECKING:
    from PIL.Image import Image

_TEXT = {
    "darwin": (("pbpaste",),),
    "linux": (("wl-paste", "--no-newline"), ("xclip", "-selection", "clipboard", "-o"), ("xsel", "-b", "-o")),
}


def clipboard() -> Image | list[Path] | str:
    """What was copied last: a picture, files, or text.

    Raises:
        PromptError: nothing of these, or no program here that could tell.
    """
    from PIL import ImageGrab, UnidentifiedImageError

    try:
        held = ImageGrab.grabclipboard()
    except (NotImplementedError, UnidentifiedImageError, OSError, ValueError):  # no program for it, or no picture
        held = None
    if isinstance(held, list):
        return [Path(name) for name in held]
    if held is not None:
        held.load()
        return held
    commands = [command for command in _TEXT.get(sys.platform, ()) if shutil.which(command[0])]
    if not commands:
        raise PromptError(
            "clipboard", got="no program that reads it", want="wl-paste (wl-clipboard), xclip or xsel", do="install one"
        )
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, timeout=10, check=False)
        except subprocess.TimeoutExpired:  # the program that copied it does not answer
            continue
        if done.returncode == 0 and (text := done.stdout.decode("utf-8", "replace")).strip():
            return text
    raise PromptError("clipboard", got="neither a picture nor text", do="copy one first")

"""Where PythonKit finds this Python and this checkout, as `export` lines for a shell."""

from __future__ import annotations

import os
import shlex
import sys
import sysconfig
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def library() -> Path:
    """The shared library of this Python."""
    folders = (sysconfig.get_config_var(name) for name in ("PYTHONFRAMEWORKPREFIX", "LIBDIR"))
    names = [sysconfig.get_config_var(name) for name in ("LDLIBRARY", "INSTSONAME")]
    found = [Path(folder, name) for folder in folders if folder for name in names if name and not name.endswith(".a")]
    for path in found:
        if path.is_file():
            return path
    sys.exit(f"{sys.executable} has no shared library; take the Python of python.org, of Homebrew or of Debian")


def settings() -> dict[str, str]:
    """Environment variables for the program that embeds Python."""
    folders = [str(CHECKOUT), *(folder for folder in sys.path[1:] if Path(folder).is_dir())]
    return {"PYTHON_LIBRARY": str(library()), "PYTHONHOME": sys.base_prefix, "PYTHONPATH": os.pathsep.join(folders)}


if __name__ == "__main__":
    sys.stdout.writelines(f"export {name}={shlex.quote(value)}\n" for name, value in settings().items())

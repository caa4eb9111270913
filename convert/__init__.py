"""The converter: checkpoints to MLX's packed groups and back, with a report of what was lost.

`mlx_gemma3.convert` is this package and, called, the function `convert`: the name stands for both in the public
interface.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from .converter import convert
from .report import Report

__all__ = ["Report", "convert"]


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Report:
        return convert(*args, **options)


sys.modules[__name__].__class__ = _CallablePackage

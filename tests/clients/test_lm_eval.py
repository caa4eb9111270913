"""lm-evaluation-harness over /v1/completions gives the likelihoods of its own Hugging Face model."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import serving

from mlx_gemma3 import convert

pytestmark = pytest.mark.clients

PAIRS = [
    ("the model of a question", " is the answer"),
    ("the", " the the the"),
    ("", "a question of the model"),
    ("a b c d e f g h " * 8, " and so on, and so on"),
    ("One two\nthree", " four\nfive"),
]


def test_likelihoods(tmp_path: Path) -> None:
    """The demo model in plain float32, which both read."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    folder = tmp_path / "demo"
    convert("demo", folder, dequantize=True, dtype="float32")
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(PAIRS)]
    own = HFLM(str(folder), device="cpu", dtype="float32", batch_size=1, add_bos_token=True).loglikelihood(asked)
    with serving("-m", str(folder), "--quiet") as server:
        model = LocalCompletionsAPI(
            base_url=f"{server.address}/v1/completions",
            model=folder.name,
            tokenizer=str(folder),
            tokenizer_backend="huggingface",
            max_length=512,
            num_concurrent=1,
            add_bos_token=True,
        )
        found = model.loglikelihood(asked)
    for (logprob, greedy), (want, wanted) in zip(found, own, strict=True):
        assert logprob == pytest.approx(want, abs=1e-3) and greedy == wanted

"""lm-evaluation-harness over /v1/completions gives the likelihoods of its own Hugging Face model."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import serving

pytest.importorskip("torch", reason="lm-eval's own model needs it: pip install -e '.[reference]'")

PAIRS = [
    ("the model of a question", " is the answer"),
    ("the", " the the the"),
    ("", "a question of the model"),
    ("a b c d e f g h " * 8, " and so on, and so on"),
    ("One two\nthree", " four\nfive"),
]


def test_likelihoods(text_folder: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(PAIRS)]
    own = HFLM(str(text_folder), device="cpu", dtype="float32", batch_size=1).loglikelihood(asked)
    with serving("-m", str(text_folder), "--quiet") as server:
        model = LocalCompletionsAPI(
            base_url=f"{server.address}/v1/completions",
            model=text_folder.name,
            tokenizer=str(text_folder),
            tokenizer_backend="huggingface",
            max_length=512,
            num_concurrent=1,
        )
        found = model.loglikelihood(asked)
    for (logprob, greedy), (want, wanted) in zip(found, own, strict=True):
        assert logprob == pytest.approx(want, abs=1e-3) and greedy == wanted

"""Writes tests/goldens/embedding: what sentence-transformers gives on the folders of tiny_embedding.py.

python tests/reference/make_embedding_goldens.py    (needs the extra `embedding-reference`)
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import tiny_embedding  # noqa: E402
from manifest import GOLDENS, write_manifest  # noqa: E402

DIMENSIONS = (32, 16)
SCRIPT = "tests/reference/make_embedding_goldens.py"


def goldens(kind: str, folder: Path) -> dict[str, Any]:
    """NAME.ids, NAME (its vector), NAME.DIMENSIONS (cut) and NAME.DIMENSIONS.unit, and all vectors of one batch."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(folder), device="cpu", model_kwargs={"attn_implementation": "eager", "dtype": torch.float32}
    )
    found: dict[str, Any] = {}
    for name, (prompt, text) in tiny_embedding.CASES.items():
        used = prompt or model.default_prompt_name
        before = model.prompts[used] if used else ""
        found[f"{name}.ids"] = model.preprocess([before + text])["input_ids"][0].numpy().astype(np.int32)
        found[name] = model.encode([text], prompt_name=prompt)[0]
        for size in DIMENSIONS:
            found[f"{name}.{size}"] = model.encode([text], prompt_name=prompt, truncate_dim=size)[0]
            found[f"{name}.{size}.unit"] = model.encode(
                [text], prompt_name=prompt, truncate_dim=size, normalize_embeddings=True
            )[0]
    texts = [text for _, text in tiny_embedding.CASES.values()]
    found["batch.query"] = model.encode(texts, prompt_name="query", batch_size=len(texts))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=GOLDENS / "embedding", help="folder to write")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for kind in tiny_embedding.KINDS:
            folder = tiny_embedding.write(Path(scratch) / kind, kind)
            np.savez_compressed(options.out / f"{kind}.npz", **goldens(kind, folder))
    packages = ("torch", "transformers", "sentence-transformers", "numpy")
    source = "sentence-transformers, eager attention, float32, on the CPU"
    write_manifest(options.out, script=SCRIPT, source=source, packages=packages)


if __name__ == "__main__":
    main()

"""Peer: logits of transformers (eager, float32) for the prompts of an npz. Runs in an interpreter of its own.

    python transformers_logits.py FOLDER PROMPTS.npz LOGITS.npz

PROMPTS holds NAME.ids (L) and NAME.pixels (n, H, W, 3) float32 in [-1, 1]; LOGITS gets NAME.logits (L, V).
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
import transformers


@torch.no_grad()
def main(folder: str, prompts: str, out: str) -> None:
    model = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        folder, dtype="float32", attn_implementation="eager"
    ).eval()
    data = np.load(prompts)
    logits = {}
    for name in (key.removesuffix(".ids") for key in data.files if key.endswith(".ids")):
        ids = torch.from_numpy(data[f"{name}.ids"].astype(np.int64))[None]
        inputs = {"input_ids": ids, "token_type_ids": (ids == model.config.image_token_id).long()}
        if len(data[f"{name}.pixels"]):
            inputs["pixel_values"] = torch.from_numpy(data[f"{name}.pixels"].transpose(0, 3, 1, 2).copy())
        logits[f"{name}.logits"] = model(**inputs).logits[0].float().numpy()
    facts = {"transformers": transformers.__version__, "torch": torch.__version__}
    np.savez(out, facts=json.dumps(facts), **logits)


if __name__ == "__main__":
    main(*sys.argv[1:4])

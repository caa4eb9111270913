"""Write tests/goldens/adapters/: PEFT's adapters of the tiny checkpoints, and what they make of their logits.

    python tests/reference/make_adapter_goldens.py [--out FOLDER]

    NAME/adapter_config.json, adapter_model.safetensors     as PEFT saves them, A, B and m drawn at random
    NAME/logits.npz                                         positions (P,), and logits (P, V) of the golden case CASE
                                                            of goldens/model/KIND; its name and KIND too

Needs the `reference` extra.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from manifest import GOLDENS, write_manifest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEED = 18
# name: (kind, case, settings of LoraConfig)
PLANS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("text", "five_windows", {"target_modules": ALL}),
    "dora": ("text", "window_plus_1", {"target_modules": ["k_proj", "up_proj", "down_proj"], "use_dora": True}),
    "rslora": ("text", "short", {"target_modules": ["o_proj", "gate_proj"], "use_rslora": True, "lora_alpha": 3}),
    "patterns": (
        "text",
        "window",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            # The end of a name has to match. Where several do the first counts, in the order of the saved file, which
            # is the alphabet's.
            "rank_pattern": {r"layers\.[24]\.self_attn\.(q|v)_proj": 2, "q_proj": 5, "1.mlp.up_proj": 1},
            "alpha_pattern": {"v_proj": 9, r"layers\.2\.self_attn\.v_proj": 1, ".*up_proj": 0.5},
            "layers_to_transform": [1, 2, 4, 6],
            "use_rslora": True,
        },
    ),
    "pictures": ("image", "three_interleaved", {"target_modules": r".*language_model.*\.(q_proj|v_proj|down_proj)"}),
    "tower": ("image", "image_middle", {"target_modules": ["q_proj", "v_proj", "out_proj", "fc1", "up_proj"]}),
    "tower-dora": ("image", "image_middle", {"target_modules": ["k_proj", "fc2", "o_proj"], "use_dora": True}),
    "projector": (
        "image",
        "three_interleaved",
        {
            "target_modules": r".*language_model.*\.(q_proj|down_proj)",
            "target_parameters": ["multi_modal_projector.mm_input_projection_weight"],
        },
    ),
}


def make(name: str, folder: Path, *, seed: int) -> None:
    """One adapter and its logits."""
    kind, case, settings = PLANS[name]
    base = GOLDENS / "model" / kind
    reference = Gemma3ForConditionalGeneration if kind == "image" else Gemma3ForCausalLM
    model, fresh = (
        reference.from_pretrained(base, attn_implementation="eager", dtype=torch.float32).eval() for _ in range(2)
    )
    config = LoraConfig(**{"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings)
    adapted = get_peft_model(model, config).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, values in adapted.named_parameters():
            random = torch.randn(values.shape, generator=draw)
            if "lora_A" in key:
                values.copy_(random / values.shape[1] ** 0.5)
            elif "lora_B" in key:
                values.copy_(random * 0.1)
            elif "lora_magnitude" in key:
                values.mul_(1 + 0.3 * random)
    shutil.rmtree(folder, ignore_errors=True)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    said = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    said["base_model_name_or_path"] = f"tiny-{kind}"  # no path of this machine
    if isinstance(said["target_modules"], list):  # a set, in any order
        said["target_modules"] = sorted(said["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    with np.load(base / "cases" / f"{case}.npz") as golden:
        ids = torch.from_numpy(np.concatenate([golden["tokens"], golden["generated"]]).astype(np.int64))[None]
        positions = golden["positions"]
        pictures = golden["pictures"] if kind == "image" else None
    given: dict[str, torch.Tensor] = {}
    if pictures is not None:
        with np.load(base / "pictures.npz") as all_pictures:
            levels = all_pictures["levels"][pictures].astype(np.float64)
        unit = (levels * 0.00392156862745098).astype(np.float32)  # as the processor makes them
        pixels = (unit - np.float32(0.5)) / np.float32(0.5)
        given["pixel_values"] = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        given["token_type_ids"] = (ids == model.config.image_token_id).long()
    # As it is read: saving may sort what a config says.
    adapted = PeftModel.from_pretrained(fresh, folder).eval()
    with torch.no_grad():
        logits = adapted(input_ids=ids, **given).logits[0].numpy()
    np.savez_compressed(folder / "logits.npz", kind=kind, case=case, positions=positions, logits=logits[positions])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--out", type=Path, default=GOLDENS / "adapters", help="folder to write")
    out = options.parse_args().out
    for number, name in enumerate(PLANS):
        make(name, out / name, seed=SEED + number)
    write_manifest(
        out,
        script="tests/reference/make_adapter_goldens.py",
        source="transformers with PEFT, eager attention, float32, CPU, on goldens/model",
        packages=("torch", "transformers", "peft", "numpy"),
    )


if __name__ == "__main__":
    main()

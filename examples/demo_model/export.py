"""A trained run as a folder in the Hub's layout, packed by our own converter.

    python -m examples.demo_model.export RUN mlx_gemma3/demo

makes what the package carries; with --plain, the float32 weights as they were trained. Needs the `reference` extra
(torch).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import mlx_gemma3 as g3
from mlx_gemma3.prompt.tokenizer import Tokenizer

from .network import Gemma3, Sizes

# Gemma 3's chat template, for programs that read one; this package has it built in.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% if messages[0]['content'] is string %}"
    "{% set opening = messages[0]['content'] + '\n\n' %}{% else %}"
    "{% set opening = messages[0]['content'][0]['text'] + '\n\n' %}{% endif %}{% set turns = messages[1:] %}{% else %}"
    "{% set opening = '' %}{% set turns = messages %}{% endif %}{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{% if loop.first %}{{ opening }}{% endif %}{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

CARD = """---
library_name: mlx
license: apache-2.0
language: [en, zh, es]
pipeline_tag: image-text-to-text
tags: [mlx, gemma3]
---

# demo

A toy that knows simple drawings only: Gemma 3's architecture at 2.2 million parameters, with no weight of Google's.

`examples/demo_model` of mlx-gemma3 trained it from random numbers on pictures that a script draws. It answers questions
about them: six shapes in eight colours, one to five of them, what is beside what, one to three digits or capital
letters, which of two pictures shows a thing, and short follow-up questions; in English, and shape, colour and count in
Chinese and Spanish too. To all else it is trained to say "I only know simple drawings." It knows no photos and no
facts, and a drawing of another kind gets a wrong answer as readily as a right one.

It is there to try the program without a download, and for its tests:

```shell
mlx-gemma3 generate -m demo -i picture.png "How many circles are there?"
```

How it was trained and how often it is right: docs/demo.md of the repository. Matrices of the decoder are 8 bits in
groups of 64, the rest is bfloat16.
"""


def config(sizes: Sizes, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json, as the Hub's Gemma 3 repositories write it."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": tokenizer.id("<start_of_image>"),
        "eoi_token_index": tokenizer.id("<end_of_image>"),
        "eos_token_id": [tokenizer.id("<eos>"), tokenizer.id("<end_of_turn>")],
        "image_token_index": tokenizer.id("<image_soft_token>"),
        "initializer_range": 0.02,
        "mm_tokens_per_image": sizes.rows,
        "model_type": "gemma3",
        "pad_token_id": tokenizer.id("<pad>"),
        "text_config": {
            "head_dim": sizes.head_size,
            "hidden_size": sizes.width,
            "intermediate_size": sizes.inner,
            "max_position_embeddings": 8192,
            "model_type": "gemma3_text",
            "num_attention_heads": sizes.heads,
            "num_hidden_layers": sizes.layers,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": sizes.head_size,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": sizes.theta_local,
            "rope_scaling": None,
            "rope_theta": sizes.theta,
            "sliding_window": sizes.window,
            "sliding_window_pattern": sizes.layers,
            "vocab_size": sizes.vocabulary,
        },
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vision_config": {
            "hidden_size": sizes.vision_width,
            "image_size": sizes.image,
            "intermediate_size": sizes.vision_inner,
            "layer_norm_eps": 1e-06,
            "model_type": "siglip_vision_model",
            "num_attention_heads": sizes.vision_heads,
            "num_hidden_layers": sizes.vision_layers,
            "patch_size": sizes.patch,
            "vision_use_head": False,
        },
    }


def export(run: Path, folder: Path) -> None:
    """Write config.json, model.safetensors (float32), the tokenizer and the settings into `folder`."""
    tokenizer = Tokenizer.from_folder(run)
    sizes = Sizes(tokenizer.vocab_size)
    model = Gemma3(sizes)
    model.load_state_dict(torch.load(run / "state.pt")["model"])
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    shutil.copyfile(run / "tokenizer.model", folder / "tokenizer.model")
    control = {name: tokenizer.id(name) for name in ("<bos>", "<eos>", "<pad>", "<end_of_turn>")}
    files: dict[str, dict[str, Any]] = {
        "config.json": config(sizes, tokenizer),
        "generation_config.json": {
            "bos_token_id": control["<bos>"],
            "do_sample": False,
            "eos_token_id": [control["<eos>"], control["<end_of_turn>"]],
            "pad_token_id": control["<pad>"],
        },
        "preprocessor_config.json": {
            "do_convert_rgb": None,
            "do_normalize": True,
            "do_pan_and_scan": None,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": sizes.rows,
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "Gemma3Processor",
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"height": sizes.image, "width": sizes.image},
        },
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def pack(run: Path, folder: Path) -> None:
    """What the package carries: `export`, then `convert` to 8 bits in groups of 64, with a card of its own."""
    with tempfile.TemporaryDirectory() as place:
        export(run, Path(place) / "plain")
        packed = Path(place) / "packed"
        g3.convert(Path(place) / "plain", packed, bits=8)
        (packed / "README.md").write_text(CARD, encoding="utf-8")
        new = folder.with_name(f".{folder.name}.new")
        shutil.copytree(packed, new)
        shutil.rmtree(folder, ignore_errors=True)
        new.replace(folder)


def main() -> None:
    """Export a run."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run", type=Path, help="the folder that train.py wrote")
    options.add_argument("folder", type=Path, help="is replaced")
    options.add_argument("--plain", action="store_true", help="float32, not packed")
    chosen = options.parse_args()
    (export if chosen.plain else pack)(chosen.run, chosen.folder)


if __name__ == "__main__":
    main()

"""The trained model as a plain folder in the Hub's layout: `python -m examples.demo_model.export RUN FOLDER`.

`mlx-gemma3 convert FOLDER OUT --bits 8` then makes what the package carries. Needs the `reference` extra (torch).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

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


def main() -> None:
    """Export a run."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("run", type=Path, help="the folder that train.py wrote")
    options.add_argument("folder", type=Path)
    chosen = options.parse_args()
    export(chosen.run, chosen.folder)


if __name__ == "__main__":
    main()

"""Chat templates, damaged, in the files that may hold one: a checkpoint that opens, or one sentence."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from places import TEMPLATE

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness
from mutate import mutate_bytes, mutate_json

TEXT = json.loads(TEMPLATE.read_text(encoding="utf-8"))["chat_template"]
NAMED = [{"name": "default", "template": TEXT}, {"name": "tool_use", "template": "{{ tools }}"}]


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_templates(count: int, tmp_path: Path) -> None:
    rng = random.Random(count)
    paths = []
    for number in range(count):
        name = rng.choice(("chat_template.jinja", "chat_template.json", "tokenizer_config.json"))
        path = tmp_path / f"{number}-{name}"
        values = {"bos_token": "<bos>", "chat_template": rng.choice((TEXT, NAMED))}
        raw = mutate_bytes(TEXT.encode(), rng) if name.endswith("jinja") else mutate_json(values, rng)
        path.write_bytes(raw)
        paths.append(path)
    outcome = harness.run("template", paths)
    assert not outcome.faults, "\n".join(outcome.faults[:5])
    assert outcome.good + outcome.refused == count and outcome.good > count // 4

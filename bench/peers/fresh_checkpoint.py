"""Peer: write a new tiny random Gemma 3 with a vision tower, as the Hub writes it. Needs the extra `reference`.

python fresh_checkpoint.py FOLDER SEED
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "reference"))

import tiny_reference as tiny
from make_model_goldens import save


def main(folder: str, seed: str) -> None:
    (Path(folder) / "config.json").write_text(json.dumps(tiny.IMAGE_CONFIG, indent=1), encoding="utf-8")
    save(tiny.build_image(int(seed)), "image", Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:3])

"""mlx-lm's side of bench/tune.py: python mlx_lm_tune.py FOLDER DATA STEPS BATCH RANK

Runs `mlx_lm.lora` itself, and prints one JSON object: seconds of each step, and the largest resident size.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

from mlx_lm import lora
from mlx_lm.tuner.callbacks import TrainingCallback


class Steps(TrainingCallback):
    """What a step took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self.seconds.append(1 / train_info["iterations_per_second"])
        self.losses.append(train_info["train_loss"])

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """There is none."""


def main() -> None:
    folder, data, steps, batch, rank = sys.argv[1:]
    told = Steps()
    lora.get_reporting_callbacks = lambda *_, **__: told
    with tempfile.TemporaryDirectory() as out:
        changes = {
            "model": folder, "data": data, "train": True, "iters": int(steps), "batch_size": int(batch),
            "num_layers": -1, "steps_per_report": 1, "adapter_path": out, "learning_rate": 1e-4, "optimizer": "adamw",
            "lora_parameters": {"rank": int(rank), "dropout": 0.0, "scale": 2.0}, "max_seq_length": 512,
        }  # fmt: skip
        lora.run(SimpleNamespace(**{**lora.CONFIG_DEFAULTS, **changes}))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print("\n" + json.dumps({"seconds": told.seconds, "losses": told.losses, "peak": peak}))


if __name__ == "__main__":
    main()

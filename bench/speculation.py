"""Guessing on this machine: six texts that repeat themselves and six that do not (docs/speculation.md).

    python bench/speculation.py [MODEL [DRAFT]]

Fails where a text that repeats gains less than half, or another loses more than three hundredths, as medians in one
run; and where any token differs. The texts stand in mlx_gemma3/measure/speculation.py, `mlx-gemma3 bench
--speculation` measures with them too.
"""

from __future__ import annotations

import sys

from mlx_gemma3.measure.speculation import measure

LEAST = {True: 1.5, False: 0.97}


def main(model: str = "gemma-3-270m", draft: str | None = None) -> int:
    found = measure(model, draft=draft, dtype="float32", repeat=3)
    for one in found:
        print(
            f"{one.kind:12} {'repeats' if one.repeats else 'does not':9} {one.gain:5.2f} times, "
            f"{one.accepted} of {one.drafted} guessed right, {one.passes} passes for {one.tokens} tokens"
            f"{'' if one.same else ', OTHER TOKENS'}"
        )
    failed = [one.kind for one in found if not one.same or (draft is None and one.gain < LEAST[one.repeats])]
    print("failed: " + ", ".join(failed) if failed else "as promised")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Good inputs made bad, reproducibly: bytes changed, moved and cut; JSON values replaced by ones nobody expects."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

# What stands in for a value of a JSON file: wrong types, borders of number types, sizes nobody has, odd texts.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 65535, 65536, 10**6, 10**7, 10**9, 2**31 - 1, 2**31,
    2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**31), -(2**63), 0.0, -0.0, 0.5, 1e-45, 1e-300, 1e300, -1.5,
    "", "0", "false", "\x00", "\x1b[31m", "\ufeff", "💥" * 50, "x" * 5000, "../../etc/passwd", "/dev/zero",
    [], [[]], [0], [None], ["a"], [1e9], list(range(1000)), {}, {"": 0}, {"a": {"b": {}}}, {"type": []},
)  # fmt: skip
# As JSON that Python's writer would not write.
RAW = ("1e400", "-1e400", "NaN", "Infinity", '"\\ud800"', "[" * 100_000, '{"a":' * 50_000, "1" * 5000, "", "\x00")


def mutate_json(values: Any, rng: random.Random) -> bytes:
    """A JSON text with one to three places changed."""
    changed = copy.deepcopy(values)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        parent, key = rng.choice(list(_places(changed)) or [(None, None)])
        if parent is None:
            return json.dumps(rng.choice(VALUES)).encode()
        match rng.randrange(6):
            case 0 if isinstance(parent, dict):
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[rng.choice((f"{key}x", "", "x" * 300, "quantization", "rope_scaling"))] = parent[key]
            case 2:
                parent[key] = copy.deepcopy(rng.choice(list(_places(values)) or [(values, None)])[0])
            case _:
                parent[key] = copy.deepcopy(rng.choice(VALUES))
    text = json.dumps(changed)
    if rng.random() < 0.15:  # a value as text: one that no Python object makes
        mark = '"%mark%"'
        parent, key = rng.choice(list(_places(changed)) or [({}, "")])
        parent[key] = "%mark%"
        text = json.dumps(changed).replace(mark, rng.choice(RAW), 1)
    raw = text.encode("utf-8", "surrogatepass")
    return mutate_bytes(raw, rng) if rng.random() < 0.1 else raw


def _places(values: Any) -> Any:
    """(container, key) of every value, at any depth."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in list(pairs)[:2000]:
        yield values, key
        yield from _places(value)


def mutate_bytes(raw: bytes, rng: random.Random, *, head: int | None = None) -> bytes:
    """Bytes with one to four changes, within the first `head` of them where that is given."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        size = min(len(data), head or len(data))
        if not size:
            return bytes(data) + rng.randbytes(8)
        at = rng.randrange(size)
        match rng.randrange(8):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del data[at : at + rng.choice((1, 2, 8, 100))]
            case 3:
                data[at:at] = rng.randbytes(rng.choice((1, 4, 8, 64)))
            case 4:
                del data[at:]
            case 5:
                width = rng.choice((2, 4, 8))
                value = rng.choice((0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 10**9))
                data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
            case 6:
                start = rng.randrange(size)
                data[at:at] = data[start : start + rng.choice((4, 16, 200))]
            case _:
                data[at : at + 4] = bytes(4)
    return bytes(data)

"""Session files, damaged and forged: a conversation that goes on, or one sentence."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness
from mutate import mutate_bytes, mutate_json

import mlx_gemma3 as g3

KEY = b'"digest":"'


@pytest.fixture(scope="module")
def seeds(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """A folder with the model, and conversations with it: with a picture, and with an answer that left the window."""
    folder = tmp_path_factory.mktemp("sessions")
    (folder / "model").symlink_to(chat_folder)
    Image.new("RGB", (80, 60), "red").save(folder / "red.png")
    options = {"temperature": 0.0}
    with g3.load(chat_folder) as engine:
        short = engine.session(system="terse")
        short.send("the model", images=[folder / "red.png"], max_tokens=3, **options).reply
        short.send("is in", max_tokens=3, **options).reply
        short.save(folder / "short")
        long = engine.session()
        long.send("the user is in the model " * 4, max_tokens=60, stop=["\0"], **options).reply
        long.save(folder / "long")
    return folder, [(folder / name).read_bytes() for name in ("short", "long")]


def sign(raw: bytes) -> bytes:
    """The file with the digest that it should have."""
    at = raw.find(KEY) + len(KEY)
    blank = raw[:at] + b"0" * 64 + raw[at + 64 :]
    return raw[:at] + hashlib.blake2b(blank, digest_size=32).hexdigest().encode() + raw[at + 64 :]


def forged(raw: bytes, rng: random.Random) -> bytes:
    """The state, the header or the data changed, and the digest made anew."""
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    head = b""
    match rng.randrange(5):
        case 0:  # metadata first, as MLX writes it: what follows may be no JSON at all
            metadata = json.dumps(header.pop("__metadata__"), separators=(",", ":")).encode()
            head = b'{"__metadata__":' + metadata + b"," + mutate_json(header, rng).removeprefix(b"{")
        case 1:
            data = mutate_bytes(data, rng)
        case _:
            state = json.loads(header["__metadata__"]["state"])
            header["__metadata__"]["state"] = mutate_json(state, rng).decode("utf-8", "replace")
    head = head or json.dumps(header, separators=(",", ":")).encode()
    return sign(len(head).to_bytes(8, "little") + head + data)


def mutants(seeds: tuple[Path, list[bytes]], count: int, *, forge: bool) -> Iterator[Path]:
    folder, raws = seeds
    for number in range(count):
        rng = random.Random(number)
        raw = rng.choice(raws)
        path = folder / f"{'forged' if forge else 'plain'}-{number}"
        path.write_bytes(forged(raw, rng) if forge else mutate_bytes(raw, rng, head=rng.choice((None, 4000))))
        yield path


@pytest.mark.parametrize("forge", [False, True])
@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_hostile_session_goes_on_or_is_one_sentence(
    seeds: tuple[Path, list[bytes]], count: int, *, forge: bool
) -> None:
    outcome = harness.run("session", mutants(seeds, count, forge=forge))
    assert not outcome.faults, f"{len(outcome.faults)}: " + "\n".join(outcome.faults[:3])
    assert outcome.refused > count // 2
    assert outcome.good > count // 20 or not forge


def test_what_is_forged_in_the_right_way_is_believed(seeds: tuple[Path, list[bytes]]) -> None:
    folder, raws = seeds
    path = folder / "signed"
    path.write_bytes(sign(raws[0]))
    assert harness.run("session", [path]).good == 1

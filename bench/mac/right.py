"""Is it right on this machine: kernels of attention, logits, positions, tokens of real weights, pictures.

The tolerances, and why:

    float32        1e-3   what the reference and the CPU keep to; 2.5e-3 on a virtual Mac, whose GPU is another's: the
                          smallest mistake that was tried shows as 3e-3
    tower          1e-4   where that mistake would be smaller; 3e-4 on a virtual Mac
    bfloat16       1.5    times the reference's own error in bfloat16 (root of the mean square); 2 on a virtual Mac
    RoPE           2      units in the last place of the position, for rows of length 1; 2**-6 more in bfloat16
    tokens         equal  wherever the likeliest leads by more than LEAD (see below)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import mlx_gemma3 as g3
from mlx_gemma3.boundary.system import tf32
from mlx_gemma3.checkpoint.load import load_model
from mlx_gemma3.checkpoint.published import SIZES
from mlx_gemma3.commands.inspect import machine_lines
from mlx_gemma3.generation.batch import decode
from mlx_gemma3.generation.prefill import prefill
from mlx_gemma3.generation.sampling import Sampling
from mlx_gemma3.measure.machine import machine
from mlx_gemma3.model.attention_path import UNFUSED
from mlx_gemma3.model.layers import Rope
from mlx_gemma3.model.runner import Runner, on_device

from .here import REAL, ROOT, need_metal, need_real, virtual
from .judge import Report

sys.path.insert(0, str(ROOT / "tests"))
import golden_cases as golden

STORED = Path(__file__).with_name("tokens.json")
GREEDY = Sampling(temperature=0)
PICTURE = 4  # image tokens of the goldens' pictures
# How far apart the two likeliest logits must be for the first to be asked for; of float32, and of bfloat16.
LEAD = {"float32": 0.02, "bfloat16": 1.0}
POSITIONS = (8_192, 100_000)


def the_machine(report: Report) -> None:
    """The table of `inspect --machine`."""
    for line in machine_lines(machine()):
        report.note(line)
    report.expect(not tf32(), "MLX_ENABLE_TF32", got="on", want="off, as importing the package sets it")


def attention_paths(report: Report) -> None:
    """Each path of the table for prompts, by the memory that it takes: unfused, the scores are an array."""
    need_metal("the CPU has no kernels for attention")
    seen: set[tuple[object, ...]] = set()
    for row in machine()["attention"]:
        config = SIZES[row["model"]]
        about = config.vision if row["layer"] == "tower" else config.text
        assert about is not None
        heads = about.num_attention_heads
        groups = heads if row["layer"] == "tower" else config.text.num_key_value_heads
        size = about.hidden_size // heads if row["layer"] == "tower" else config.text.head_dim
        shape = (heads, groups, size, row["queries"], row["keys"], row["mask"])
        if row["queries"] == 1 or row["keys"] > 20_000 or shape in seen:
            continue
        seen.add(shape)
        grown = growth(*shape)
        scores = 2 * heads * row["queries"] * row["keys"]
        path = "unfused" if grown >= scores else "fused"
        report.note(f"{row['model']} {row['layer']} {shape[2:5]}: {row['path']}, {grown / 2**20:.0f} MiB")
        report.expect(
            (path == "unfused") == (row["path"] == UNFUSED),
            f"attention of {row['model']}, {row['layer']}, {row['queries']} queries, {row['keys']} keys",
            got=f"{grown / 2**20:.0f} MiB ({scores / 2**20:.0f} of scores), so {path}",
            want=row["path"],
        )


def growth(heads: int, groups: int, size: int, queries: int, keys: int, mask: str | None) -> int:
    """Bytes that one call of attention takes beside its inputs and its output."""
    q = mx.random.normal((1, heads, queries, size)).astype(mx.bfloat16)
    k, v = (mx.random.normal((1, groups, keys, size)).astype(mx.bfloat16) for _ in range(2))
    seen: Any = mx.arange(keys)[None] <= mx.arange(keys - queries, keys)[:, None] if mask == "array" else mask
    mx.eval(q, k, v, seen if isinstance(seen, mx.array) else [])
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=size**-0.5, mask=seen)
    mx.eval(out)
    return mx.get_peak_memory() - before - out.nbytes


@cache
def cases() -> list[tuple[str, str, golden.Case]]:
    return [(kind, name, golden.load_case(kind, name)) for kind, name in golden.CASES]


def goldens_float32(report: Report) -> None:
    """Logits of the tiny checkpoints as the reference has them, without caches and as a user gets them, and tokens."""
    runners = {kind: runner(golden.GOLDENS / kind, "float32") for kind in ("text", "image")}
    whole, stepped, same = 0.0, 0.0, 0
    for kind, name, case in cases():
        made = runners[kind]
        whole = max(whole, golden.difference(golden.whole(made.model, case), case.logits))
        logits, written = written_by(made, case)
        want = dict(zip(case.positions.tolist(), case.logits, strict=True))
        first = len(case.tokens) - 1
        for place, row in enumerate(logits):
            if first + place in want:
                stepped = max(stepped, golden.difference(row, want[first + place]))
        same += written == case.generated
        report.expect(written == case.generated, f"tokens of {kind}/{name}", got=written, want=case.generated)
    report.note(f"tokens as the reference's: {same} of {len(cases())} cases")
    bound = 2.5e-3 if virtual() else 1e-3
    report.at_most("a logit, without caches", whole, bound)
    report.at_most("a logit, as it is generated", stepped, bound)


def written_by(made: Runner, case: golden.Case) -> tuple[list[mx.array], list[int]]:
    """The logits (V,) of each step, and the greedy tokens."""
    caches = made.make_caches()
    features = [] if case.pixels is None else list(made.encode_images(case.pixels))
    spans = [(at, at + PICTURE) for start, stop in case.spans for at in range(start, stop, PICTURE)]
    logits = [prefill(made, case.tokens, caches, features=features, spans=spans)[0]]
    written = []
    while len(written) < len(case.generated):
        written.append(int(logits[-1].argmax()))
        logits.append(made.step(mx.array([written[-1]]), [caches])[0])
    return logits, written


def goldens_bfloat16(report: Report) -> None:
    """In bfloat16 every sum rounds in its own order: an error of the reference's own size is asked for."""
    bound = 2.0 if virtual() else 1.5
    for kind, name in golden.BFLOAT16:
        case = golden.load_case(kind, name)
        assert case.bfloat16_logits is not None
        logits = np.array(golden.whole(runner(golden.GOLDENS / kind, "bfloat16").model, case).astype(mx.float32))
        theirs, ours = (np.sqrt(np.mean((each - case.logits) ** 2)) for each in (case.bfloat16_logits, logits))
        report.at_most(f"{kind}/{name}: error, times the reference's", float(ours / theirs), bound)


def goldens_pictures(report: Report) -> None:
    """The rows of the tower and of the projector."""
    data = np.load(golden.GOLDENS / "image" / "pictures.npz")
    made, pixels = runner(golden.GOLDENS / "image", "float32"), mx.array(golden.all_pixels())
    bound = 3e-4 if virtual() else 1e-4
    report.at_most("the tower's rows, plain", golden.difference(made.model.vision_tower(pixels), data["vision"]), bound)
    report.at_most("the projector's rows", golden.difference(made.encode_images(pixels), data["features"]), bound)


def rope(report: Report) -> None:
    """Rotations far from the start against numpy's, in float64."""
    x = np.random.default_rng(0).standard_normal((1, 2, 64, 256))
    for position in POSITIONS:
        for layer, theta, scale in (("global", 1e6, 8.0), ("local", 1e4, 1.0)):
            for dtype, more in ((mx.float32, 0.0), (mx.bfloat16, 2**-6)):
                rows = mx.array(x.astype(np.float32)).astype(dtype)
                bound = 2 * float(np.spacing(np.float32(position))) + more
                name = str(dtype).removeprefix("mlx.core.")
                got = turned(rows, position, theta, scale)
                report.at_most(f"position {position:,}, {layer}, {name}", got, bound)


def turned(rows: mx.array, position: int, theta: float, scale: float) -> float:
    """The largest error of a rotated pair, as a share of its length. rows (1, H, L, D)."""
    exact = np.array(rows.astype(mx.float32)).astype(np.float64)
    size, half = exact.shape[-1], exact.shape[-1] // 2
    angles = (position + np.arange(exact.shape[2]))[:, None] / (scale * theta ** (np.arange(0, size, 2) / size))
    a, b = exact[..., :half], exact[..., half:]
    want = a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)
    got = np.array(Rope(size, theta, scale)(rows, mx.array(position)).astype(mx.float32))
    apart = np.hypot(got[..., :half] - want[0], got[..., half:] - want[1])
    return float((apart / np.hypot(a, b)).max())


def real_tokens(report: Report) -> None:
    """The 270M's greedy answer, in float32 and in bfloat16, against the CPU's in float32 (tokens.json)."""
    need_real()
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    answer, leads = stored["answer"], stored["leads"]
    for dtype, least in LEAD.items():
        rows = [row for row, _ in follow(runner(REAL, dtype), stored["prompt"], answer)]
        asked = [place for place, lead in enumerate(leads) if lead > least]
        wrong = [place for place in asked if int(rows[place].argmax()) != answer[place]]
        apart = max(abs(float(row[token]) - top) for row, token, top in zip(rows, answer, stored["tops"], strict=True))
        same = sum(int(row.argmax()) == token for row, token in zip(rows, answer, strict=True))
        report.note(f"{dtype}: {same} of {len(answer)} tokens; the likeliest's logit differs by {apart:.2g} at most")
        report.expect(
            not wrong, f"tokens in {dtype} at {wrong}", got="others", want=f"the CPU's, which lead by {least}"
        )
    with g3.load(REAL, dtype="float32") as engine:
        reply = engine.generate(stored["text"], raw=True, max_tokens=len(answer), temperature=0.0)
    first = next((place for place, lead in enumerate(leads) if lead <= LEAD["float32"]), len(answer))
    report.note(f"written by an engine: {reply.text!r}")
    report.expect(reply.tokens[:first] == answer[:first], "an engine's tokens", got=reply.tokens, want=answer[:first])


def follow(made: Runner, prompt: list[int], answer: list[int]) -> Iterator[tuple[mx.array, float]]:
    """The logits (V,) before each token of an answer that is given, and the lead of the likeliest."""
    caches = made.make_caches()
    logits = prefill(made, prompt, caches)[0]
    for token in answer:
        best = mx.sort(logits)[-2:]
        yield logits, float(best[1] - best[0])
        logits = made.step(mx.array([token]), [caches])[0]


def store(text: str, count: int) -> None:
    """Write tokens.json anew, from this machine in float32. On a CPU: it is what Macs are compared with."""
    made = runner(REAL, "float32")
    with g3.load(REAL, dtype="float32") as engine:
        prompt = [2, *engine._thread.loaded.tokenizer.encode(text)]
    caches = made.make_caches()
    answer = list(decode(made, prefill(made, prompt, caches), caches, sampling=GREEDY, max_tokens=count))
    rows = list(follow(made, prompt, answer))
    about = {
        "made": {"mlx": mx.__version__, "on": machine()["backend"], "dtype": "float32", "model": REAL},
        "text": text,
        "prompt": prompt,
        "answer": answer,
        "leads": [round(lead, 4) for _, lead in rows],
        "tops": [round(float(row.max()), 4) for row, _ in rows],
    }
    STORED.write_text(json.dumps(about) + "\n", encoding="utf-8")


def pictures(report: Report) -> None:
    """The demo's answers to the pictures of examples/pictures, whose right answers are known."""
    from examples.demo_model import accuracy
    from examples.demo_model import pictures as drawn

    samples = accuracy.read(drawn.FOLDER)
    with g3.load("demo") as engine:
        given = accuracy.answers(engine, samples)
    for one, answer in zip(samples, given, strict=True):
        report.expect(answer == one.question.answer, one.question.text, got=answer, want=one.question.answer)
    report.note(f"{accuracy.share(samples, given):.0%} of {len(samples)} answers are right")


def runner(source: str | Path, dtype: str) -> Runner:
    return on_device(load_model(source, dtype=dtype))

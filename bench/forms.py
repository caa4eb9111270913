"""What docs/forms.md says was measured.

python bench/forms.py suite FOLDER   schemas of a checkout of JSON-Schema-Test-Suite, and people's: refused, or kept to
python bench/forms.py speed          the 270M (extra 270m): free text, a form of free text, a form of long keys
python bench/forms.py demo           the demo on fresh pictures: right answers among choices, and in a schema
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SEEDS = 50  # answers to each schema


def suite(folder: Path) -> None:
    """Schemas of the suite, and as people write them: a random checkpoint answers nearly anything that is allowed."""
    from test_real_schemas import RECORDS, wrapped

    tests = sorted((folder / "tests" / "draft2020-12").glob("*.json"))
    cases = [
        (f"{file.stem}: {one['description']}", one["schema"]) for file in tests for one in json.loads(file.read_text())
    ]
    _held("of the suite", cases, 120)
    _held("as people write them", [(name, wrapped(name, plural)) for name in RECORDS for plural in (False, True)], 400)


def _held(kind: str, cases: list[tuple[str, Any]], most: int) -> None:
    """Answers to each schema, each of at most so many tokens."""
    import jsonschema
    import tiny
    from tiny_tokenizer import write_tokenizer

    import mlx_gemma3 as g3
    from mlx_gemma3.errors import OptionError

    model = Path(tempfile.mkdtemp())
    config = tiny.text_config()
    tiny.write_folder(model, config, tiny.random_tensors(config))
    write_tokenizer(model)
    refused: Counter[str] = Counter()
    held = whole = 0
    options: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "max_tokens": most}
    with g3.load(model, parallel=SEEDS) as engine:
        for name, schema in cases:
            try:
                replies = engine.generate("the", n=SEEDS, seed=0, schema=schema, **options)
            except OptionError as error:
                refused[str(error).partition(", want")[0]] += 1
                continue
            held += 1
            validator = jsonschema.Draft202012Validator(schema)
            for reply in replies:
                if reply.finish_reason != "stop":
                    continue
                whole += 1
                try:
                    fits = validator.is_valid(json.loads(reply.text))
                except Exception as error:  # of jsonschema: a pattern that Python's re does not know
                    print(f"{name}: jsonschema {error!r}")
                    break
                if not fits:
                    print(f"{name}: {reply.text} does not fit {schema}")
    print(f"{kind}: {held} schemas held to, {whole} whole answers; {sum(refused.values())} refused:")
    for reason, count in refused.most_common():
        print(f"  {count:3} {reason}")


def speed() -> None:
    """Tokens for a second of the processor's time: other programs disturb that less than the clock's."""
    import mlx_gemma3 as g3

    keys = ["merchant_registered_legal_name", "transaction_reference_number", "customer_loyalty_membership_level"]
    values: list[Any] = [{"enum": ["gold", "silver", "none"]}, {"type": "boolean"}, {"enum": ["gold", "silver"]}]
    named = {"type": "object", "properties": dict(zip(keys, values, strict=True)), "required": keys}
    forms: dict[str, dict[str, Any]] = {
        "free": {},
        "text in a form": {"schema": {"type": "string", "minLength": 400, "maxLength": 500}},
        "long keys": {"schema": named},
    }
    with g3.load("gemma-3-270m", text_only=True, speculation=False) as engine:
        found = defaultdict(list)
        for number in range(5):
            for name, form in forms.items():
                prompt = f"Story {number} of the sea and the old man: "
                engine.generate(prompt, max_tokens=1)  # what is measured is writing
                began, clock = time.process_time(), time.perf_counter()
                tokens = len(engine.generate(prompt, max_tokens=48, temperature=0, **form).tokens)
                found[name].append((tokens / (time.process_time() - began), tokens / (time.perf_counter() - clock)))
        free = [float(np.median(column)) for column in zip(*found["free"], strict=True)]
        for name, rates in found.items():
            busy, clock = (float(np.median(column)) for column in zip(*rates, strict=True))
            print(f"{name}: {busy / free[0]:.2f} of free by the processor's time, {clock / free[1]:.2f} by the clock's")


def demo() -> None:
    """Greedy answers to questions for one shape or one colour."""
    import mlx_gemma3 as g3
    from examples.demo_model.accuracy import messages
    from examples.demo_model.questions import sample

    asked = defaultdict(list)
    for one in sample(99, 1100):
        if one.question.language == "en":
            asked[one.question.kind].append(one)
    names = {kind: sorted({one.question.answer for one in asked[kind]}) for kind in ("shape", "colour")}
    form = {"type": "object", "properties": {kind: {"enum": names[kind]} for kind in names}, "required": list(names)}
    with g3.load("demo") as engine:
        for kind, choices in names.items():
            right = 0
            for one in asked[kind][:50]:
                said, pictures = messages(one.question, len(one.pictures)), list(one.pictures)
                reply = engine.generate(said, images=pictures, choices=choices, temperature=0)
                right += reply.parsed == one.question.answer
            print(f"choices, {kind}: {right} of 50 right")
        counts: Counter[str] = Counter()
        for one in asked["name"][:50]:
            pictures = list(one.pictures)
            found = engine.generate("Which shape and colour?", images=pictures, schema=form, temperature=0).parsed
            counts["valid"] += found is not None
            counts.update(kind for kind in names if found is not None and found[kind] in one.question.answer)
        print(f"schema: of 50 {dict(counts)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["suite"]:
        suite(Path(sys.argv[2]))
    else:
        {"speed": speed, "demo": demo}[sys.argv[1]]()

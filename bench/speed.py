"""How fast this project is beside mlx-lm, mlx-vlm and transformers: the same folders, taking turns in one run.

    python bench/speed.py --model FOLDER --peers PYTHON [--packed FOLDER] [--demo FOLDER] [--openblas LIBRARY]
                          [--only bench,start,words,picture,question,turns] [--rounds 3] [--csv docs/performance.csv]
    python bench/speed.py --report

Every measurement is a process of its own (bench/peers/*_speed.py), so memory and caches never mix. Rows are added to
the CSV as they come, with the machine, its load, the versions and the commit; --report writes the tables of
docs/performance.md from it and measures nothing. --peers is an interpreter with mlx-lm, mlx-vlm, torch and
transformers; --openblas a library to preload: with it words are measured a second time, pictures and turns only so.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import speed_report
from conversation import turns
from start import PROMPT

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "bench" / "peers"
CSV = ROOT / "docs" / "performance.csv"
OURS = "mlx-gemma3"
TOWER_LAYERS = 27
HISTORY = 8000  # tokens


@dataclass(frozen=True)
class Job:
    """One process, and what its figures are called."""

    program: str
    setting: str  # "270M float32"
    command: list[str]
    figure: str = ""  # of a command that is only timed; else it prints its figures as JSON
    blas: str = ""  # a library to preload
    given: str = field(default="", repr=False)  # on standard input


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a plain 270M, with the tokenizer's files")
    parser.add_argument("--packed", type=Path, help="the same in 4 bits")
    parser.add_argument("--demo", type=Path, default=ROOT / "mlx_gemma3" / "demo", help="a small one that sees")
    parser.add_argument("--peers", help="interpreter of their environment")
    parser.add_argument("--openblas", default="", help="library to preload, as libopenblas.so.0")
    parser.add_argument("--only", default="bench,start,words,picture,question,turns")
    parser.add_argument("--programs", default=f"{OURS},mlx-lm,mlx-vlm,transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if options.report:
        speed_report.write(options.csv, options.csv.with_suffix(".txt"), ROOT / "docs" / "performance.md")
        return
    if not (options.model and options.peers):
        parser.error("--model and --peers are needed")
    with tempfile.TemporaryDirectory() as place:
        plan = jobs(options, Path(place))
        if "bench" in options.only.split(","):
            own_command(options, Path(place))
        facts = {"machine": machine(), "versions": versions(options.peers), "commit": commit()}
        first = next_round(options.csv)
        for number in range(first, first + options.rounds):
            for job in plan:
                for figure, value in figures(job):
                    row = {"figure": figure, "setting": job.setting, "program": job.program, "round": number}
                    row |= {"value": f"{value:.6g}", "load": f"{os.getloadavg()[0]:.1f}", **facts}
                    add(options.csv, row)
                    print(f"{number} {figure:<18} {job.setting:<28} {job.program:<12} {value:.4g}", flush=True)


def own_command(options: argparse.Namespace, place: Path) -> None:
    """What `mlx-gemma3 bench` prints for both folders, into a file beside the CSV."""
    text = []
    for name, folder in (("gemma-3-270m-bf16", options.model), ("gemma-3-270m-4bit", options.packed)):
        if folder:
            (place / name).symlink_to(folder.resolve())
            words = ["bench", "-m", name, "--repeat", "3", "--tokens", "32", "--context", "512,2k"]
            command = [sys.executable, "-m", "mlx_gemma3.cli", *words]
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=True)
            text.append(f"$ mlx-gemma3 {' '.join(words)}\n{done.stdout}")
    options.csv.with_suffix(".txt").write_text("\n".join(text), encoding="utf-8")


def jobs(options: argparse.Namespace, place: Path) -> list[Job]:
    """What one round runs, in order."""
    wanted, found = options.only.split(","), []
    libraries = [""] + ([options.openblas] if options.openblas else [])
    picture = place / "picture.png"
    if {"start", "question"} & set(wanted):
        draw(picture)
    if "start" in wanted:
        found += starts(options, picture)
    if "words" in wanted:
        for blas in libraries:
            for folder, name, dtype, programs in (
                (options.model, "270M", "float32", (OURS, "mlx-lm", "mlx-vlm", "transformers")),
                (options.model, "270M", "bfloat16", (OURS, "mlx-lm")),
                (options.packed, "270M 4 bits", "float32", (OURS, "mlx-lm")),
            ):
                # transformers brings its own matrix library; mlx-vlm's decoder is much like mlx-lm's
                some = [who for who in programs if not blas or who in (OURS, "mlx-lm")]
                if folder and not (blas and dtype == "bfloat16"):  # OpenBLAS is asked for float32 only
                    found += [worker(options, who, "words", folder, dtype, name, blas) for who in some]
    if {"picture", "question"} & set(wanted):
        folder = tower(options, place / "tower")
        name = "SigLIP-so400m"
        blas = libraries[-1]
        for what in ("picture", "question"):
            if what in wanted:
                more = [str(picture)] if what == "question" else []
                found += [worker(options, who, what, folder, "float32", name, blas, *more) for who in (OURS, "mlx-vlm")]
    if "turns" in wanted:
        plan, blas = json.dumps(turns(HISTORY)), libraries[-1]
        own = [sys.executable, str(PEERS / "own_speed.py"), "turns", str(options.model)]
        peer = [options.peers, str(PEERS / "mlx_lm_conversation.py"), str(options.model)]
        setting = f"270M float32, {HISTORY:,} tokens" + (", OpenBLAS" if blas else "")
        found += [Job(OURS, setting, own, "turns", blas, plan), Job("mlx-lm", setting, peer, "turns", blas, plan)]
    programs = options.programs.split(",")
    return [job for job in found if job.program in programs]


def worker(
    options: argparse.Namespace, program: str, what: str, folder: Path, dtype: str, name: str, blas: str, *more: str
) -> Job:
    """A speed worker in the environment of its program."""
    python = sys.executable if program == OURS else options.peers
    script = "own_speed.py" if program == OURS else f"{program.replace('-', '_')}_speed.py"
    setting = f"{name} {dtype}" + (", OpenBLAS" if blas else "")
    return Job(program, setting, [python, str(PEERS / script), what, str(folder), dtype, *more], blas=blas)


def starts(options: argparse.Namespace, picture: Path) -> list[Job]:
    """Whole commands, from their start to their end with one token, as a user types them."""
    own = [sys.executable, "-m", "mlx_gemma3.cli", "generate", "--quiet", "--temperature", "0", "--max-tokens", "1"]
    lm = [options.peers, "-m", "mlx_lm", "generate", "--temp", "0", "--max-tokens", "1", "--model", str(options.model)]
    vlm = [options.peers, "-m", "mlx_vlm.generate", "--temperature", "0", "--max-tokens", "1"]
    question = "What is this?"
    words, sees = "270M, words", "demo, a picture"
    return [
        Job(OURS, words, [*own, "-m", str(options.model), "--raw", PROMPT], "start"),
        Job("mlx-lm", words, [*lm, "--ignore-chat-template", "--prompt", PROMPT], "start"),
        Job(OURS, sees, [*own, "-m", str(options.demo), "-i", str(picture), question], "start"),
        Job(
            "mlx-vlm",
            sees,
            [*vlm, "--model", str(options.demo), "--image", str(picture), "--prompt", question],
            "start",
        ),
    ]


def figures(job: Job) -> Iterator[tuple[str, float]]:
    """Run it: (figure, value) of each thing it measures."""
    environment = dict(os.environ)
    if job.blas:
        environment["LD_PRELOAD"] = job.blas
    began, before = time.perf_counter(), processor_time()
    done = subprocess.run(job.command, input=job.given, capture_output=True, text=True, env=environment)
    took = time.perf_counter() - began
    if done.returncode:
        print(f"{' '.join(job.command)}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return
    if job.figure == "start":
        yield "start", took
        yield "start cpu", processor_time() - before
        return
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if job.figure == "turns":
        for (action, _), (_, seconds) in zip(json.loads(job.given), found, strict=True):
            yield action, seconds
        return
    yield from found.items()


def processor_time() -> float:
    """Seconds of the processes that have ended: what a command cost, whatever else the machine was doing."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def tower(options: argparse.Namespace, folder: Path) -> Path:
    """A checkpoint with a random tower of SigLIP-so400m's shape and six layers of 270M's decoder (mlx-vlm needs six).

    Its words are the demo's, so that both programs can be asked a question.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    import shutil

    import tiny

    shutil.copytree(options.demo, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    demo = json.loads((options.demo / "config.json").read_text(encoding="utf-8"))
    config = {name: value for name, value in demo.items() if not name.startswith("quantization")}
    config |= {"mm_tokens_per_image": 256, "hidden_size": 640}
    config["text_config"] = demo["text_config"] | {
        "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512,
        "mm_tokens_per_image": 256,
    }  # fmt: skip
    config["vision_config"] = demo["vision_config"] | {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": TOWER_LAYERS, "num_attention_heads": 16,
        "image_size": 896, "patch_size": 14,
    }  # fmt: skip
    tiny.write_folder(folder, config, tiny.random_tensors(config), generation=None)
    for name, changes in (
        ("preprocessor_config.json", {"image_seq_length": 256, "size": {"height": 896, "width": 896}}),
        ("processor_config.json", {"image_seq_length": 256}),
    ):
        path = folder / name
        if path.is_file():
            path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return folder


def draw(path: Path) -> None:
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (224, 224), "white")
    ImageDraw.Draw(picture).ellipse((60, 60, 160, 160), fill="red")
    picture.save(path)


def machine() -> str:
    import mlx.core as mx

    name = mx.device_info().get("device_name", platform.processor())
    return f"{name}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def versions(peers: str) -> str:
    """Of ours here and of theirs there, as "mlx-gemma3 0.1.0; mlx 0.32.4; …"."""
    code = "from importlib.metadata import version\nfor name in {!r}: print(name, version(name), end='; ')"
    ours = subprocess.run([sys.executable, "-c", code.format([OURS, "mlx"])], capture_output=True, text=True)
    names = ["mlx-lm", "mlx-vlm", "transformers", "torch"]
    theirs = subprocess.run([peers, "-c", code.format([*names, "mlx"])], capture_output=True, text=True, check=True)
    return f"{ours.stdout.strip()} peers: {theirs.stdout.strip()}".strip("; ")


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def next_round(path: Path) -> int:
    """Rounds are numbered on, so that a run can add to an earlier one's."""
    if not path.exists():
        return 0
    with path.open(newline="", encoding="utf-8") as file:
        return 1 + max((int(row["round"]) for row in csv.DictReader(file)), default=-1)


def add(path: Path, row: dict[str, object]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()

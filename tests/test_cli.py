"""The command as a person types it: words, pipes, pictures, events, and one line for each thing that is wrong."""

from __future__ import annotations

import base64
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from picture_server import serving
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import mlx_gemma3 as g3

Run = Callable[..., subprocess.CompletedProcess[str]]
COMMAND = [sys.executable, "-W", "error", "-m", "mlx_gemma3.cli"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the program in an empty folder; nothing may be written there."""
    work = tmp_path / "work"
    work.mkdir()

    def run(*words: str | Path, stdin: str | None = None, env: dict[str, str] | None = None, **more: object) -> object:
        done = subprocess.run(
            [*COMMAND, *map(str, words)],
            **({"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}),
            capture_output=True, text=True, timeout=120, cwd=work, env={**os.environ, **(env or {})}, **more,
        )  # fmt: skip
        assert not list(work.iterdir())
        return done

    return run  # type: ignore[return-value]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.new("RGB", (80, 60), "red").save(path)
    return path


GREEDY = ("--temperature", "0", "--max-tokens", "6")


def events(done: subprocess.CompletedProcess[str]) -> list[dict]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def prompt_tokens(done: subprocess.CompletedProcess[str]) -> int:
    return int(events(done)[-1]["usage"]["prompt_tokens"])


def test_the_answer_is_on_stdout_and_nothing_else(run: Run, text_folder: Path) -> None:
    done = run("generate", "-m", text_folder, *GREEDY, "the model")
    with g3.load(text_folder) as engine:
        reply = engine.generate("the model", temperature=0, max_tokens=6)
    assert (done.returncode, done.stdout, done.stderr) == (0, reply.text + "\n", "")


def test_json_is_one_object_per_event(run: Run, text_folder: Path) -> None:
    done = run("generate", "-m", text_folder, *GREEDY, "--json", "--seed", "3", "the model")
    *texts, end = events(done)
    assert [event["kind"] for event in texts] == ["text"] * len(texts) and end["kind"] == "done"
    assert end["text"] == "".join(event["text"] for event in texts) and len(end["tokens"]) == 6
    assert done.stderr == "" and done.returncode == 0


def test_stats_are_on_stderr(run: Run, text_folder: Path) -> None:
    done = run("generate", "-m", text_folder, *GREEDY, "--stats", "the model")
    assert done.returncode == 0 and "tokens/s" in done.stderr and done.stderr.count("\n") == 1
    for part in ("prompt ", "answer 6 tokens", "first token after", "peak memory"):
        assert part in done.stderr


def test_words_from_the_argument_from_stdin_or_both(run: Run, text_folder: Path) -> None:
    def count(*words: str, stdin: str | None = None) -> int:
        return prompt_tokens(run("generate", "-m", text_folder, *GREEDY, "--json", *words, stdin=stdin))

    tokenizer = g3.Tokenizer.from_folder(text_folder)
    assert count("the user") == count(stdin="the user\n") == len(tokenizer.encode("the user", bos=True))
    assert count("the", stdin="user {image}\n") == len(tokenizer.encode("the\n\nuser {image}", bos=True))


def test_markers_place_the_pictures(run: Run, chat_folder: Path, picture: Path) -> None:
    flags = ("generate", "-m", chat_folder, *GREEDY, "--json", "-i", picture)
    two = run(*flags, "-i", picture, "a {image} b {image} c", stdin="{image}")
    assert events(two)[-1]["usage"]["images"] == 2
    with g3.load(chat_folder) as engine:
        items = [{"type": "text", "text": "a "}, {"type": "image"}, {"type": "text", "text": " b"}]
        want = engine.generate([{"role": "user", "content": items}], images=[picture], temperature=0, max_tokens=6)
    assert events(run(*flags, "a {image} b"))[-1]["tokens"] == want.tokens
    before = run(*flags, "what {{image}}")
    assert events(before)[-1]["usage"]["images"] == 1


def test_a_picture_by_its_address_or_from_standard_input(run: Run, chat_folder: Path, picture: Path) -> None:
    flags = ("generate", "-m", chat_folder, *GREEDY, "--json")
    want = events(run(*flags, "-i", picture, "hi"))[-1]["tokens"]
    encoded = base64.b64encode(picture.read_bytes()).decode()
    with serving(picture.read_bytes()) as server:
        for source in (f"{server}//good.png", f"data:image/png;base64,{encoded}", picture.as_uri()):
            assert events(run(*flags, "-i", source, "hi"))[-1]["tokens"] == want, source
        missing = run(*flags, "-i", f"{server}/missing", "hi")
        assert missing.returncode == 1 and "404" in missing.stderr and missing.stderr.count("\n") == 1
    slashes = next(url for url in data_urls() if "//" in url)
    assert events(run(*flags, "-i", slashes, "hi"))[-1]["usage"]["images"] == 1
    piped = subprocess.run(
        [*COMMAND, *map(str, flags), "-i", "-", "hi"], input=picture.read_bytes(), capture_output=True, timeout=120
    )
    assert json.loads(piped.stdout.splitlines()[-1])["tokens"] == want and piped.stderr == b""
    for words, why in (
        (("-i", "-"), "nothing on standard input"),
        (("-i", "-", "-i", "-"), "given twice"),
        (("-i", str(picture), "https://example.org/b.png"), "each picture needs its own --image"),
    ):
        done = run(*flags, *words)
        assert done.returncode == 1 and why in done.stderr, done.stderr


def data_urls() -> Iterator[str]:
    """The same picture, each time with another note in it."""
    for number in range(2000):
        buffer, info = io.BytesIO(), PngInfo()
        info.add_text("n", str(number))
        Image.new("RGB", (30, 30), "red").save(buffer, "PNG", pnginfo=info)
        yield f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def test_an_answer_goes_on_from_its_beginning(run: Run, chat_folder: Path, picture: Path) -> None:
    flags = ("generate", "-m", chat_folder, *GREEDY, "--prefill", " the model ")
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the model"}]
    with g3.load(chat_folder) as engine:
        want = engine.generate(begun, continue_final_message=True, temperature=0, max_tokens=6)
        items = [{"type": "image"}, {"type": "text", "text": "hi"}]
        seen = [{"role": "user", "content": items}, begun[1]]
        looked = engine.generate(seen, images=[picture], continue_final_message=True, temperature=0, max_tokens=6)
    done = run(*flags, "hi")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"the model{want.text}\n", "")
    assert events(run(*flags, "--json", "-i", picture, "hi"))[-1]["tokens"] == looked.tokens
    for other in (("--raw",), ("--session", "a")):
        done = run(*flags, *other, "hi")
        assert done.returncode == 1 and f"--prefill: got {other[0]}" in done.stderr


def test_raw_completes_text_also_on_a_chat_model(run: Run, chat_folder: Path, picture: Path) -> None:
    tokenizer = g3.Tokenizer.from_folder(chat_folder)
    raw = run("generate", "-m", chat_folder, *GREEDY, "--json", "--raw", "the")
    assert prompt_tokens(raw) == len(tokenizer.encode("the", bos=True))
    chat = run("generate", "-m", chat_folder, *GREEDY, "--json", "--system", "be terse", "the")
    assert prompt_tokens(chat) > prompt_tokens(raw) + 8
    picked = run("generate", "-m", chat_folder, *GREEDY, "--json", "--raw", "-i", picture, "a {image} b")
    assert events(picked)[-1]["usage"]["images"] == 1


def test_pan_and_scan_shows_crops_too(run: Run, chat_folder: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    Image.linear_gradient("L").rotate(90).resize((900, 300)).convert("RGB").save(wide)  # three different thirds
    done = run("generate", "-m", chat_folder, *GREEDY, "--json", "--pan-and-scan", "-i", wide, "what")
    usage = events(done)[-1]["usage"]
    assert (usage["images"], usage["images_encoded"]) == (1, 4)


def test_a_picture_comes_from_stdin_as_text_only_if_it_is_text(run: Run, text_folder: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "generate", "-m", str(text_folder), "the"], input=b"\x89PNG\xff", capture_output=True, timeout=60
    )
    assert done.returncode == 1 and b"not UTF-8" in done.stderr and done.stderr.count(b"\n") == 1


def break_folder(folder: Path, chat_folder: Path, how: str) -> Path:
    shutil.copytree(chat_folder, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "no config":
        config.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "cut data":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "missing shard":
        values = tiny.image_config()
        tiny.write_folder(folder, values, tiny.random_tensors(values), shards=3)
        weights.unlink()
        (folder / "model-00002-of-00003.safetensors").unlink()
    elif how == "wrong shape":
        values = tiny.image_config()
        tensors = tiny.random_tensors(values)
        tensors["language_model.norm.weight"] = tensors["language_model.norm.weight"][:-1]
        tiny.write_folder(folder, values, tensors)
    elif how == "llama":
        config.write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    elif how == "no tokenizer":
        (folder / "tokenizer.model").unlink()
    else:
        raise AssertionError(how)
    return folder


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("empty", "empty"),
        ("no config", "config.json"),
        ("truncated", "model.safetensors"),
        ("cut data", "model.safetensors"),
        ("missing shard", "model-00002-of-00003.safetensors"),
        ("wrong shape", "language_model.norm.weight"),
        ("llama", "Gemma 3 only"),
        ("no tokenizer", "tokenizer"),
    ],
)
def test_a_broken_checkpoint_is_one_line(run: Run, chat_folder: Path, tmp_path: Path, how: str, says: str) -> None:
    done = run("generate", "-m", break_folder(tmp_path / "broken", chat_folder, how), "hi")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("mlx-gemma3: ") and says in done.stderr


def test_other_bad_input_is_one_line_too(
    run: Run, chat_folder: Path, text_folder: Path, picture: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        (("-m", "gemma-9", "hi"), "gemma-9"),
        (("-m", "./nowhere", "hi"), "nowhere"),
        (("-m", "google/gemma-3-4b-it", "hi"), "google/gemma-3-4b-it"),
        (("-m", text_folder, "the " * 3000), "at most 1024"),
        (("-m", chat_folder, "-i", picture, "a {image} b {image}"), "{image}"),
        (("-m", chat_folder, "a {image} b"), "{image}"),
        (("-m", chat_folder, "-i", picture, "-i", picture, "a {image} b"), "{image}"),
        (("-m", chat_folder, "-i", tmp_path / "notes.png", "hi"), "notes.png"),
        (("-m", chat_folder, "-i", tmp_path / "none.png", "hi"), "none.png"),
        (("-m", text_folder, "-i", picture, "hi"), "text-only"),
        (("-m", text_folder, "--dtype", "float16", "hi"), "float16"),
        (("-m", text_folder, "--temperature", "-1", "hi"), "temperature"),
        (("-m", text_folder, "--system", "x", "hi"), "system"),
        (("-m", text_folder), "prompt"),
    ]
    for words, says in cases:
        done = run("generate", *words, env=offline)
        assert (done.returncode, done.stdout) == (1, ""), (words, done)
        assert done.stderr.count("\n") == 1 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "hub").exists() or not list((tmp_path / "hub").rglob("*.safetensors"))


def test_usage_errors_exit_2(run: Run) -> None:
    assert run("generate", "--warmth", "3").returncode == 2
    assert run("generate", "--max-tokens", "many", "hi").returncode == 2


def test_control_c_ends_the_answer_and_exits_130(text_folder: Path) -> None:
    """The text so far stays on stdout; no traceback."""
    child = subprocess.Popen(
        [*COMMAND, "generate", "-m", str(text_folder), "--max-tokens", "900", "--temperature", "0", "--json", "the"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None and json.loads(child.stdout.readline())["kind"] == "text"
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    end = json.loads(out.splitlines()[-1])
    assert (child.returncode, err, end["kind"], end["finish_reason"]) == (130, "", "done", "cancelled")


def test_a_reader_that_goes_away_is_no_traceback(text_folder: Path) -> None:
    command = " ".join([*COMMAND, "generate", "-m", str(text_folder), "--max-tokens", "300", "--json", "the"])
    done = subprocess.run(
        ["bash", "-c", f"{command} < /dev/null | head -n 1"], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == "" and done.stdout.count("\n") == 1


def test_progress_is_shown_where_a_person_can_see_it(chat_folder: Path, picture: Path) -> None:
    seen, tty = pty.openpty()
    done = subprocess.run(
        [*COMMAND, "generate", "-m", str(chat_folder), *GREEDY, "-i", str(picture), "hi"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=tty, timeout=60,
    )  # fmt: skip
    os.close(tty)
    shown = os.read(seen, 100_000).decode()
    os.close(seen)
    assert done.returncode == 0
    assert "loading" in shown and "looking at pictures" in shown and "100 %" in shown and "tokens/s" in shown
    assert shown.endswith("\r\x1b[2K")


def test_generate_loads_nothing_heavy(chat_folder: Path, picture: Path) -> None:
    """Neither transformers, torch nor mlx_lm is imported by a whole answer, with a picture; nor Pillow without one."""
    script = (
        "import sys\nfrom mlx_gemma3.cli import app\n"
        "try: app(sys.argv[1:])\nexcept SystemExit as end: assert not end.code, end.code\n"
        "sys.stderr.write(' '.join({name.split('.')[0] for name in sys.modules}))"
    )

    def modules(*words: str | Path) -> set[str]:
        command = [sys.executable, "-c", script, "generate", "-m", chat_folder, *GREEDY, *words, "hi"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
        return set(done.stderr.split())

    heavy = {"transformers", "torch", "mlx_lm", "mlx_vlm", "huggingface_hub", "gguf", "pillow_heif"}
    assert not modules("-i", picture) & heavy
    assert not modules() & (heavy | {"PIL"})


def test_version_and_help(run: Run) -> None:
    assert run("--version").stdout.strip() == g3.__version__
    assert "generate" in run("--help").stdout and run("generate", "-h").returncode == 0
    assert subprocess.run(
        [sys.executable, Path(__file__).parent.parent / "cli.py", "--version"], capture_output=True, text=True
    ).stdout.strip()

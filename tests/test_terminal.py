"""What the commands read from and write to the world: terminals, pipes, streams that are closed or full, signals."""

from __future__ import annotations

import ast
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from at_terminal import NAME, SHOWN, Seen, every_byte, hidden_in
from endless import endless
from PIL import Image

import mlx_gemma3 as g3
from mlx_gemma3.commands import terminal
from mlx_gemma3.visible import visible

PACKAGE = Path(__file__).resolve().parent.parent / "mlx_gemma3"
PROGRAM = [sys.executable, "-W", "error", "-m", "mlx_gemma3.cli"]
GREEDY = ("--temperature", "0")


def slow(value: object) -> Any:
    """A row of a table that only the slow tests try."""
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a name that drives terminals, which writes every byte; its card does the same."""
    folder = every_byte(tmp_path_factory.mktemp("hostile") / NAME)
    (folder / "README.md").write_text("A card \x1b]0;OWNED\x07 with \x9b31m colours.\n", encoding="utf-8")
    return folder


def every_piece(folder: Path) -> str:
    with g3.load(folder) as engine:
        return engine.generate("hi", temperature=0.0, max_tokens=1000).text


def test_only_two_files_write() -> None:
    writers = {PACKAGE / "commands" / "terminal.py", PACKAGE / "commands" / "streams.py"}
    for path in [PACKAGE / "cli.py", *(PACKAGE / "commands").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            writes = called in ("print", "os.write") or called.startswith(("typer.echo", "typer.secho", "click."))
            writes |= called.startswith(("sys.stdout.write", "sys.stderr.write", "sys.stdout.buffer"))
            assert not writes or path in writers, f"{path}:{node.lineno}: {called}"  # type: ignore[attr-defined]


# A model that writes every byte, and names that drive terminals


def test_an_answer_is_exact_in_a_pipe_and_filtered_on_a_terminal(hostile: Path) -> None:
    whole = every_piece(hostile)
    assert all(chr(code) in whole for code in (*range(128), *range(0x80, 0xA0), 0x202E))
    words = ("generate", "-q", "-m", str(hostile), *GREEDY, "hi")
    piped = subprocess.run([*PROGRAM, *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert (piped.returncode, piped.stdout.decode(), piped.stderr) == (0, whole + "\n", b"")
    with Seen(*words, folder=hostile.parent, stdin=subprocess.DEVNULL) as seen:
        assert seen.ended() == 0
        assert not hidden_in(seen.bytes)
        assert visible(whole).encode() in seen.bytes.replace(b"\r\n", b"\n")


def test_json_holds_no_control_character_and_the_same_values(hostile: Path) -> None:
    words = ("generate", "--json", "-m", str(hostile), *GREEDY, "hi")
    for encoding in ("utf-8", "ascii", "latin-1"):
        done = subprocess.run(
            [*PROGRAM, *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
            env={**os.environ, "PYTHONIOENCODING": encoding},
        )  # fmt: skip
        text = done.stdout.decode(encoding)
        assert not hidden_in(done.stdout.decode(encoding).encode()) and "\u202e" not in text
        assert json.loads(text.splitlines()[-1])["text"] == every_piece(hostile)
    about = subprocess.run([*PROGRAM, "inspect", "--json", hostile], capture_output=True, timeout=60).stdout
    assert not hidden_in(about) and json.loads(about)["name"] == str(hostile)


def test_no_command_lets_a_name_drive_the_terminal(hostile: Path, tmp_path: Path) -> None:
    text = tmp_path / f"{NAME}.txt"
    text.write_text("hello there " * 20, encoding="utf-8")
    picture = tmp_path / f"{NAME}.png"
    picture.write_bytes(b"no picture")
    none = tmp_path / f"{NAME} none"
    commands: list[tuple[str | Path, ...]] = [
        ("inspect", hostile), ("inspect", none), ("fit", hostile), ("fit", none), ("evaluate", hostile, "--text", text),
        ("evaluate", hostile, "--text", none), ("convert", hostile, tmp_path / f"{NAME} out", "--bits", "8"),
        ("convert", hostile, tmp_path / f"{NAME} out"), ("convert", none),
        ("generate", "-m", hostile, "-i", picture, "hi"), ("generate", "-m", none, "hi"),
        ("generate", f"--{NAME}"), ("generate", "--seed", NAME, "hi"), (NAME,), ("chat", f"--{NAME}", NAME),
        ("bench", "-m", hostile, "--prompt-tokens", "8", "--context", "8", "--tokens", "2", "--repeat", "1"),
        ("bench", "--context", NAME), ("worker", "--max-line", NAME), ("chat", "-m", none), ("chat", "-i", picture),
    ]  # fmt: skip
    for words in commands:
        stdin = None if words[0] == "chat" else subprocess.DEVNULL
        with Seen(*words, folder=tmp_path, columns=400, stdin=stdin) as seen:
            status = seen.ended(60)
            assert not hidden_in(seen.bytes, prompt=words[0] == "chat"), words
            assert b"Traceback" not in seen.bytes, seen.bytes
            assert (b"OWNED" in seen.bytes) <= (SHOWN.encode() in seen.bytes), (words, seen.bytes)
            assert b"OWNED" in seen.bytes or status == 2 or words[0] == "bench"


@pytest.mark.parametrize("kind", ["xterm-256color", slow("dumb")])
def test_a_chat_lets_nothing_drive_the_terminal(hostile: Path, tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / f"{NAME}.png")
    with Seen("chat", "-m", hostile, *GREEDY, folder=tmp_path, columns=200, environment={"TERM": kind}) as seen:
        if kind != "dumb":
            seen.until("dropped here")
        for line in (
            f"/image '{tmp_path}/{NAME}.png'",
            f"/x{NAME}",
            f"/load {NAME}",
            f"/save '{NAME}'",
            "/set stop hi",
        ):
            typed = visible(line)  # what a person can type: a name with escapes comes from completion or a drop
            seen.pump(0.3, send=typed.encode() + b"\n" if kind == "dumb" else typed.encode() + b"\r")
        seen.until("|255|", b"hi\n" if kind == "dumb" else b"hi\r", 60)
        seen.pump(1)
        seen.until("", b"\x04")
        seen.ended()
        assert not hidden_in(seen.bytes, prompt=kind != "dumb"), hidden_in(seen.bytes)[:3]
        assert (
            rb"\x08" in seen.bytes
            and rb"\x1b" in seen.bytes
            and rb"\x9b" in seen.bytes
            and b"Traceback" not in seen.bytes
        )


# Standard streams


def program(*words: str | Path, **more: object) -> subprocess.CompletedProcess[str]:
    more = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 60, "text": True} | more
    return subprocess.run([*PROGRAM, *map(str, words)], **more)  # type: ignore[call-overload, no-any-return]


def shell(command: str, **more: object) -> subprocess.CompletedProcess[str]:
    """A command line, in which `$P` is the program."""
    environment = {**os.environ, "P": " ".join(PROGRAM), **more.pop("env", {})}  # type: ignore[dict-item]
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        **more,  # type: ignore
    )


QUICK = (
    "generate -m {it} --temperature 0 --max-tokens 3 hi", "inspect {it}", "--help",
    "chat -m {it} -q --temperature 0 --max-tokens 5",
)  # fmt: skip
COMMANDS = (
    "generate -m {it} --temperature 0 --max-tokens 3 --json hi",
    "inspect --json {it}", "fit", "fit --json 4b", "--version", "generate --help",
    "bench -m {it} --prompt-tokens 8 --context 8 --tokens 2 --repeat 1 -q",
    "evaluate {it} --text {notes} -q", "convert {it} {notes}.out --bits 8 -q --overwrite",
)  # fmt: skip


@pytest.mark.parametrize("command", QUICK + tuple(map(slow, COMMANDS)))
def test_streams_that_are_closed_or_full_are_one_sentence_at_most(
    chat_folder: Path, tmp_path: Path, command: str
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("the model is the user " * 10, encoding="utf-8")
    line = "$P " + command.format(it=chat_folder, notes=notes)
    said = "<<< 'the user'" if command.startswith("chat") else "</dev/null"
    for stdout, says in ((">&-", "a closed one"), (">/dev/full", "a full disk"), ("1</dev/null", "a closed one")):
        done = shell(f"{line} {stdout} {said}")
        assert (done.returncode, done.stdout) == (1, ""), (stdout, done)
        assert done.stderr == f"mlx-gemma3: standard output: got {says}, want a place that takes the answer\n"
    whole = shell(f"{line} {said}")
    assert whole.returncode == 0 and whole.stderr == ""
    timed = command.startswith(("bench", "convert")) or "--json hi" in command
    for stderr in ("2>&-", "2>/dev/full"):
        done = shell(f"{line} {stderr} {said}")
        assert done.returncode == 0 and (timed or done.stdout == whole.stdout), (stderr, done)
    done = shell(f"{line} <&-")
    if command.startswith("chat"):
        assert done.stderr == "mlx-gemma3: standard input: got a closed one, want questions\n"
    else:
        assert done.returncode == 0 and (timed or done.stdout == whole.stdout), done


def test_a_worker_without_its_pipes_says_so() -> None:
    for closed, says in (("<&-", "input"), (">&-", "output")):
        done = shell(f"$P worker {closed} </dev/null" if closed == ">&-" else f"$P worker {closed}")
        assert done.returncode == 1 and done.stderr == f"mlx-gemma3: standard {says}: got none, want a pipe\n"


def test_what_an_encoding_cannot_say_is_replaced(hostile: Path) -> None:
    for encoding in ("ascii", "latin-1"):
        said = {**os.environ, "PYTHONIOENCODING": encoding}
        done = program("generate", "-q", "-m", hostile, *GREEDY, "hi", env=said, encoding=encoding)
        assert done.returncode == 0 and "?|255|" in done.stdout and done.stderr == ""
        assert program("inspect", "/a/中é", env=said, encoding=encoding).stderr.count("\n") == 1
    done = subprocess.run([*PROGRAM, "inspect", b"/caf\xe9"], capture_output=True, timeout=60)
    assert done.stderr == b"mlx-gemma3: /caf\\xe9: got no such file or folder\n"


def test_an_answer_that_cannot_be_printed_is_kept(chat_folder: Path, tmp_path: Path) -> None:
    flags = f"-m {chat_folder} --temperature 0 --max-tokens 5"
    first = shell(f"$P generate {flags} --session a 'the user' </dev/null", cwd=tmp_path)
    assert first.returncode == 0 and first.stdout
    lost = shell(f"$P generate {flags} --session b 'the user' >/dev/full </dev/null", cwd=tmp_path)
    assert lost.returncode == 1 and "full disk" in lost.stderr
    gone = shell(f"$P generate {flags} --session c 'the user' </dev/null | true; exit ${{PIPESTATUS[0]}}", cwd=tmp_path)
    assert gone.returncode in (0, 1) and gone.stderr == ""
    shell(f"$P chat {flags} --session d <<< 'the user' >/dev/full", cwd=tmp_path)
    with g3.load(chat_folder) as engine:
        kept = [engine.session(resume=tmp_path / name).messages for name in "abcd"]
    assert kept[0][-1]["content"] + "\n" == first.stdout and kept == [kept[0]] * 4


def test_a_session_is_tried_before_the_answer(chat_folder: Path, tmp_path: Path) -> None:
    home = {**os.environ, "HOME": str(tmp_path)}
    flags = ("-m", chat_folder, *GREEDY, "--max-tokens", "3")
    os.mkfifo(tmp_path / "pipe")
    for place, says in (
        ("/proc/nothing/s", "No such file"), ("/dev/null", "a device"), (str(tmp_path / "pipe"), "a pipe"),
        (str(tmp_path), "a folder"), ("~nobody-of-this-name/s", "home"), ("a\nb" * 200, "too long"),
    ):  # fmt: skip
        for words, said in ((("generate", *flags, "the"), None), (("chat", *flags), "the\n")):
            more = {} if said is None else {"stdin": None, "input": said}
            done = program(*words, f"--session={place}", env=home, cwd=tmp_path, **more)
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
            assert says in done.stderr
    assert program("generate", *flags, "--session=~/deep/er/s", "the", env=home, cwd=tmp_path).returncode == 0
    assert (tmp_path / "deep" / "er" / "s").exists() and not (tmp_path / "~").exists()


# What is piped in


def generated(chat_folder: Path, *words: str, **more: object) -> tuple[int, str]:
    """Tokens of the prompt, and what was said on stderr."""
    done = program("generate", "-m", chat_folder, *GREEDY, "--max-tokens", "1", "--json", *words, **more)
    assert done.returncode == 0, done
    return json.loads(done.stdout.splitlines()[-1])["usage"]["prompt_tokens"], done.stderr


def test_text_is_read_whatever_it_is_piped_through(chat_folder: Path, tmp_path: Path) -> None:
    words = "the user is in the model\n" * 20
    whole, _ = generated(chat_folder, "the model", stdin=None, input=words)
    alone, _ = generated(chat_folder, "the model")
    assert whole > alone + 20
    (tmp_path / "words").write_text(words, encoding="utf-8")
    with (tmp_path / "words").open(encoding="utf-8") as file:
        assert generated(chat_folder, "the model", stdin=file) == (whole, "")
    for prompt in (("the model",), ()):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(words.encode())
            ours.shutdown(socket.SHUT_WR)
            found, _ = generated(chat_folder, *prompt, stdin=theirs)
            assert found == whole if prompt else found > 20
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.write(write, words.encode())
    os.close(write)
    assert generated(chat_folder, "the model", stdin=read) == (whole, "")
    os.close(read)
    done = shell(f"(sleep 2; printf '{words}') | $P generate -m {chat_folder} --max-tokens 1 --json 'the model'")
    assert json.loads(done.stdout.splitlines()[-1])["usage"]["prompt_tokens"] == whole, "slow to begin"


def test_a_prompt_does_not_wait_for_a_pipe_that_nobody_closes(chat_folder: Path) -> None:
    read, write = os.pipe()
    ours, theirs = socket.socketpair()
    alone, _ = generated(chat_folder, "the model")
    began = time.monotonic()
    words = ("generate", "-m", str(chat_folder), *GREEDY, "--max-tokens", "1", "--json", "the model")
    waiting = [
        subprocess.Popen([*PROGRAM, *words], stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for stdin in (read, theirs)
    ]
    for child in waiting:
        answered, said = child.communicate(timeout=60)
        assert json.loads(answered.splitlines()[-1])["usage"]["prompt_tokens"] == alone
        assert said.startswith("note: nothing came on standard input within 5 seconds")
    assert time.monotonic() - began < 30
    for end in (read, write):
        os.close(end)
    ours.close()
    theirs.close()


def test_a_byte_order_mark_is_no_text(chat_folder: Path, tmp_path: Path) -> None:
    plain, _ = generated(chat_folder, stdin=None, input="the user")
    assert generated(chat_folder, stdin=None, input="\ufeffthe user") == (plain, "")
    done = program("chat", "-m", chat_folder, "-q", stdin=None, input="\ufeff/save kept\n/quit\n", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "kept").exists()


def test_more_than_any_prompt_is_not_read_for_ever(chat_folder: Path) -> None:
    done = shell(f"yes 'the user' | $P generate -m {chat_folder} 'the'")
    assert done.returncode == 1 and "more than 64 MB" in done.stderr and done.stderr.count("\n") == 1


def test_a_picture_is_not_taken_for_the_prompt(chat_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "b").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "words").write_text("no picture", encoding="utf-8")
    for name in ("a.png", "b"):
        done = program("generate", "-m", chat_folder, "-i", "a.png", name, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"mlx-gemma3: prompt: got the picture {name}, want words; each picture needs its own --image (-i)\n"
        )
    for prompt in ("words", "x" * 5000, "a\0b"[:1]):
        flags = ("-i", "a.png", "--max-tokens", "1", *GREEDY)
        assert program("generate", "-m", chat_folder, *flags, prompt, cwd=tmp_path).returncode in (0, 1)


# Signals


@pytest.fixture(scope="module")
def never_ending(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless(chat_folder, tmp_path_factory.mktemp("endless"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_signal_while_answering_keeps_the_turn(
    never_ending: Path, tmp_path: Path, command: str, number: signal.Signals
) -> None:
    words = ["-m", str(never_ending), *GREEDY, "--max-tokens", "900", "--session", "kept"]
    child = subprocess.Popen(
        [*PROGRAM, command, *words, *(["the user"] if command == "generate" else [])], cwd=tmp_path,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdin is not None and child.stdout is not None
    if command == "chat":
        child.stdin.write(b"the user\n")
        child.stdin.flush()
    else:
        child.stdin.close()
        child.stdin = None
    said = child.stdout.read(1)
    child.send_signal(number)
    rest, errors = child.communicate(timeout=60)
    assert (child.returncode, b"Traceback" in errors) == (128 + number, False), errors
    with g3.load(never_ending) as engine:
        asked, answered = engine.session(resume=tmp_path / "kept").messages
    assert asked["content"][-1]["text"] == "the user"
    assert answered["content"].startswith((said + rest).decode().strip("\n")[:1])


@pytest.mark.parametrize("every", [3, slow(1)])
def test_control_c_during_imports_leaves_quietly(chat_folder: Path, every: int) -> None:
    """From the program's first line on: before it, the interpreter itself starts."""
    start = "import os, sys; from mlx_gemma3.cli import main; os.write(1, b'.'); main()"
    for attempt in range(0, 20, every):
        child = subprocess.Popen(
            [sys.executable, "-c", start, "inspect", str(chat_folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert child.stdout is not None and child.stdout.read(1) == b"."
        time.sleep(0.01 + 0.008 * attempt)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
        assert errors == b"" and child.returncode in (130, 0), (attempt, child.returncode, errors)
    light = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import mlx_gemma3.cli"], capture_output=True, text=True, timeout=60
    )
    assert "typer" not in light.stderr and "numpy" not in light.stderr


# Chat at a terminal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
@pytest.mark.parametrize("answering", [False, True])
def test_a_signal_leaves_the_terminal_as_it_was(
    never_ending: Path, tmp_path: Path, number: signal.Signals, answering: bool
) -> None:
    words = ("chat", "-m", never_ending, *GREEDY, "--max-tokens", "900", "--session", "kept")
    with Seen(*words, folder=tmp_path) as seen:
        seen.until("dropped here")
        if answering:
            seen.until_answering(b"the user\r")
        os.kill(seen.process.pid, number)
        assert seen.ended() == 128 + number
        assert seen.as_before() and b"Traceback" not in seen.bytes
        if not answering:
            assert seen.bytes.rfind(b"\x1b[?2004l") > seen.bytes.rfind(b"\x1b[?2004h"), "pastes are plain again"
    if answering:
        with g3.load(never_ending) as engine:
            assert len(engine.session(resume=tmp_path / "kept").messages) == 2


def test_a_terminal_that_is_gone_keeps_the_turn(never_ending: Path, tmp_path: Path) -> None:
    words = ("chat", "-m", never_ending, *GREEDY, "--max-tokens", "900", "--session", "kept")
    seen = Seen(*words, folder=tmp_path)
    seen.until("dropped here")
    seen.until_answering(b"the user\r")
    os.close(seen.inner)
    os.close(seen.terminal)
    assert seen.process.wait(30) == 128 + signal.SIGHUP
    with g3.load(never_ending) as engine:
        assert len(engine.session(resume=tmp_path / "kept").messages) == 2


@pytest.mark.parametrize("typed", [b"", b"half a question"])
def test_a_terminal_that_is_gone_ends_the_prompt(chat_folder: Path, tmp_path: Path, typed: bytes) -> None:
    seen = Seen("chat", "-m", chat_folder, folder=tmp_path)
    seen.until("dropped here")
    seen.pump(0.5, send=typed)
    os.close(seen.inner)
    os.close(seen.terminal)
    assert seen.process.wait(30) == 128 + signal.SIGHUP


@pytest.mark.slow  # it races with the answer: on a quick machine that may be over before the paste is
def test_a_long_paste_while_answering_does_not_shut_out_control_c(never_ending: Path, tmp_path: Path) -> None:
    with Seen("chat", "-m", never_ending, *GREEDY, "--max-tokens", "900", folder=tmp_path) as seen:
        seen.until("dropped here")
        seen.until_answering(b"the user\r")
        seen.until("stopped", b"word " * 900 + b"\x03", 10)  # more than a terminal holds
        seen.until("word", b"", 10)  # it stands at the prompt
        seen.pump(1, send=b"\x03")  # empties the line
        seen.pump(0.2, send=b"\x03")
        assert seen.ended() == 130 and seen.as_before()


@pytest.mark.parametrize(
    "typed",
    [
        b"\x1b[200~never ended",
        *(slow(typed) for typed in (b"\x1b[", b"\x1b]0;", b"\x1bP", b"\xff\xfe\x9b", b"\x1b[" + b"1;" * 3000)),
        slow(b"\x1b" * 99),
    ],
)
def test_typed_escape_bytes_do_not_hang_the_prompt(chat_folder: Path, tmp_path: Path, typed: bytes) -> None:
    with Seen("chat", "-m", chat_folder, folder=tmp_path) as seen:
        seen.until("dropped here")
        seen.pump(1.5, send=typed)
        for _ in range(4):
            seen.pump(1, lambda: seen.process.poll() is not None, send=b"\x03")
        assert seen.ended(5) == 130 and seen.as_before() and b"Traceback" not in seen.bytes


def test_history_and_exports_are_private_and_follow_no_link(chat_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "somebody's"
    other.write_text("theirs", encoding="utf-8")
    data = tmp_path / "data"
    data.mkdir()
    (data / "chat_history").symlink_to(other)
    (tmp_path / "talk.json").symlink_to(other)
    with Seen("chat", "-m", chat_folder, "--max-tokens", "2", folder=tmp_path) as seen:
        seen.until("dropped here")
        seen.until("dropped here", b"hello\r")
        seen.until("written to", b"/export talk.json\r")
        seen.pump(0.5)
        seen.pump(1, send=b"\x04")
        assert seen.ended() == 0
    assert other.read_text("utf-8") == "theirs"
    assert not (tmp_path / "talk.json").is_symlink() and (tmp_path / "talk.json").stat().st_mode & 0o777 == 0o600
    (data / "chat_history").unlink()
    (data / "chat_history").touch(mode=0o644)
    with Seen("chat", "-m", chat_folder, "--max-tokens", "2", folder=tmp_path) as seen:
        seen.until("dropped here")
        seen.until("lone surrogate", b"caf\xe9\r")  # a byte that is not UTF-8
        seen.pump(1)  # it stands at the prompt again
        seen.pump(1, send=b"\x03")
        seen.pump(1, send=b"\x04")
        assert seen.ended() == 0 and b"Traceback" not in seen.bytes
    assert (data / "chat_history").stat().st_mode & 0o777 == 0o600
    assert "+caf" in (data / "chat_history").read_text("utf-8")


# Tiny terminals


@pytest.mark.parametrize("columns", [slow(1), slow(20)])
def test_tiny_terminals(chat_folder: Path, tmp_path: Path, columns: int) -> None:
    flags = ("--prompt-tokens", "8", "--context", "8", "--tokens", "2", "--repeat", "1")
    for words in (("inspect", chat_folder), ("fit",), ("fit", "4b"), ("bench", "-m", chat_folder, *flags), ("--help",)):
        with Seen(*words, folder=tmp_path, columns=columns, rows=4, stdin=subprocess.DEVNULL) as seen:
            assert seen.ended() == 0 and b"Traceback" not in seen.bytes, seen.bytes
            lines = [line.rstrip() for line in seen.bytes.decode().splitlines()]
            if words[0] == "inspect":
                assert "part norms" in lines and "  KV 16 bits 270.91 MiB"[:12] in "\n".join(lines)
            if words == ("fit", "4b"):
                assert "total GiB" in lines and "longest context 8 bits" in lines
    with Seen("chat", "-m", chat_folder, "--max-tokens", "8", folder=tmp_path, columns=columns, rows=3) as seen:
        seen.until("\x1b[?2004h")
        for line in (b"**hello** there\r", b"/set\r", b"/help\r", b"\x04"):
            seen.pump(0.7, send=line)
        assert seen.ended() == 0 and b"Traceback" not in seen.bytes, seen.bytes


def test_a_status_line_fits_its_terminal() -> None:
    assert terminal.fitted("abc", 3) == "abc" and terminal.fitted("abcd", 3) == "ab…"
    assert terminal.fitted("字字字", 4) == "字字" and terminal.fitted("a\x1b[2J\nb", 9) == r"a\x1b[2J…"
    assert terminal.fitted("abcd", 0) == "" and terminal.fitted("abcd", 1) == "a"

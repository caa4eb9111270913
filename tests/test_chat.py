"""A conversation: what the commands do to it, piped in, and at a pseudo-terminal."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from picture_server import serving
from PIL import Image
from test_house import loaded_after

import mlx_gemma3 as g3
from docs.make_chat_screens import HINT, Program
from mlx_gemma3.commands.talk.lines import Command, read
from mlx_gemma3.commands.talk.loading import Loading
from mlx_gemma3.commands.talk.settings import Settings
from mlx_gemma3.commands.talk.talk import ChatState
from mlx_gemma3.commands.talk.verbs import VERBS, run
from mlx_gemma3.errors import ImageError, OptionError, PromptError

# A conversation without a terminal


class Pages:
    """A screen that keeps what it was shown."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.errors: list[str] = []
        self.held: threading.Event | None = None  # what the engine waits for; the next answer is stopped

    def note(self, text: str) -> None:
        self.notes.append(text)

    def error(self, text: str) -> None:
        self.errors.append(text)

    def rows(self, rows: Any) -> None:
        self.notes += [f"{name}: {value}" for name, value in rows]

    def follow(self, stream: g3.Stream) -> dict[str, Any]:
        if self.held is not None:
            stream.cancel()
            self.held.set()
        while (event := stream.next())["kind"] not in ("done", "error"):
            pass
        return event

    def wait(self, ended: Any, what: str) -> bool:
        return bool(ended(60))


@pytest.fixture
def talk(chat_folder: Path) -> Iterator[ChatState]:
    """A conversation with a tiny random model of at most 100 tokens."""
    loading = Loading("tiny", lambda: g3.load(chat_folder, max_context=100), lambda engine: engine.session())
    loading.start()
    talk = ChatState(loading, Pages(), Settings({"max_tokens": 4, "seed": 1}))
    with talk.engine:
        yield talk


def do(talk: ChatState, line: str) -> list[str]:
    """What a line led to, as the notes it left."""
    pages = talk.screen
    assert isinstance(pages, Pages)
    pages.notes.clear()
    said = read(line)
    if isinstance(said, Command):
        run(talk, said)
    else:
        talk.say(said)
    return pages.notes


def hold(talk: ChatState) -> None:
    """Keep the engine's thread busy until the next answer was stopped."""
    begun, held = threading.Event(), threading.Event()

    def wait(_: object) -> None:
        begun.set()
        held.wait(60)

    threading.Thread(target=talk.engine._thread.call, args=(wait,)).start()
    assert begun.wait(60)
    talk.screen.held = held  # type: ignore[attr-defined]


def asked(talk: ChatState) -> list[str]:
    return [message["content"][-1]["text"] for message in talk.session.messages if message["role"] == "user"]


def test_a_question_that_fails_is_given_back(talk: ChatState, folder: Path) -> None:
    do(talk, "one")
    do(talk, "./triangle.png two")
    kept = talk.session.messages
    long = "word " * 100
    do(talk, long)
    assert "100" in talk.screen.errors[0] and talk.failed  # type: ignore[attr-defined]
    assert (talk.prefill, len(talk.turns), talk.session.messages) == (long.strip(), 2, kept)
    do(talk, "/undo")
    assert asked(talk) == ["one"] and do(talk, "/tokens")[0].endswith(" of 100, in 1 turn")


def test_a_question_stopped_before_its_answer_is_given_back(talk: ChatState, folder: Path) -> None:
    do(talk, "one")
    hold(talk)
    do(talk, "./triangle.png two")
    assert (talk.prefill, [p.name for p in talk.pictures], asked(talk)) == ("two", ["triangle.png"], ["one"])
    hold(talk)
    do(talk, "/retry")
    assert (talk.prefill, talk.turns, asked(talk)) == ("one", [], [])


def test_a_picture_by_its_address(talk: ChatState, folder: Path) -> None:
    with serving((folder / "triangle.png").read_bytes()) as server:
        assert "triangle" not in do(talk, f"/image {server}/good.png?key=secret")[-1]
        assert do(talk, f"/image triangle.png {server}/moved")[-1].startswith("picture 3: moved, ")
        do(talk, "what?")
        assert (talk.usage or {})["images"] == 3
        with pytest.raises(ImageError, match="404"):
            do(talk, f"/image {server}/missing")
        do(talk, f"/export {folder / 'talk.md'}")
        assert f"![moved](<{server}/moved>)" in (folder / "talk.md").read_text("utf-8")
        words = [sys.executable, "-m", "mlx_gemma3.cli", "chat", "-i", f"{server}/good.png", "-i", "-"]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "picture 1: good.png" in done.stderr and "questions come from" in done.stderr


def test_retry_edit_and_undo_change_the_last_turn_only(talk: ChatState, folder: Path) -> None:
    do(talk, "one")
    do(talk, "./triangle.png two")
    do(talk, "/retry")
    assert asked(talk) == ["one", "two"]
    do(talk, "/edit")
    assert (talk.prefill, talk.editing) == ("two", True)
    do(talk, "three")
    assert asked(talk) == ["one", "three"] and not talk.editing
    assert talk.messages()[2]["content"][0] == {"type": "image", "path": str(folder / "triangle.png")}
    do(talk, "/edit four")
    do(talk, "/undo")
    assert asked(talk) == ["one"]
    do(talk, "/undo")
    for line in ("/undo", "/retry", "/edit", "/edit x"):
        with pytest.raises(PromptError, match="no question yet"):
            do(talk, line)


def test_what_waits_for_the_next_question(talk: ChatState, folder: Path) -> None:
    assert do(talk, "/image 'my heart.png' triangle.png")[0] == "picture 1: my heart.png, 224 × 224"
    do(talk, "/image")
    assert talk.pictures == []
    with pytest.raises(ImageError, match=r"notes\.txt"):
        do(talk, "/image notes.txt")
    with pytest.raises(PromptError, match="no path"):
        do(talk, "/image")


def test_the_clipboard_holds_a_picture_files_or_text(
    talk: ChatState, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Any] = [Image.new("P", (3, 2)), [folder / "triangle.png"], None]
    monkeypatch.setattr("PIL.ImageGrab.grabclipboard", lambda: held.pop(0))
    for name in ("wl-paste", "pbpaste"):
        (folder / name).write_text("#!/bin/sh\nprintf 'two\\nlines\\n'\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    assert do(talk, "/paste") == ["picture 1: from the clipboard, 3 × 2"]
    assert do(talk, "/paste") == ["picture 2: triangle.png, 224 × 224"]
    do(talk, "/paste")
    assert talk.prefill == "two\nlines"
    do(talk, "Which?")
    assert [turn.text for turn in talk.turns] == ["Which?"], talk.screen.errors  # type: ignore[attr-defined]


def test_a_file_keeps_the_conversation_and_is_not_lost_to_the_next(talk: ChatState, folder: Path) -> None:
    do(talk, "/system Be short.")
    do(talk, "one")
    do(talk, "/save 'a talk.session'")
    do(talk, "two")
    assert "is in a talk.session" in do(talk, "/reset")[0]
    do(talk, "three")
    assert talk.save() is None, "the new conversation has no file"
    assert talk.session.messages[0] == {"role": "system", "content": "Be short."}
    assert do(talk, "/load a\\ talk.session") == ["2 turns in a talk.session; the last question: “two”"]
    assert asked(talk) == ["one", "two"]


def test_pictures_of_a_loaded_conversation_are_known_but_not_to_edit(talk: ChatState, folder: Path) -> None:
    do(talk, "./triangle.png one")
    first = talk.session.messages[-1]
    do(talk, "/save talk.session")
    do(talk, "/load talk.session")
    do(talk, "/retry")
    assert talk.session.messages[-1] == first, "the same seed"
    with pytest.raises(PromptError, match="not saved"):
        do(talk, "/edit")


def test_an_exported_conversation_can_be_asked_of_the_engine(talk: ChatState, folder: Path) -> None:
    do(talk, "./triangle.png one")
    do(talk, "/export talk.json")
    asked, answered = json.loads((folder / "talk.json").read_text("utf-8"))["messages"]
    reply = talk.engine.generate([asked], **talk.settings.values)
    assert (reply.text, reply.usage["images"]) == (answered["content"], 1)


def test_a_command_that_is_none_is_told_with_the_nearest(talk: ChatState) -> None:
    with pytest.raises(OptionError, match=r"/hepl is no command.* did you mean /help\?"):
        do(talk, "/hepl")
    with pytest.raises(OptionError, match="/help shows them all"):
        do(talk, "/xyzzy")
    assert len(do(talk, "/help")) > 15


def test_the_documentation_names_every_command() -> None:
    text = (Path(__file__).parents[1] / "docs" / "chat.md").read_text("utf-8")
    for verb in VERBS:
        assert f"| `{f'/{verb.name} {verb.takes}'.rstrip()}` | {verb.help} |" in text


# The program


def test_the_command_line_loads_nothing_of_the_chat() -> None:
    assert not loaded_after("import mlx_gemma3.cli") & {"prompt_toolkit", "rich", "markdown_it", "pygments"}


def chat(*arguments: str, typed: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "dev", "-W", "error", "-m", "mlx_gemma3.cli", "chat", *arguments]
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=60)


def test_lines_that_are_piped_in_are_answered_and_go_on_in_a_session(folder: Path) -> None:
    def ask(typed: str) -> subprocess.CompletedProcess[str]:
        return chat("-m", "demo", "--temperature", "0", "--session", "talk.session", "--quiet", typed=typed)

    first = ask("'./my heart.png' What shape is this?\n")
    assert (first.returncode, first.stdout, first.stderr) == (0, "heart\n", "")
    then = ask("And what colour is it?\n/hepl\n/quit\nnever asked\n")
    assert (then.returncode, then.stdout) == (1, "purple\n")
    assert then.stderr == "mlx-gemma3: /hepl is no command; did you mean /help?\n"


def test_a_base_checkpoint_is_refused(text_folder: Path) -> None:
    done = chat("-m", str(text_folder), typed="hello\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"mlx-gemma3: chat: got {text_folder}, a base checkpoint that only completes text, want an instruction-tuned "
        "one (-it); for this one there is mlx-gemma3 generate\n"
    )


def answer_to(question: str, text: str) -> str:
    """What stands below a question, without empty space: at first progress, or the rest of the prompt."""
    return "".join(text.partition(f"› {question}\n")[2].split())


def test_a_conversation_at_a_terminal(folder: Path) -> None:
    with Program(
        "chat", "-m", "demo", "--temperature", "0", folder=folder, columns=110, rows=120,
        environment={"MLX_GEMMA3_DATA": str(folder / "data")}, python=("-X", "dev", "-W", "error"),
    ) as program:  # fmt: skip
        program.enter("./my\\ heart.png What shape is this?")
        program.until("picture 1: my heart.png, 224 × 224\nheart\n")
        program.enter("And what colour is it?")
        program.until("\npurple\n")
        program.enter("/retry")
        program.until("› /retry\npurple\n")

        program.enter("/edit")
        program.until("editing")
        program.press("\x15What shape is this?\r")  # Ctrl-U empties the line
        program.until("› What shape is this?\nheart\n")
        program.enter("/tokens")
        program.until("of 8,192, in 2 turns")
        program.enter("/save talk.session")
        program.until("saved in talk.session")

        for setting in ("temperature 1000", "top_k 0", "top_p 1", "seed 15"):  # a thousand tokens of noise
            program.enter(f"/set {setting}")
        program.enter("/export before.json")
        program.until("2 turns written to before.json")
        program.enter("Go on.")
        program.watch(lambda text: len(answer_to("Go on.", text)) > 150, "more than a line of noise")
        program.press("\x03")
        program.until("stopped; what was said is kept")
        program.enter("/export stopped.json")
        program.until("3 turns written to stopped.json")
        program.enter("/load talk.session")
        program.until("2 turns in talk.session; the last question: “What shape is this?”")
        program.enter("/export after.md")
        program.until("2 turns written to after.md")

        program.until(HINT)
        program.press("\x1b[200~one\ntwo\x1b[201~\x1b\rthree")  # a paste of two lines, and one more
        program.until("› one\n  two\n  three")
        program.press("\x03")  # the first empties the line
        program.until(HINT)
        program.press("\x03")
        program.until("Ctrl-C again leaves", times=2)
        program.press("\x03")
        assert program.ended() == 130
        assert "Warning" not in program.text and "Traceback" not in program.text

    before = json.loads((folder / "before.json").read_text("utf-8"))["messages"]
    stopped = json.loads((folder / "stopped.json").read_text("utf-8"))["messages"]
    assert [message["content"] for message in before if message["role"] == "assistant"] == ["heart", "heart"]
    assert before[0]["content"][0] == {"type": "image", "path": str(folder / "my heart.png")}
    assert stopped[:4] == before and len(stopped[5]["content"]) > 20
    assert (folder / "after.md").read_text("utf-8").count("\n\nheart\n") == 2
    history = folder / "data" / "chat_history"
    assert history.stat().st_mode & 0o077 == 0 and "+And what colour is it?" in history.read_text("utf-8")


NEVER_READY = """
import time
import mlx_gemma3.runtime.engine as engine
engine.load = lambda *_, **__: time.sleep(600)
"""


def test_the_prompt_does_not_wait_for_the_model(folder: Path) -> None:
    environment = {"MLX_GEMMA3_DATA": str(folder / "data")}
    with Program("chat", "-m", "slow", folder=folder, environment=environment, before=NEVER_READY) as program:
        program.until(HINT)
        program.press("/im")
        program.until("/image PATH…")
        for typed, shown in (("\t", "/image"), ("tri", "/image tri"), ("\t", "/image triangle.png")):
            program.press(typed)
            program.until(f"› {shown}")
        program.press("\r")
        program.until("loading slow … · with triangle.png")
        program.enter("What is this?")
        program.until("loading slow · 1 s")
        program.press("\x03")
        program.until("slow is not loaded yet · Ctrl-C again leaves\n\n› What is this?")  # it stands there again
        program.press("\x03")
        assert program.ended() == 130

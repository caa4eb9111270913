"""What the parts of the chat make of words, dropped paths, Markdown, settings and documents."""

from __future__ import annotations

import io
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyte
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from rich.console import Console
from rich.text import Text

from mlx_gemma3.commands.talk import export
from mlx_gemma3.commands.talk.blocks import cut
from mlx_gemma3.commands.talk.input import Completions
from mlx_gemma3.commands.talk.lines import Command, Said, paths, read
from mlx_gemma3.commands.talk.live import Live
from mlx_gemma3.commands.talk.markdown import THEME, Writer, rendered
from mlx_gemma3.commands.talk.settings import NAMES, Settings
from mlx_gemma3.errors import OptionError, OutputError
from mlx_gemma3.runtime.options import Options

# What was typed


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("/help", Command("help", "")),
        ("  /set  top_k 4 \n", Command("set", "top_k 4")),
        ("/edit one\ntwo", Command("edit", "one\ntwo")),
        ("//not a command", Said("/not a command")),
        ("/usr/bin is a folder", Said("/usr/bin is a folder")),
        ("why and/or?", Said("why and/or?")),
        ("1 / 2", Said("1 / 2")),
        ("/load a\0b", Command("load", "ab")),
    ],
)
def test_a_line_is_a_command_or_words(line: str, meant: Command | Said) -> None:
    assert read(line) == meant


def test_dropped_paths_are_pictures_however_the_terminal_writes_them(folder: Path) -> None:
    heart, triangle = folder / "my heart.png", folder / "triangle.png"
    address = f"file://{folder}/my%20heart.png"
    for written in (f"'{heart}'", f'"{heart}"', str(heart).replace(" ", "\\ "), address, str(heart)):
        assert read(f"{written} What is this?") == Said("What is this?", (heart,)), written
        assert read(f"What is {written}?") == Said("What is?", (heart,)), written
    assert read(f"{triangle} '{heart}' ") == Said("", (triangle, heart))
    assert read(f"Compare these:\n{triangle}\n'{heart}'").pictures == (triangle, heart)
    assert read("./triangle.png this?") == Said("this?", (Path("triangle.png"),))
    assert read(f"../{folder.name}/triangle.png this?").pictures == (Path(f"../{folder.name}/triangle.png"),)


def test_what_is_no_picture_stays_words(folder: Path) -> None:
    for line in (f"{folder}/notes.txt", f"{folder}/nothing.png", "triangle.png", f"'{folder}/my heart.png", "file://"):
        assert read(f"{line} what?") == Said(f"{line} what?"), line


def test_paths_after_a_command_are_read_as_a_shell_does(folder: Path) -> None:
    assert paths("a.png 'b c.png' d\\ e.png") == [Path("a.png"), Path("b c.png"), Path("d e.png")]
    assert paths("my heart.png") == [Path("my heart.png")], "a file of this name is there"
    assert paths("~/x") == [Path.home() / "x"]
    assert paths("~nobody-of-this-name/x") == [Path("~nobody-of-this-name/x")]
    assert paths("") == []


def completions(typed: str) -> list[str]:
    return [typed[: len(typed) + c.start_position] + c.text for c in Completions().get_completions(
        Document(typed), CompleteEvent(completion_requested=True))]  # fmt: skip


def test_commands_settings_and_paths_are_completed(folder: Path) -> None:
    (folder / "more").mkdir()
    assert completions("/re") == ["/retry", "/reset"]
    assert completions("/set te") == ["/set temperature "]
    assert completions("/image ") == ["/image more/", "/image my\\ heart.png", "/image triangle.png"]
    assert completions("/load n") == ["/load notes.txt"]
    assert completions("/image a.png tri") == ["/image a.png triangle.png"]
    assert completions(f"/image {folder}/my\\ h") == [f"/image {folder}/my\\ heart.png"]
    assert completions("words /re") == completions("/image nothing/there") == []


# Markdown as it comes

DOCUMENT = """\
# A heading

Two lines of
a paragraph with `code` and **weight**.

1. one
2. two
   - inner

   still two
7. three

```python
def f(x):

    return x  # <b>

def longer_than_the_terminal_is_high():
    a = 1
    b = 2
    c = 3
    d = 4
    e = 5
    f = 6
    g = 7
    h = 8
```

| a | b |
|---|---|
| 1 | 字 |

> said
by somebody

- x
- y

* * *
The end, with a line that is much longer than the terminal is wide, so that it goes on below.
"""


@given(st.text(alphabet="ab1#-:*+>`~|_=.) \n\t", max_size=40))
@example("1\n1|\n:-1")
@example(DOCUMENT)
@example("a\n#\n#b")
@example("- a\n-\n-b")
@settings(max_examples=60, deadline=None)
def test_a_finished_block_is_not_changed_by_what_follows(text: str) -> None:
    whole = cut(text)
    assert "".join(block.text for block in whole) == text
    for length in range(len(text)):
        finished = cut(text[:length])[:-1]
        assert finished == whole[: len(finished)], text[:length]


class Glass:
    """A terminal that remembers what has left its screen."""

    def __init__(self, rows: int = 12, columns: int = 46) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=1000, ratio=1)
        self.screen.set_mode(pyte.modes.LNM)
        self._stream = pyte.Stream(self.screen)
        self.size = os.terminal_size((columns, rows))
        self.console = Console(file=io.StringIO(), width=columns, theme=THEME, highlight=False)

    def writer(self) -> Writer:
        return Writer(self.console, Live(self._stream.feed, lambda: self.size))

    @property
    def lines(self) -> list[str]:
        above = ["".join(line[x].data for x in range(self.size.columns)) for line in self.screen.history.top]
        return [line.rstrip() for line in [*above, *self.screen.display]]


@pytest.mark.parametrize("step", [1, 3, 40])
def test_streamed_markdown_ends_as_markdown_shown_at_once(step: int) -> None:
    glass = Glass()
    writer = glass.writer()
    for start in range(0, len(DOCUMENT), step):
        writer.push(DOCUMENT[start : start + step])
        writer.show()
    writer.finish()
    plain = Text.from_ansi("\n".join(rendered(DOCUMENT, glass.console))).plain
    assert [line for line in glass.lines if line] == [line.rstrip() for line in plain.split("\n") if line.strip()]
    assert "\n\n\n" not in "\n".join(glass.lines).rstrip(), "one empty line between blocks"


def test_an_answer_cannot_drive_the_terminal() -> None:
    glass = Glass()
    writer = glass.writer()
    writer.push("a\x1b[2J\x1b]0;title\x07b\x9b31mc [red]d[/red] <i>e</i>")
    writer.finish()
    assert "".join(glass.lines) == r"a\x1b[2J\x1b]0;title\x07b\x9b31mc [red]d[/red]<i>e</i>"


# Settings and documents


def test_every_option_of_an_answer_can_be_set() -> None:
    assert set(NAMES) == {field.name for field in fields(Options)} - {
        "system",
        "raw",
        "continue_final_message",
        "logprobs",
        "prompt_logprobs",
        "adapter",
        "template_args",
        *("schema", "regex", "grammar", "choices", "free_first", "tools", "tool_choice", "parallel_tool_calls"),
    }


def test_settings_take_what_was_typed() -> None:
    held = Settings({"temperature": 0.5, "max_tokens": 9})
    typed = {"temperature": "0.3", "top-k": "7", "stop": "'a b' c", "pan_and_scan": "on", "seed": "3", "TOP_P": "0.5"}
    for name, text in typed.items():
        held.set(name, text)
    wanted = {"temperature": 0.3, "top_k": 7, "stop": ("a b", "c"), "pan_and_scan": True, "seed": 3, "top_p": 0.5}
    assert wanted.items() <= held.values.items()
    assert dict(held.rows())["stop"] == "'a b' c"
    held.set("temperature", "default")
    assert held.values["temperature"] is None and held.values["max_tokens"] == 9
    before = dict(held.values)
    for name, text in (("temperature", "-1"), ("top_k", "many"), ("pan_and_scan", "maybe"), ("stop", "'"), ("x", "1")):
        with pytest.raises(OptionError, match=name):
            held.set(name, text)
    with pytest.raises(OptionError, match="did you mean temperature"):
        held.set("temprature", "1")
    assert held.values == before


MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    {
        "role": "user",
        "content": [{"type": "image", "path": "/a b/c.png"}, {"type": "image"}, {"type": "text", "text": "Which?"}],
    },
    {"role": "assistant", "content": "Neither."},
]


def test_an_export_is_for_its_owner_alone_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "talk.md").symlink_to("precious")
    export.write(tmp_path / "talk.md", MESSAGES, "demo")
    assert (tmp_path / "precious").read_text() == "mine" and "demo" in (tmp_path / "talk.md").read_text()
    assert not (tmp_path / "talk.md").is_symlink() and (tmp_path / "talk.md").stat().st_mode & 0o777 == 0o600


def test_a_conversation_is_exported(tmp_path: Path) -> None:
    export.write(tmp_path / "new" / "talk.md", MESSAGES, "demo")
    assert (tmp_path / "new" / "talk.md").read_text("utf-8") == (
        "# A conversation with demo\n\n## System\n\nBe short.\n\n## You\n\n![c.png](</a b/c.png>)\n\n*(a picture)*\n\n"
        "Which?\n\n## Gemma\n\nNeither.\n"
    )
    export.write(tmp_path / "new" / "talk.json", MESSAGES, "demo")
    assert json.loads((tmp_path / "new" / "talk.json").read_text("utf-8")) == {"model": "demo", "messages": MESSAGES}
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["talk.json", "talk.md"]
    with pytest.raises(OptionError, match=r"\.md or \.json"):
        export.write(tmp_path / "talk.doc", MESSAGES, "demo")
    with pytest.raises(OutputError, match="place that can be written"):
        export.write(tmp_path / "new" / "talk.md" / "inner.md", MESSAGES, "demo")

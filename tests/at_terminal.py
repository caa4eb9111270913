"""The program at a pseudo-terminal, every byte of what it writes kept, and a model that writes every byte."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiny

from mlx_gemma3.prompt.vocabulary import CONTROL_NAMES, Vocabulary

# A new session has no terminal of its own until it takes one; without one, Ctrl-C would reach nobody.
START = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from mlx_gemma3.cli import main; main()"

# What rich, prompt_toolkit and the status line write: colours, cursor moves, erasures, modes, the cursor's place asked.
OWN = re.compile(rb"\x1b\[(?:[\d;]*m|\d*[ABCDGHJK]|\d+;\d+H|\?\d+[hl]|6n|\d q)|\r")
NAME = "mo\x1b]0;OWNED\x07d\x1b[8mel\x9b5m\x7f"  # a title, hidden text, the same in C1, DEL
SHOWN = r"mo\x1b]0;OWNED\x07d\x1b[8mel\x9b5m\x7f"


class Seen:
    """A program in a terminal of its own.

    Args:
        arguments: of the command.
        stdin: None for the terminal.
    """

    def __init__(
        self, *arguments: str | Path, folder: Path, columns: int = 100, rows: int = 40,
        environment: Mapping[str, str] | None = None, stdin: int | None = None,
    ) -> None:  # fmt: skip
        self.terminal, self.inner = pty.openpty()
        fcntl.ioctl(self.inner, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        os.set_blocking(self.terminal, False)
        self.before = termios.tcgetattr(self.inner)
        self.bytes = b""
        start = START if stdin is None else "from mlx_gemma3.cli import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, *map(str, arguments)],
            stdin=self.inner if stdin is None else stdin, stdout=self.inner, stderr=self.inner,
            start_new_session=True, cwd=folder,
            env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
            | {"TERM": "xterm-256color", "MLX_GEMMA3_DATA": f"{folder}/data"} | dict(environment or {}),
        )  # fmt: skip

    def pump(self, seconds: float, done: Callable[[], bool] = lambda: False, send: bytes = b"") -> bool:
        """Read, and send what is typed as fast as it is taken; False when `done` was not so within the seconds."""
        end, answered = time.monotonic() + seconds, self.bytes.count(b"\x1b[6n")
        while time.monotonic() < end:
            readable, writable, _ = select.select([self.terminal], [self.terminal] if send else [], [], 0.05)
            if readable:
                try:
                    self.bytes += os.read(self.terminal, 1 << 16)
                except OSError:
                    return done()
                for _ in range(self.bytes.count(b"\x1b[6n") - answered):  # where is the cursor?
                    os.write(self.terminal, b"\x1b[1;1R")
                    answered += 1
            if writable:
                try:
                    send = send[os.write(self.terminal, send[:512]) :]
                except BlockingIOError:
                    time.sleep(0.01)
            if not send and done():
                return True
            if not readable and self.process.poll() is not None:
                return done()
        return done() and not send

    def until(self, text: str, send: bytes = b"", seconds: float = 30) -> None:
        """Type something, and wait for what comes of it."""
        mark = len(self.bytes)
        assert self.pump(seconds, lambda: text.encode() in self.bytes[mark:], send), self.bytes[-2000:]

    def until_answering(self, question: bytes) -> None:
        """Ask, and wait for the answer's first words: before them there is a spinner's line, which is dim."""
        mark = len(self.bytes)

        def answers() -> bool:
            frames = re.findall(rb"\x1b\[\?2026h(.*?)\x1b\[\?2026l", self.bytes[mark:], re.DOTALL)
            return any(b"\x1b[2m" not in frame and OWN.sub(b"", frame).strip() for frame in frames)

        assert self.pump(30, answers, question), self.bytes[-2000:]

    def ended(self, seconds: float = 30) -> int:
        """Read to the program's end; returns its exit status."""
        assert self.pump(seconds, lambda: self.process.poll() is not None), self.bytes[-2000:]
        self.pump(0.2)
        return self.process.wait(1)

    def as_before(self) -> bool:
        """Whether the terminal is as the program found it."""
        return termios.tcgetattr(self.inner) == self.before

    def __enter__(self) -> Seen:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.inner)
        os.close(self.terminal)


def hidden_in(written: bytes, *, prompt: bool = False) -> list[str]:
    """What a terminal would act on, beside our own sequences, newlines and tabs.

    prompt: prompt_toolkit was there, which goes one place to the left with a backspace.
    """
    text = OWN.sub(b"", written.replace(b"\x08", b"") if prompt else written).decode("utf-8", "replace")
    return [
        text[max(0, place - 20) : place + 20]
        for place, character in enumerate(text)
        if (ord(character) < 32 and character not in "\t\n") or 0x7F <= ord(character) <= 0x9F
    ]


def every_byte(folder: Path) -> Path:
    """A chat checkpoint whose greedy answer is every byte piece in turn, and then each C1 character as a piece.

    A piece `|n|` stands behind each byte: bytes that are UTF-8 are text only when their run has ended. The layers add
    nothing (their last matrices are 0), and the head's row of each token is its predecessor's embedding.
    """
    control = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 105: "<start_of_turn>", 106: "<end_of_turn>", 107: "\n"}
    walk = [piece for byte in range(256) for piece in (f"<0x{byte:02X}>", f"|{byte}|")]
    walk += [chr(code) for code in (*range(0x80, 0xA0), 0x202E)]
    rest = iter(walk + [chr(code) for code in range(33, 127)] + ["▁"])
    pieces = [control.get(token) or next(rest, f"<unused{token}>") for token in range(700)]
    assert next(rest, None) is None
    config = tiny.text_config(
        vocab_size=700, num_hidden_layers=1, tie_word_embeddings=False, max_position_embeddings=8192
    )
    tensors = {
        name: np.zeros_like(values) if name.endswith(("o_proj.weight", "down_proj.weight", "norm.weight")) else values
        for name, values in tiny.random_tensors(config).items()
    }
    embeddings = np.random.default_rng(1).standard_normal((700, config["hidden_size"])).astype(np.float32)
    head = np.zeros_like(embeddings)
    steps = [107, *map(pieces.index, walk), 106]
    for token, following in pairwise(steps):
        head[following] = embeddings[token]
    tensors |= {"language_model.embed_tokens.weight": embeddings, "lm_head.weight": head}
    tiny.write_folder(folder, config, tensors)
    added = frozenset(piece for token, piece in enumerate(pieces) if token in control or piece.startswith("<unused"))
    vocabulary = Vocabulary("tests", tuple(pieces), added, frozenset(CONTROL_NAMES & set(pieces)))
    (folder / "tokenizer.model").write_bytes(vocabulary.sentencepiece())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "…"}), encoding="utf-8")
    return folder

"""The commands of a chat: one table, and a function for each."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from ...errors import OptionError, PromptError
from . import export
from .clipboard import clipboard
from .lines import Command, Said, paths, pictures
from .talk import Attached, ChatState


class Verb(NamedTuple):
    """A command that starts with a slash."""

    name: str
    takes: str
    help: str
    run: Callable[[ChatState, str], None]
    completes: Literal["", "pictures", "files", "settings"] = ""
    needs_model: bool = True


def run(talk: ChatState, command: Command) -> None:
    """Do what a command says. Ctrl-C while it waits for the model drops it.

    Raises:
        OptionError: there is no such command.
        Gemma3Error: what went wrong.
    """
    names = [verb.name for verb in VERBS]
    if command.name not in names:
        close = difflib.get_close_matches(command.name, names, n=1)
        do = f"did you mean /{close[0]}?" if close else "/help shows them all, and // begins words with a slash"
        raise OptionError(f"/{command.name} is no command", do=do)
    verb = VERBS[names.index(command.name)]
    if not verb.needs_model or talk.ready():
        verb.run(talk, command.rest)


def _image(talk: ChatState, rest: str) -> None:
    if not rest and talk.pictures:
        talk.pictures = []
        talk.screen.note("no picture waits any more")
        return
    named = pictures(rest)
    if not named:
        raise PromptError("/image", got="no path", want="one or more, in quotes where they hold spaces")
    for source in named:
        talk.attach(source)


def _paste(talk: ChatState, _: str) -> None:
    held = clipboard()
    if isinstance(held, str):
        talk.prefill = held.strip("\n")
    elif isinstance(held, list):
        for path in held:
            talk.attach(path)
    else:
        talk.pictures.append(
            Attached("the clipboard's picture", held.convert("RGBA" if held.has_transparency_data else "RGB"))
        )
        talk.screen.note(f"picture {len(talk.pictures)}: from the clipboard, {held.width} × {held.height}")


def _system(talk: ChatState, rest: str) -> None:
    if not rest:
        talk.screen.rows([("system", talk.system or "none")])
        return
    talk.system = None if rest == "none" else rest
    if talk.turns:
        talk.screen.note("kept for the next conversation: this one has begun without it · /reset begins it")
    elif talk.loading.ended():
        talk.new()


def _retry(talk: ChatState, _: str) -> None:
    talk.retry()


def _edit(talk: ChatState, rest: str) -> None:
    turn = talk.last("/edit")
    if turn.pictures is None:
        raise PromptError("/edit", got="a question whose pictures were not saved with it", do="/undo, and ask it anew")
    talk.editing = True
    if rest:
        talk.say(Said(rest))
    else:
        talk.prefill = turn.text


def _undo(talk: ChatState, _: str) -> None:
    turn = talk.undo()
    talk.screen.note(f"forgotten: {_short(turn.text)} · {_turns(len(talk.turns))} left")


def _tokens(talk: ChatState, _: str) -> None:
    most = talk.engine.about["max_context"]
    talk.screen.rows([("tokens", f"{talk.session.tokens:,} of {most:,}, in {_turns(len(talk.turns))}")])


def _stats(talk: ChatState, _: str) -> None:
    usage = talk.usage
    if usage is None:
        raise PromptError("/stats", got="no answer yet", want="one to tell of")
    written = usage["completion_tokens"]
    rest_seconds = usage["answer_seconds"] - (usage["first_token_seconds"] - usage["prompt_seconds"])
    talk.screen.rows(
        [
            (
                "prompt",
                f"{_count(usage['prompt_tokens'], 'token')}, {usage['cached_tokens']:,} of them known from before",
            ),
            (
                "read",
                f"{usage['processed_tokens']:,} tokens{_speed(usage['processed_tokens'], usage['prompt_seconds'])}",
            ),
            ("pictures", f"{usage['images']}, {usage['images_encoded']} of them looked at anew"),
            ("answer", f"{_count(written, 'token')}{_speed(written - 1, rest_seconds)}"),
            (
                "guessed",
                f"{usage['accepted_tokens']:,} of {usage['drafted_tokens']:,} right, in {usage['passes']:,} passes",
            ),
            ("first word", f"after {usage['prepare_seconds'] + usage['first_token_seconds']:.2f} s"),
            ("memory", f"{usage['peak_memory_bytes'] / 2**30:.2f} GiB at most"),
        ]
    )


def _set(talk: ChatState, rest: str) -> None:
    word, _, value = rest.partition(" ")
    if not word:
        talk.screen.rows(talk.settings.rows())
        return
    name = talk.settings.set(word, value.strip()) if value.strip() else talk.settings.named(word)
    talk.screen.rows([(name, talk.settings.show(name))])


def _save(talk: ChatState, rest: str) -> None:
    if not rest and talk.file is None:
        raise PromptError("/save", got="no file", want="the name of one")
    file = _file("/save", rest) if rest else talk.file
    saved = talk.save(file)
    talk.file = saved
    talk.screen.note(f"saved in {saved}; kept there on leaving too")


def _load(talk: ChatState, rest: str) -> None:
    file = _file("/load", rest)
    session = talk.engine.session(resume=file, adapter=talk.adapter)
    if talk.file is None or talk.file.resolve() != file.resolve():  # else: back to what was saved
        talk.save()
    talk.take(session)
    talk.file = file
    talk.screen.note(f"{_turns(len(talk.turns))} in {file}{_last(talk)}")


def _reset(talk: ChatState, _: str) -> None:
    talk.save()
    kept = f" · the one before is in {talk.file}" if talk.file else ""
    talk.new()
    talk.pictures, talk.file = [], None
    talk.screen.note("a new conversation" + (f" · system: {_short(talk.system)}" if talk.system else "") + kept)


def _export(talk: ChatState, rest: str) -> None:
    file = _file("/export", rest)
    export.write(file, talk.messages(), talk.loading.model)
    talk.screen.note(f"{_turns(len(talk.turns))} written to {file}")


def _help(talk: ChatState, _: str) -> None:
    talk.screen.rows([(f"/{verb.name} {verb.takes}".rstrip(), verb.help) for verb in VERBS])
    talk.screen.note(
        "Enter sends, Esc Enter begins a line. Pictures can be dropped onto the terminal. "
        "Ctrl-C stops an answer; twice leaves."
    )


def _quit(talk: ChatState, _: str) -> None:
    talk.ended = True


VERBS = (
    Verb(
        "image",
        "PATH…",
        "pictures for the next question; no path: none",
        _image,
        "pictures",
        needs_model=False,
    ),
    Verb("paste", "", "the clipboard's picture, or its text", _paste, needs_model=False),
    Verb("edit", "", "change the last question and ask it again", _edit),
    Verb("retry", "", "another answer to the last question", _retry),
    Verb("undo", "", "forget the last question and its answer", _undo),
    Verb("system", "TEXT", "what the model is told before all else; none takes it away", _system, needs_model=False),
    Verb("set", "NAME VALUE", "a setting of the answers, or show them", _set, "settings", needs_model=False),
    Verb("tokens", "", "how long the conversation is", _tokens),
    Verb("stats", "", "counts and speeds of the last answer", _stats),
    Verb("save", "FILE", "keep the conversation in a file, to go on with later", _save, "files"),
    Verb("load", "FILE", "go on with a conversation that was saved", _load, "files"),
    Verb("export", "FILE", "write it as Markdown (.md) or JSON (.json)", _export, "files"),
    Verb("reset", "", "a new conversation; the one before stays in its file", _reset),
    Verb("help", "", "this", _help, needs_model=False),
    Verb("quit", "", "leave; so does Ctrl-D", _quit, needs_model=False),
)


def _file(command: str, rest: str) -> Path:
    named = paths(rest)
    if len(named) != 1:
        raise PromptError(command, got=f"{len(named) or 'no'} names", want="one file, in quotes where it holds spaces")
    return named[0]


def _last(talk: ChatState) -> str:
    return f"; the last question: {_short(talk.turns[-1].text)}" if talk.turns else ""


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _turns(count: int) -> str:
    return _count(count, "turn")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return f"“{line if len(line) <= 60 else line[:57] + '…'}”"


def _speed(tokens: int, seconds: float) -> str:
    return f", {tokens / seconds:,.1f} a second" if tokens > 0 and seconds > 0 else ""

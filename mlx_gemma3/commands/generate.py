"""`mlx-gemma3 generate`: one prompt, one answer, written as it comes."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..boundary.launch import launched
from ..boundary.writing import check_writable
from ..errors import OptionError, PromptError
from .adapters import only
from .answers import answering
from .speculation import Draft, Off, guessed_by
from .streams import WAIT, OutputLost, Piped
from .terminal import Pace, Status, answer, emit, leave, print_notes, tell, thought

if TYPE_CHECKING:
    from ..runtime.events import Event, Usage
    from ..runtime.stream import Stream


@answering(talk=False)
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What to say. Text piped in follows it, if it begins within 5 seconds; without a prompt it is waited "
            "for. {image} marks a picture's place.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Alias, folder, owner/name on the Hub, or .gguf file.")
    ] = "gemma-3-4b-it",
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            "-i",
            help="A picture: its path, its address, or - for standard input; give it again for more.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="Said before the first turn.", show_default=False)] = None,
    *,
    options: dict[str, Any],
    prefill: Annotated[
        str | None, typer.Option(help="The answer begins with this, and the model goes on.", show_default=False)
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Complete the text: no chat template.")] = False,
    session: Annotated[
        Path | None,
        typer.Option(help="Go on with the conversation in this file, and keep it there.", show_default=False),
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="An adapter to answer with, as NAME=PATH or PATH.", show_default=False)
    ] = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Leave the vision tower out.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    kv_bits: Annotated[int, typer.Option(help="Bits of cached keys and values: 16, 8 or 4.")] = 16,
    local_kv_bits: Annotated[int, typer.Option(help="The same for local layers, which are small.")] = 16,
    max_context: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and answer.", show_default="the model's")
    ] = None,
    draft: Draft = None,
    no_speculation: Off = False,
    force: Annotated[bool, typer.Option("--force", help="Load even where memory will not do.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per event.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Counts and speeds, after the answer.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")] = False,
) -> None:
    """Answer a prompt, with any number of pictures, as it is written."""
    images: list[str | bytes] = list(image or [])
    _refuse_picture(prompt, given=bool(images))
    adapters, guesses = only(adapter), guessed_by(draft, off=no_speculation)
    message = _with_pictures(prompt or "", images, raw=raw)
    if images and text_only:
        raise OptionError("--image", got="--text-only as well", want="one or the other")
    if options["logprobs"] is not None and not as_json:
        raise OptionError("--logprobs", got="no --json", want="both", do="an answer as text does not show them")
    if prefill is not None and (raw or session is not None):
        other = "--raw" if raw else "--session"
        raise OptionError("--prefill", got=f"{other} as well", want="one or the other")
    if "-" in images:
        images[images.index("-")] = _piped_picture(images)
        piped = None
    else:
        piped = None if prompt and launched() else Piped(WAIT if prompt else None)  # mlx.launch's pipe never ends
    if not prompt and piped is not None:
        if text := _read(piped, quiet=quiet):
            message = _append(message, text)
        if not message and not images:
            raise PromptError("prompt", got="nothing", want="words as an argument or on standard input")
    if session is not None:
        if raw:
            raise OptionError("session", got="--raw as well", want="one or the other", do="completion has no turns")
        session = check_writable(session)

    from ..runtime.engine import Engine

    status = Status(not quiet and not as_json)
    status.show(f"loading {model}")
    with Engine(
        model,
        dtype=dtype,
        text_only=text_only or (not images and session is None),
        kv_bits=kv_bits,
        local_kv_bits=local_kv_bits,
        max_context=max_context,
        adapters=adapters,
        **guesses,
        force=force,
        quiet=quiet or as_json,
    ) as engine:
        status.clear()
        print_notes(engine.about["notes"], quiet=quiet)
        if prompt and piped is not None and (text := _read(piped, quiet=quiet)):
            message = _append(message, text)
        if session is None:
            options |= {"adapter": next(iter(adapters), None)}
            options |= {"system": system, "raw": raw or None, "continue_final_message": prefill is not None}
            begun = message if prefill is None else _begun(message, len(images), prefill)
            stream = engine.stream(begun, images=images, **options)
        else:
            resume = session if session.exists() else None
            talk = engine.session(system=system, resume=resume, adapter=next(iter(adapters), None))
            stream = talk.send(message if isinstance(message, str) else message[0]["content"], images=images, **options)
        kept = None if session is None else lambda: talk.save(session, replace=False)
        first = prefill.strip() if prefill is not None and not as_json else ""  # as the template writes it
        stopped = _print(stream, status, first, as_json=as_json, quiet=quiet, kept=kept)
        if stats and (end := stream.next())["kind"] == "done":
            tell(_stats(end["usage"], unpacked=engine.about["unpacked_bytes"]))
    if stopped:
        raise typer.Exit(128 + stopped)


def _piped_picture(images: list[str | bytes]) -> bytes:
    """The one picture on standard input."""
    if images.count("-") > 1:
        raise OptionError("--image -", got="given twice", want="one picture on standard input")
    content = Piped(None).content()
    if not content:
        raise PromptError("--image -", got="nothing on standard input", want="a picture's file")
    return content


def _begun(message: str | list[dict[str, Any]], images: int, prefill: str) -> list[dict[str, Any]]:
    """The question, and the beginning of its answer."""
    if isinstance(message, str):
        items: list[dict[str, Any]] = [{"type": "image"} for _ in range(images)]
        message = [{"role": "user", "content": [*items, {"type": "text", "text": message}]}]
    return [*message, {"role": "assistant", "content": prefill}]


def _with_pictures(text: str, images: Sequence[str | bytes], *, raw: bool) -> str | list[dict[str, Any]]:
    """Put the pictures where `{image}` stands, or before the words where it stands nowhere.

    `{{image}}` is the text `{image}`. Returns the text itself when no picture is placed by a marker.
    """
    parts = re.split(r"(?<!\{)\{image\}(?!\})", text)
    parts = [part.replace("{{image}}", "{image}") for part in parts]
    markers = len(parts) - 1
    if markers and markers != len(images):
        raise PromptError(
            "{image} markers",
            got=f"{markers} for {len(images)} pictures",
            want="one a picture, or none at all",
            do="give each picture with --image; write {{image}} for the text itself",
        )
    if raw:
        return "<start_of_image>".join(parts) if markers else "<start_of_image>" * len(images) + parts[0]
    if not markers:
        return parts[0]
    items: list[dict[str, Any]] = [{"type": "text", "text": parts[0]}]
    for part in parts[1:]:
        items += [{"type": "image"}, {"type": "text", "text": part}]
    return [{"role": "user", "content": items}]


def _append(message: str | list[dict[str, Any]], text: str) -> str | list[dict[str, Any]]:
    """Piped text after the words of the command line, a blank line between. Markers in it are not markers."""
    if isinstance(message, str):
        return f"{message}\n\n{text}" if message else text
    items = message[0]["content"]
    return [{"role": "user", "content": [*items, {"type": "text", "text": f"\n\n{text}"}]}]


def _refuse_picture(prompt: str | None, *, given: bool) -> None:
    """`-i a.png b.png` gives one picture, and the other's name as the prompt: nobody means that."""
    from ..prompt.address import is_address

    if given and prompt and is_address(prompt) and not re.search(r"\s", prompt):
        raise PromptError(
            "prompt", got=f"the address {prompt}", want="words", do="each picture needs its own --image (-i)"
        )
    with contextlib.suppress(OSError, ValueError):  # too long for a path, or a NUL in it
        if prompt and Path(prompt).is_file():
            from ..errors import ImageError
            from ..prompt.images import load_image

            with contextlib.suppress(ImageError):
                load_image(Path(prompt))
                raise PromptError(
                    "prompt", got=f"the picture {prompt}", want="words", do="each picture needs its own --image (-i)"
                )


def _read(piped: Piped, *, quiet: bool) -> str:
    """What is piped in; a person is told when it is long in coming, or was not waited for."""
    if not quiet and sys.stderr.isatty() and not piped.ended(2):
        tell("reading standard input …")
    text = piped.text()
    if piped.silent and not quiet:
        tell(
            f"note: nothing came on standard input within {WAIT:.0f} seconds, so the prompt stands alone "
            "(< /dev/null is not waited for; without a prompt, standard input is)"
        )
    return text


def _print(
    stream: Stream, status: Status, first: str, *, as_json: bool, quiet: bool, kept: Callable[[], None] | None
) -> int:
    """Write the answer as it comes, and keep it. A signal ends the answer; returns its number, or 0.

    Args:
        first: what stands before it.
        quiet: what the model thinks before it answers is not shown.
        kept: keeps the answer, also one that could not be written; None where it is nowhere to be kept.

    Raises:
        OutputLost, BrokenPipeError: it could not be written.
        Gemma3Error: there is none.
    """
    stopped, thinks, pace = 0, False, Pace()
    failure: Exception | None = None

    def cancel(number: int, _: object) -> None:
        nonlocal stopped
        stopped = stopped or number
        stream.cancel()
        signal.signal(signal.SIGINT, leave)  # again: at once

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, cancel)
    while True:
        event = stream.next()
        kind = event["kind"]
        try:
            if first and kind in ("text", "done"):
                status.clear()
                answer(first)
                first = ""
            if failure is None:
                _show(event, status, pace, as_json=as_json, quiet=quiet, thinks=thinks)
            thinks = kind == "thinking" and not quiet
        except (OutputLost, BrokenPipeError) as error:
            if kept is None:
                raise
            failure = error
        if kind == "error":
            stream.raise_error()
        if kind == "done":
            break
    if kept is not None:
        kept()
    if failure is not None and not stopped:
        raise failure
    return stopped


def _show(event: Event, status: Status, pace: Pace, *, as_json: bool, quiet: bool, thinks: bool) -> None:
    """What one event has to show.

    Args:
        thinks: what the model thinks was shown last.
    """
    if event["kind"] == "pending":
        if "stage" not in event:
            return
        stage, done, total = event["stage"], event["done"], event["total"]
        if stage == "prompt":
            status.bar(done, total, pace.text(done, total, "tokens"))
        elif stage == "download":
            status.show(f"fetching the picture · {done:,} bytes" + (f" of {total:,}" if total else ""))
        else:
            status.show(f"looking at {stage}", done, total)
        return
    status.clear()
    if as_json:
        emit(event)
    elif event["kind"] == "thinking":
        if not quiet:
            thought(event["text"])
    elif event["kind"] in ("text", "done"):
        if thinks:
            thought(None)
        answer(event["text"] if event["kind"] == "text" else "\n")


def _stats(usage: Usage, *, unpacked: int) -> str:
    """Counts and speeds in one line."""

    def speed(tokens: int, seconds: float) -> str:
        return f"{tokens / seconds:.1f} tokens/s" if tokens > 0 and seconds > 0 else "no speed"

    guessed = f", {usage['accepted_tokens']} of {usage['drafted_tokens']} guessed right in {usage['passes']} passes"
    on_disk = " from disk" if usage["cached_from"] == "disk" else ""
    answered = usage["completion_tokens"]
    after_first = usage["answer_seconds"] - (usage["first_token_seconds"] - usage["prompt_seconds"])
    return " · ".join(
        [
            f"prompt {usage['prompt_tokens']} tokens, {usage['cached_tokens']} of them known{on_disk}, "
            + speed(usage["processed_tokens"], usage["prompt_seconds"]),
            *([f"{usage['images']} pictures"] if usage["images"] else []),
            f"answer {answered} tokens, {speed(answered - 1, after_first)}"
            + (guessed if usage["drafted_tokens"] else ""),
            f"first token after {usage['prepare_seconds'] + usage['first_token_seconds']:.2f} s",
            f"peak memory {usage['peak_memory_bytes'] / 2**30:.2f} GiB",
            *([f"weights unpacked to float32 for this CPU: {unpacked / 2**30:.2f} GiB more"] if unpacked else []),
        ]
    )

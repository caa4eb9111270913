"""`mlx-gemma3 generate`: one prompt, one answer, written as it comes."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError, PromptError
from .terminal import Pace, Status, leave, print_notes

if TYPE_CHECKING:
    from ..runtime.options import OptionValues
    from ..runtime.stream import Stream


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What to say. Text piped in follows it. {image} marks a picture's place.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Alias, folder, owner/name on the Hub, or .gguf file.")
    ] = "gemma-3-4b-it",
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="A picture; give it again for more.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="Said before the first turn.", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 1024,
    temperature: Annotated[
        float | None, typer.Option(help="0 always takes the likeliest token.", show_default="the checkpoint's, else 1")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from the k likeliest; 0 is off.", show_default="the checkpoint's, else 64")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from this share; 1 is off.", show_default="the checkpoint's, else 0.95")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Least share of the best; 0 is off.", show_default="the checkpoint's, else 0")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 repeats less.", show_default="the checkpoint's, else 1")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same answer.", show_default=False)] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer; give it again for more.", show_default=False)
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Complete the text: no chat template.")] = False,
    pan_and_scan: Annotated[
        bool, typer.Option("--pan-and-scan", help="Show wide and tall pictures in crops too.")
    ] = False,
    session: Annotated[
        Path | None,
        typer.Option(help="Go on with the conversation in this file, and keep it there.", show_default=False),
    ] = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Leave the vision tower out.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    kv_bits: Annotated[int, typer.Option(help="Bits of cached keys and values: 16, 8 or 4.")] = 16,
    local_kv_bits: Annotated[int, typer.Option(help="The same for local layers, which are small.")] = 16,
    max_context: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and answer.", show_default="the model's")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Load even where memory will not do.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per event.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Counts and speeds, after the answer.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")] = False,
) -> None:
    """Answer a prompt, with any number of pictures, as it is written."""
    images = [str(path) for path in image or []]
    message = _with_pictures(prompt or "", images, raw=raw)
    if piped := _read_stdin():
        message = _append(message, piped)
    if not images and isinstance(message, str) and not message:
        raise PromptError("prompt", got="nothing", want="words as an argument or on standard input")

    if images and text_only:
        raise OptionError("--image", got="--text-only as well", want="one or the other")
    if session is not None and raw:
        raise OptionError("session", got="--raw as well", want="one or the other", do="completion has no turns")

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
        force=force,
        quiet=quiet or as_json,
    ) as engine:
        status.clear()
        print_notes(engine.about["notes"], quiet=quiet)
        options: OptionValues = {
            "pan_and_scan": pan_and_scan,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "stop": stop or [],
        }
        if session is None:
            options |= {"system": system, "raw": raw or None}
            stream = engine.stream(message, images=images, **options)
        else:
            resume = session if session.exists() else None
            talk = engine.session(system=system, resume=resume)
            stream = talk.send(message if isinstance(message, str) else message[0]["content"], images=images, **options)
        interrupted = _print(stream, status, as_json=as_json)
        if session is not None:
            talk.save(session)
        if stats and (end := stream.next())["kind"] == "done":
            typer.echo(_stats(end["usage"]), err=True)
    if interrupted:
        raise typer.Exit(130)


def _with_pictures(text: str, images: list[str], *, raw: bool) -> str | list[dict[str, Any]]:
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


def _read_stdin() -> str:
    """What is piped or redirected in; nothing when standard input is a terminal, closed or a device."""
    if sys.stdin is None or sys.stdin.closed:
        return ""
    mode = os.fstat(sys.stdin.fileno()).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return ""
    if stat.S_ISFIFO(mode) and sys.stderr.isatty() and not select.select([sys.stdin], [], [], 2)[0]:
        typer.echo("reading standard input to its end …", err=True)
    try:
        return sys.stdin.buffer.read().decode("utf-8").strip("\n")
    except UnicodeDecodeError as error:
        raise PromptError("standard input", got=f"bytes that are not UTF-8 at {error.start}", want="text") from None


def _print(stream: Stream, status: Status, *, as_json: bool) -> bool:
    """Write the answer as it comes. Ctrl-C ends it; returns whether that happened."""
    interrupted, pace = False, Pace()

    def cancel(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        stream.cancel()
        signal.signal(signal.SIGINT, leave)  # again: at once

    signal.signal(signal.SIGINT, cancel)
    while True:
        event = stream.next()
        kind = event["kind"]
        if as_json and "stage" not in event:
            typer.echo(json.dumps(event, ensure_ascii=False))
        if kind == "pending" and event["stage"] == "prompt":
            status.bar(event["done"], event["total"], pace.text(event["done"], event["total"], "tokens"))
        elif kind == "pending":
            status.show(f"looking at {event['stage']}", event["done"], event["total"])
        elif kind == "text" and not as_json:
            status.clear()
            sys.stdout.write(event["text"])
            sys.stdout.flush()
        elif kind == "error":
            status.clear()
            stream.raise_error()
        elif kind == "done":
            status.clear()
            if not as_json:
                typer.echo()
            return interrupted


def _stats(usage: dict[str, Any]) -> str:
    """Counts and speeds in one line."""

    def speed(tokens: int, seconds: float) -> str:
        return f"{tokens / seconds:.1f} tokens/s" if tokens > 0 and seconds > 0 else "no speed"

    answered = usage["completion_tokens"]
    after_first = usage["answer_seconds"] - (usage["first_token_seconds"] - usage["prompt_seconds"])
    return " · ".join(
        [
            f"prompt {usage['prompt_tokens']} tokens, {usage['cached_tokens']} of them known, "
            + speed(usage["processed_tokens"], usage["prompt_seconds"]),
            *([f"{usage['images']} pictures"] if usage["images"] else []),
            f"answer {answered} tokens, {speed(answered - 1, after_first)}",
            f"first token after {usage['prepare_seconds'] + usage['first_token_seconds']:.2f} s",
            f"peak memory {usage['peak_memory_bytes'] / 2**30:.2f} GiB",
        ]
    )

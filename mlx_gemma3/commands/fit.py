"""`mlx-gemma3 fit`: which sizes, bits and contexts a machine has the memory for. Needs no weights and no network."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from ..errors import OptionError
from ..visible import one_line
from .inspect import table
from .terminal import emit, say


def fit(
    model: Annotated[
        str | None,
        typer.Argument(
            help="270m, 1b, 4b, 12b or 27b, a folder, or a .gguf file; nothing for all sizes.", show_default=False
        ),
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Tokens to hold, as 32768 or 128k.", show_default="8k, or what the model has")
    ] = None,
    kv_bits: Annotated[int, typer.Option(help="Of the keys and values of global layers: 16, 8 or 4.")] = 16,
    local_kv_bits: Annotated[int, typer.Option(help="The same for local layers, which are small.")] = 16,
    bits: Annotated[
        int | None,
        typer.Option(help="Of the weights: 16, 8, 6, 5, 4, 3 or 2.", show_default="as stored, else the most that fit"),
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="GiB of another Mac's memory.", show_default="this machine's")
    ] = None,
    machines: Annotated[
        int, typer.Option(help="So many alike, that share a model (docs/macs.md); the figures are each one's.", min=1)
    ] = 1,
    text_only: Annotated[bool, typer.Option("--text-only", help="Without the vision tower.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say which sizes, bits and contexts fit into memory, with the arithmetic."""
    from ..measure.fits import fitting

    about = fitting(
        model,
        context=parse_context(context) if context is not None else None,
        kv_bits=kv_bits,
        local_kv_bits=local_kv_bits,
        bits=bits,
        memory=memory,
        machines=machines,
        text_only=text_only,
    )
    if as_json:
        emit(about)
    else:
        say("\n".join(sizes_report(about) if model is None else one_report(about)))


def parse_context(text: str) -> int:
    """Tokens from "32768", "32,768" or "128k" (1,024 each).

    Raises:
        OptionError: something else, or 0.
    """
    found = re.fullmatch(r"(\d+|\d{1,3}(?:,\d{3})+)(k?)", text.strip().lower(), re.ASCII)
    tokens = int(found[1].replace(",", "")) * (1024 if found[2] else 1) if found else 0
    if tokens < 1:
        raise OptionError("--context", got=repr(text), want="tokens, as 32768 or 128k")
    return tokens


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f}"


def tokens_text(tokens: int) -> str:
    """128k, 47.2k, 512, or a dash for none."""
    if tokens < 1024:
        return str(tokens) if tokens else "-"
    return f"{int(tokens / 102.4) / 10:g}k"


def _machine_line(about: dict[str, Any]) -> str:
    machine, machines = about["machine"], about["machines"]
    shared = f"{machines} machines that share a model, and of each: " if machines > 1 else ""
    return (
        f"{shared}{machine['name']}, {_gib(machine['memory'])} GiB of memory: {_gib(machine['budget'])} GiB for the "
        f"model ({machine['rule']})"
    )


def sizes_report(about: dict[str, Any]) -> list[str]:
    """`all_sizes` as text: a row for each size."""
    rows, machine = about["sizes"], about["machine"]
    many = list(dict.fromkeys(row["bits"] for row in rows))
    cells = [["", *(_bits(bits, machine) for bits in many)]]
    for size in dict.fromkeys(row["size"] for row in rows):
        same = [row for row in rows if row["size"] == size]
        cells.append([size, *(f"{_gib(row['weights'])} {_cell(row):>{11 if 'fits' in row else 6}}" for row in same)])
    asked = f"whether {tokens_text(about['context'])} fit, and " if about["context"] else ""
    return [
        _machine_line(about),
        f"GiB of weights, {asked}the longest context that fits (cache in {_bits(about['kv_bits'], machine)}):",
        *table(cells, "<" + ">" * len(many)),
    ]


def _cell(row: dict[str, Any]) -> str:
    longest = tokens_text(row["largest_context"])
    return longest if "fits" not in row else f"{'yes' if row['fits'] else 'no'}, {longest}"


def one_report(about: dict[str, Any]) -> list[str]:
    """`one` as text: the sum line by line, the verdict, and what else there is."""
    parts, how, machine, budget = about["parts"], about["how"], about["machine"], about["machine"]["budget"]
    rows = [
        ["weights", _gib(parts["weights"]), _bits(about["bits"], machine)],
        ["global layers", _gib(parts["kv_global"]), how["kv_global"]],
        ["local layers", _gib(parts["kv_local"]), how["kv_local"]],
        ["working memory", _gib(parts["working"]), f"reading: {_gib(parts['prefill'])}, {how['prefill']}"],
        *([["", "", f"or a picture: {_gib(parts['vision'])}, {how['vision']}"]] if parts["vision"] else []),
        ["the rest", _gib(parts["logits"] + parts["overhead"]), "program, libraries, vocabulary, one row of logits"],
        ["total GiB", _gib(about["total"]), f"of {_gib(budget)}"],
    ]
    spare, longest = budget - about["total"], about["largest_context"]
    verdict = f"fits, {_gib(spare)} GiB to spare" if about["fits"] else f"does not fit: {_gib(-spare)} GiB too much"
    if longest >= about["limit"]:
        verdict += "; so does the whole context"
    elif about["fits"]:
        verdict += f"; up to {tokens_text(longest)} tokens do"
    heading = f"{one_line(about['model'])}, {about['context']:,} tokens"
    lines = [_machine_line(about), "", f"{heading}:", *table(rows, "<><", headed=False), "", f"{heading}: {verdict}"]
    if not about["fits"]:
        lines += [f"would fit: {other}" for other in about["remedies"]] or ["nothing of this size would"]
        if smaller := about["smaller"]:
            lines.append(f"smaller: {smaller['size']} in {_bits(smaller['bits'], machine)} fits")
    choices = about["choices"]
    cells = [
        [
            "longest context",
            *(f"KV {_bits(bits, machine)}" for bits in dict.fromkeys(choice["kv_bits"] for choice in choices)),
        ]
    ]
    for bits in dict.fromkeys(choice["bits"] for choice in choices):
        same = (choice["largest_context"] for choice in choices if choice["bits"] == bits)
        cells.append([_bits(bits, machine), *map(tokens_text, same)])
    return [*lines, "", *table(cells, "<>>>")]


def _bits(bits: int | None, machine: dict[str, Any]) -> str:
    """16 stands for what is not packed: 32 where the activations are float32."""
    if bits is None:
        return "as stored"
    return f"{bits if bits < 16 or machine['metal'] else 32} bits"

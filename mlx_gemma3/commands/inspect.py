"""`mlx-gemma3 inspect`: what is in a checkpoint, from its headers, and what this machine is; no weight is read."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..errors import OptionError
from ..visible import one_line
from .terminal import columns, emit, print_notes, say


def inspect(
    source: Annotated[
        str | None,
        typer.Argument(
            help="Alias, folder, owner/name on the Hub, or .gguf file; not needed with --machine.", show_default=False
        ),
    ] = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Leave the vision tower out.")] = False,
    about_machine: Annotated[
        bool, typer.Option("--machine", help="This machine: chip, memory, limits, the kernels of attention.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what a checkpoint holds, how it is packed, and what memory it needs, without loading it."""
    if source is None:
        if not about_machine:
            raise OptionError("SOURCE", got="none", want="a checkpoint, or --machine")
        from ..measure.machine import machine

        found = machine()
        if as_json:
            emit(found)
        else:
            say("\n".join(machine_lines(found)))
        return
    from ..measure.contents import contents

    about = contents(source, text_only=text_only, quiet=as_json, machine=about_machine)
    print_notes(about["notes"], quiet=as_json)
    if as_json:
        emit(about)
    else:
        say("\n".join([*report(about), *(["", *machine_lines(about["machine"])] if about_machine else [])]))


def report(about: dict[str, Any]) -> list[str]:
    """What `describe` found, as lines of text."""
    layers, pictures, tokenizer = about["layers"], about["pictures"], about["tokenizer"]
    embedding = about["embedding"]
    words = "embedding" if embedding else "chat" if about["chat"] else "base"
    settings = {name: value for name, value in about["generation"].items() if not name.endswith("token_id")}
    head = {
        "path": one_line(about["path"]),
        **({"note": textwrap.shorten(about["note"], 300, placeholder=" …")} if about["note"] else {}),
        "model": f"Gemma 3 {about['size'] or 'of another size'}, {words}, {about['format']}",
        "context": f"{about['context']:,} tokens",
        "layers": f"{layers['count']}: {len(layers['global'])} global, {layers['local']} local with a window of "
        f"{layers['window']:,}",
        "pictures": f"{pictures['pixels']} x {pictures['pixels']} pixels, {pictures['tokens']} tokens each"
        if pictures
        else "no: words only",
        **({"vectors": _vectors(embedding)} if embedding else {}),
        "parameters": f"{about['parameters']:,}",
        "on disk": f"{amount(about['bytes'])}, {about['bits_per_weight']:.2f} bits a weight",
        "tokenizer": f"{tokenizer['file']}, {tokenizer['vocabulary']:,} pieces" if tokenizer else "none",
        "chat template": _template(about),
        "generation": ", ".join(f"{name} {_plain(value)}" for name, value in settings.items()) or "no settings",
    }
    lines = [one_line(about["name"]), *(f"{name:<15}{value}" for name, value in head.items()), ""]
    rows = [["part", "parameters", "bytes", "stored as"]]
    rows += [
        [row["part"], f"{row['parameters']:,}", amount(row["bytes"]), " + ".join(row["stored"])]
        for row in about["parts"]
    ]
    lines += [*table(rows, "<>><"), "", *_matrix_lines(about["matrices"]), ""]
    memory = about["memory"]
    rows = [["context", *(f"KV {bits} bits" for bits in sorted({row["kv_bits"] for row in memory}, reverse=True))]]
    for context in sorted({row["context"] for row in memory}):
        same = [row for row in memory if row["context"] == context]
        rows.append([f"{context:,}", *(amount(row["total"]) for row in same)])
    lines += [f"memory on a Mac, weights {amount(memory[0]['weights'])} of it:", *table(rows, ">>>>")]
    return lines


def _vectors(embedding: dict[str, Any]) -> str:
    """An embedding model's vectors in words."""
    prompts = ", ".join(embedding["prompts"]) or "none"
    return one_line(
        f"{embedding['dimensions']:,} numbers, of at most {embedding['tokens']:,} tokens; prompts: {prompts}"
    )


def machine_lines(about: dict[str, Any]) -> list[str]:
    """What `measure.machine.machine` found, as lines of text."""
    metal = about["wired"] is not None
    working = f"{amount(about['working_set'])}, what Metal recommends at most" if metal else "no Metal"
    wired = f"{amount(about['wired'])}, at most" if about["wired"] else "none"
    rows = [
        ["chip", one_line(about["chip"]) + (f", {one_line(name)}" if (name := about["architecture"]) else "")],
        ["system", one_line(about["system"])],
        ["mlx", about["mlx"]],
        ["memory", amount(about["memory"])],
        ["working set", working],
        ["wired limit", wired if metal else "no Metal"],
        ["TF32", "float32 may be TF32" if about["tf32"] else "off: float32 stays float32"],
        ["attention", "by Metal's kernels:" if about["attention"] else about["backend"]],
    ]
    lines = table(rows, "<<", headed=False)
    return [*lines, *_attention_lines(about["attention"])] if about["attention"] else lines


def _attention_lines(found: list[dict[str, Any]]) -> list[str]:
    """A line for each kind of layer, for steps and for prompts; models whose paths are the same share it."""
    contexts = list(dict.fromkeys(row["context"] for row in found if row["context"] is not None))
    lines: dict[tuple[str, ...], tuple[list[str], set[int]]] = {}
    for model, layer, step in dict.fromkeys((row["model"], row["layer"], row["queries"] == 1) for row in found):
        same = [row for row in found if (row["model"], row["layer"], row["queries"] == 1) == (model, layer, step)]
        by_context = {row["context"]: row["path"] for row in same}
        paths = [by_context.get(context, "-") for context in contexts]
        if layer == "tower":  # knows no context
            paths = [by_context[None], *[""] * (len(contexts) - 1)]
        models, queries = lines.setdefault((layer, "step" if step else "chunk", *paths), ([], set()))
        models.append(model)
        queries |= {row["queries"] for row in same}
    rows = [["layers", "of", "queries", *(f"{context:,} tokens" for context in contexts)]]
    for (layer, _, *paths), (models, queries) in sorted(lines.items(), key=lambda item: item[0][1], reverse=True):
        least, most = min(queries), max(queries)
        count = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        rows.append([layer, ", ".join(models), count, *paths])
    return table(rows, "<<>" + "<" * len(contexts))


def _matrix_lines(matrices: dict[str, Any]) -> list[str]:
    if not matrices["others"]:
        return [f"every matrix: {matrices['usual']}"]
    lines = [f"most matrices: {matrices['usual']}; others:"]
    for way, names in matrices["others"].items():
        lines += [f"  {way}: {name}" for name in names]
    return lines


def table(rows: Sequence[Sequence[str]], sides: str, *, headed: bool = True) -> list[str]:
    """Rows of equal length as aligned lines; `sides` has < or > for each column.

    On a terminal that is too narrow for them, each row is a list: its first cell, and below it the others, named by the
    first row, if that is a head.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    room = columns()
    if room is not None and sum(widths) + 2 * (len(widths) - 1) > room:
        heads, *rest = rows if headed else [[""] * len(rows[0]), *rows]
        return [line for row in rest for line in _listed(heads, row)]
    cells = ([f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)] for row in rows)
    return ["  ".join(row).rstrip() for row in cells]


def _listed(heads: Sequence[str], row: Sequence[str]) -> list[str]:
    """A row as lines: "prompt 512", then "  tokens/s 310"."""
    first, *others = (" ".join(f"{head} {cell}".split()) for head, cell in zip(heads, row, strict=True))
    return [first, *(f"  {other}" for other, cell in zip(others, row[1:], strict=True) if cell)]


def amount(size: int) -> str:
    """Bytes for people: "2.64 GiB"."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << power:
            return f"{size / (1 << power):.2f} {unit}"
    return f"{size} bytes"


def _plain(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _template(about: dict[str, Any]) -> str:
    """Where the chat template stands, and whether its own or Gemma 3's turns are written."""
    file, of = about["chat_template"], about["chat_template_of"]
    if of is None:
        return file or "none"
    return f"{file or 'none'}: {'its own turns' if of == 'own' else 'turns as Gemma 3 writes them'}"

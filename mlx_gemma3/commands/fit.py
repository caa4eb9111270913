"""`mlx-gemma3 fit`: which sizes, bits and contexts a machine has the memory for. Needs no weights and no network."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError, SourceNotFound
from ..visible import one_line
from .inspect import table
from .terminal import emit, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..checkpoint.entries import Entry
    from ..checkpoint.memory import Estimate, Machine
    from ..config import Config

BITS = (16, 8, 4)  # that are offered; --bits takes the others too
CONTEXT = 8192  # asked about when nobody says


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
    text_only: Annotated[bool, typer.Option("--text-only", help="Without the vision tower.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say which sizes, bits and contexts fit into memory, with the arithmetic."""
    from ..checkpoint.memory import WEIGHT_BITS, other_mac, this_machine
    from ..checkpoint.published import SIZES
    from ..model.cache import KV_BITS

    for name, asked in (("--kv-bits", kv_bits), ("--local-kv-bits", local_kv_bits)):
        if asked not in KV_BITS:
            raise OptionError(name, got=asked, want="16, 8 or 4")
    if bits is not None and bits not in WEIGHT_BITS:
        raise OptionError("--bits", got=bits, want=", ".join(map(str, WEIGHT_BITS)))
    tokens = parse_context(context) if context is not None else None
    machine = this_machine() if memory is None else other_mac(memory)
    if model is None:
        sizes = [replace(_published(size, text_only=text_only), local_kv_bits=local_kv_bits) for size in SIZES]
        about = all_sizes(sizes, machine, tokens, kv_bits, bits)
        lines = sizes_report(about)
    else:
        subject = replace(_find(model, text_only=text_only), local_kv_bits=local_kv_bits)
        about = one(subject, machine, tokens, kv_bits, bits)
        lines = one_report(about)
    if as_json:
        emit(about)
    else:
        say("\n".join(lines))


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


@dataclass(frozen=True)
class Subject:
    """What is asked about: a published size, or a checkpoint on disk with the weights it has."""

    name: str
    config: Config
    entries: Sequence[Entry] = ()  # of a checkpoint; none of a size
    local_kv_bits: int = 16

    def weights(self, bits: int | None, machine: Machine) -> int:
        """Bytes in memory at these bits; None: as the checkpoint is."""
        from ..checkpoint.memory import loaded_bytes, planned_bytes

        if bits is None:
            return loaded_bytes(self.entries, dtype_bytes=machine.dtype_bytes)
        return planned_bytes(self.config, bits, dtype_bytes=machine.dtype_bytes)

    def need(self, bits: int | None, machine: Machine, context: int, kv_bits: int) -> Estimate:
        from ..checkpoint.memory import estimate

        return estimate(
            self.config,
            self.weights(bits, machine),
            context=context,
            kv_bits=kv_bits,
            local_kv_bits=self.local_kv_bits,
            dtype_bytes=machine.dtype_bytes,
            fused=machine.metal,
        )

    def longest(self, bits: int | None, machine: Machine, kv_bits: int) -> int:
        """The longest context that fits; 0 for none."""
        from ..checkpoint.memory import largest_context

        return largest_context(
            self.config,
            self.weights(bits, machine),
            machine.budget,
            kv_bits=kv_bits,
            local_kv_bits=self.local_kv_bits,
            dtype_bytes=machine.dtype_bytes,
            fused=machine.metal,
        )


def _find(model: str, *, text_only: bool) -> Subject:
    """A path that exists is read, as everywhere; any other name is only asked for the size in it.

    Raises:
        SourceNotFound: no such path, and no size in the name.
    """
    from ..checkpoint.load import open_checkpoint
    from ..checkpoint.published import SIZES, size_in, size_of
    from ..checkpoint.source import resolve
    from ..checkpoint.weights import open_store

    try:
        exists = Path(model).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a NUL: `resolve` says which
        exists = True
    if exists:
        checkpoint = open_checkpoint(resolve(model, text_only=text_only), text_only=text_only)
        size = size_of(checkpoint.config)
        name = checkpoint.name + (f" ({size})" if size else "")
        return Subject(name, checkpoint.config, open_store(checkpoint).entries)
    if (size := size_in(model)) is None:
        sizes = ", ".join(SIZES).lower()
        raise SourceNotFound(repr(model), got="no such path, and no size in the name", want=f"{sizes}, or a path")
    return _published(size, text_only=text_only)


def _published(size: str, *, text_only: bool) -> Subject:
    from ..checkpoint.published import SIZES

    return Subject(size, replace(SIZES[size], vision=None) if text_only else SIZES[size])


def all_sizes(
    subjects: Sequence[Subject], machine: Machine, tokens: int | None, kv_bits: int, bits: int | None
) -> dict[str, Any]:
    """The longest context of every size at every number of bits; with `tokens`, whether these fit."""
    rows = []
    for subject in subjects:
        size = subject.name
        for each in (bits,) if bits else BITS:
            longest = subject.longest(each, machine, kv_bits)
            row = {"size": size, "bits": each, "weights": subject.weights(each, machine), "largest_context": longest}
            rows.append(row | ({"fits": longest >= tokens} if tokens else {}))
    return {"machine": asdict(machine), "kv_bits": kv_bits, "context": tokens, "sizes": rows}


def one(subject: Subject, machine: Machine, tokens: int | None, kv_bits: int, bits: int | None) -> dict[str, Any]:
    """The arithmetic for one model, the verdict, and the longest context of every other choice."""
    limit = subject.config.text.max_position_embeddings
    context = min(CONTEXT, limit) if tokens is None else tokens
    stored = bool(subject.entries)

    def fits(bits: int | None) -> bool:
        return subject.need(bits, machine, context, kv_bits).total <= machine.budget

    if bits is None and not stored:
        bits = next((each for each in BITS if fits(each)), BITS[-1])
    need = subject.need(bits, machine, context, kv_bits)
    offered = [*([None] if stored else []), *sorted({*BITS, bits or BITS[0]}, reverse=True)]
    choices = [
        {"bits": each, "kv_bits": kv, "largest_context": subject.longest(each, machine, kv)}
        for each in offered
        for kv in BITS
    ]
    return {
        "machine": asdict(machine),
        "model": subject.name,
        "limit": limit,
        "bits": bits,
        "kv_bits": kv_bits,
        "context": context,
        "parts": asdict(need) | {"working": need.working},
        "how": _explained(subject, machine, context, kv_bits),
        "total": need.total,
        "fits": need.total <= machine.budget,
        "largest_context": subject.longest(bits, machine, kv_bits),
        "choices": choices,
        "smaller": _smaller(subject, machine, context, kv_bits),
    }


def _smaller(subject: Subject, machine: Machine, context: int, kv_bits: int) -> dict[str, Any] | None:
    """The largest published size below this one that holds as much in this memory, in the most bits; None for none."""
    from ..checkpoint.published import SIZES

    for size in reversed(list(SIZES)):
        other = _published(size, text_only=subject.config.vision is None)
        other = replace(other, local_kv_bits=subject.local_kv_bits)
        for bits in BITS:
            less = other.weights(bits, machine) < subject.weights(bits, machine)
            if less and other.longest(bits, machine, kv_bits) >= context:
                return {"size": size, "bits": bits}
    return None


def _explained(subject: Subject, machine: Machine, context: int, kv_bits: int) -> dict[str, str]:
    """The factors of each part, as memory.py multiplies them."""
    from ..checkpoint.memory import hardest_read
    from ..model.cache import STEP, WindowCache
    from ..model.chunks import score_bytes

    config = subject.config
    text, kinds = config.text, config.text.layer_types
    global_layers = sum(text.is_global(layer) for layer in range(len(kinds)))
    row = f"layers x 2 x {text.num_key_value_heads} heads x {text.head_dim} x"
    size = machine.dtype_bytes
    both = {"kv_bits": kv_bits, "local_kv_bits": subject.local_kv_bits}
    at, chunk = hardest_read(config, context, **both, dtype_bytes=size, fused=machine.metal)
    room = -(-context // STEP) * STEP
    scores = score_bytes(config, at, chunk, kv_bits=kv_bits, dtype_bytes=size, fused=machine.metal)
    stored = {name: f"{bits} bits and scales" if bits < 16 else f"{size * 8} bits" for name, bits in both.items()}
    return {
        "kv_global": f"{global_layers} {row} {room:,} tokens, {stored['kv_bits']}",
        "kv_local": f"{len(kinds) - global_layers} {row} {WindowCache(text.sliding_window).capacity:,} tokens, "
        f"{stored['local_kv_bits']}",
        "prefill": f"{chunk:,} tokens at once"
        + (f", scores {text.num_attention_heads} heads x {chunk:,} x {at:,}" if scores else ""),
        "vision": f"{config.vision.num_attention_heads} heads x {config.vision.grid**2:,} patches squared"
        if config.vision
        else "",
    }


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f}"


def tokens_text(tokens: int) -> str:
    """128k, 47.2k, 512, or a dash for none."""
    if tokens < 1024:
        return str(tokens) if tokens else "-"
    return f"{int(tokens / 102.4) / 10:g}k"


def _machine_line(machine: dict[str, Any]) -> str:
    return (
        f"{machine['name']}, {_gib(machine['memory'])} GiB of memory: {_gib(machine['budget'])} GiB for the model "
        f"({machine['rule']})"
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
        _machine_line(machine),
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
    lines = [_machine_line(machine), "", f"{heading}:", *table(rows, "<><", headed=False), "", f"{heading}: {verdict}"]
    if not about["fits"]:
        lines += [f"would fit: {other}" for other in remedies(about)] or ["nothing of this size would"]
        if smaller := about["smaller"]:
            lines.append(f"smaller: {smaller['size']} in {_bits(smaller['bits'], machine)} fits")
    choices = about["choices"]
    cells = [["longest context", *(f"KV {_bits(bits, machine)}" for bits in BITS)]]
    for bits in dict.fromkeys(choice["bits"] for choice in choices):
        same = (choice["largest_context"] for choice in choices if choice["bits"] == bits)
        cells.append([_bits(bits, machine), *map(tokens_text, same)])
    return [*lines, "", *table(cells, "<>>>")]


def _bits(bits: int | None, machine: dict[str, Any]) -> str:
    """16 stands for what is not packed: 32 where the activations are float32."""
    if bits is None:
        return "as stored"
    return f"{bits if bits < 16 or machine['metal'] else 32} bits"


def remedies(about: dict[str, Any]) -> list[str]:
    """Options that make it fit: every single change that is enough, else the first pair of changes."""
    bits, kv, context = about["bits"], about["kv_bits"], about["context"]
    enough = [choice for choice in about["choices"] if choice["largest_context"] >= context]

    def words(choice: dict[str, Any]) -> str:
        changed = [f"--bits {choice['bits']}"] if choice["bits"] != bits else []
        return " ".join(changed + ([f"--kv-bits {choice['kv_bits']}"] if choice["kv_bits"] != kv else []))

    found = [words(choice) for choice in enough]
    singles = [option for option in found if option.count("--") == 1]
    if about["largest_context"]:
        singles.append(f"--context {about['largest_context']}")
    if singles:
        return singles
    best = max(about["choices"], key=lambda choice: choice["largest_context"])
    shorter = f"{words(best)} --context {best['largest_context']}".strip() if best["largest_context"] else ""
    return found[:1] or ([shorter] if shorter else [])

"""Which sizes, bits and contexts a machine has the memory for: the arithmetic, in plain types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..boundary.paths import may_exist
from ..checkpoint.entries import Entry
from ..checkpoint.load import open_checkpoint
from ..checkpoint.memory import (
    WEIGHT_BITS,
    Estimate,
    Machine,
    estimate,
    hardest_read,
    largest_context,
    loaded_bytes,
    other_mac,
    planned_bytes,
    share_of,
    share_of_entries,
    this_machine,
)
from ..checkpoint.published import SIZES, member_in, size_of
from ..checkpoint.source import resolve
from ..checkpoint.weights import open_store
from ..config import Config
from ..errors import OptionError, SourceNotFound
from ..model.cache import KV_BITS, STEP, WindowCache
from ..model.chunks import score_bytes
from ..model.shard import check_machines, fitting_machines

BITS = (16, 8, 4)  # that are offered; others may be asked for
CONTEXT = 8192  # asked about when nobody says


def fitting(
    model: str | None,
    *,
    context: int | None,
    kv_bits: int,
    local_kv_bits: int,
    bits: int | None,
    memory: float | None,
    text_only: bool,
    machines: int = 1,
) -> dict[str, Any]:
    """What fits: `one` for a model, `all_sizes` without one.

    Args:
        model: a size, a folder or a .gguf file.
        context: tokens to hold.
        bits: of the weights; None for what is stored, else the most that fit.
        memory: GiB of another Mac; None for this machine.
        machines: that share the model, each as this one.

    Raises:
        OptionError: bits that there are not, machines that the model does not divide among.
        SourceNotFound: no such path, and no size in the name.
    """
    for name, asked in (("--kv-bits", kv_bits), ("--local-kv-bits", local_kv_bits)):
        if asked not in KV_BITS:
            raise OptionError(name, got=asked, want="16, 8 or 4")
    if bits is not None and bits not in WEIGHT_BITS:
        raise OptionError("--bits", got=bits, want=", ".join(map(str, WEIGHT_BITS)))
    machine = this_machine() if memory is None else other_mac(memory)
    if model is None:
        many = {size: fitting_machines(config) for size, config in SIZES.items()}
        if not any(machines in numbers for numbers in many.values()):
            want = "; ".join(f"{' or '.join(map(str, numbers))} for {size}" for size, numbers in many.items())
            raise OptionError("--machines", got=machines, want=want)
        sizes = [
            replace(_published(size, text_only=text_only), local_kv_bits=local_kv_bits, machines=machines)
            for size, numbers in many.items()
            if machines in numbers
        ]
        return all_sizes(sizes, machine, context, kv_bits, bits)
    subject = replace(_find(model, text_only=text_only), local_kv_bits=local_kv_bits, machines=machines)
    check_machines(subject.config, machines)
    return one(subject, machine, context, kv_bits, bits)


@dataclass(frozen=True)
class Subject:
    """What is asked about: a published size, or a checkpoint on disk with the weights it has."""

    name: str
    config: Config
    entries: Sequence[Entry] = ()  # of a checkpoint; none of a size
    local_kv_bits: int = 16
    machines: int = 1  # that share it; figures are those of the first, which has the tower

    @property
    def share(self) -> Config:
        """What a machine computes of it."""
        return share_of(self.config, self.machines)

    def weights(self, bits: int | None, machine: Machine) -> int:
        """Bytes in memory at these bits; None: as the checkpoint is."""
        if bits is None:
            entries = share_of_entries(self.entries, self.config, self.machines)
            return loaded_bytes(entries, dtype_bytes=machine.dtype_bytes)
        return planned_bytes(self.config, bits, dtype_bytes=machine.dtype_bytes, machines=self.machines)

    def need(self, bits: int | None, machine: Machine, context: int, kv_bits: int) -> Estimate:
        return estimate(
            self.share,
            self.weights(bits, machine),
            context=context,
            kv_bits=kv_bits,
            local_kv_bits=self.local_kv_bits,
            dtype_bytes=machine.dtype_bytes,
            fused=machine.metal,
            unfused=machine.unfused,
        )

    def longest(self, bits: int | None, machine: Machine, kv_bits: int) -> int:
        """The longest context that fits; 0 for none."""
        return largest_context(
            self.share,
            self.weights(bits, machine),
            machine.budget,
            kv_bits=kv_bits,
            local_kv_bits=self.local_kv_bits,
            dtype_bytes=machine.dtype_bytes,
            fused=machine.metal,
            unfused=machine.unfused,
        )


def _find(model: str, *, text_only: bool) -> Subject:
    """A path that exists is read, as everywhere; any other name is only asked for the size in it.

    Raises:
        SourceNotFound: no such path, and no size in the name.
    """
    if may_exist(model):
        checkpoint = open_checkpoint(resolve(model, text_only=text_only), text_only=text_only)
        size = size_of(checkpoint.config)
        name = checkpoint.name + (f" ({size})" if size else "")
        return Subject(name, checkpoint.config, open_store(checkpoint).entries)
    if (found := member_in(model)) is None:
        sizes = ", ".join(SIZES).lower()
        raise SourceNotFound(repr(model), got="no such path, and no size in the name", want=f"{sizes}, or a path")
    size, config = found
    return Subject(size, replace(config, vision=None) if text_only else config)


def _published(size: str, *, text_only: bool) -> Subject:
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
    about = {"machine": asdict(machine), "machines": subjects[0].machines}
    return about | {"kv_bits": kv_bits, "context": tokens, "sizes": rows}


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
    about = {
        "machine": asdict(machine),
        "machines": subject.machines,
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
    return about | {"remedies": _remedies(about)}


def _smaller(subject: Subject, machine: Machine, context: int, kv_bits: int) -> dict[str, Any] | None:
    """The largest published size below this one that holds as much in this memory, in the most bits; None for none."""
    for size in reversed(list(SIZES)):
        other = _published(size, text_only=subject.config.vision is None)
        if subject.machines not in fitting_machines(other.config):
            continue
        other = replace(other, local_kv_bits=subject.local_kv_bits, machines=subject.machines)
        for bits in BITS:
            less = other.weights(bits, machine) < subject.weights(bits, machine)
            if less and other.longest(bits, machine, kv_bits) >= context:
                return {"size": size, "bits": bits}
    return None


def _explained(subject: Subject, machine: Machine, context: int, kv_bits: int) -> dict[str, str]:
    """The factors of each part, as memory.py multiplies them."""
    config = subject.share
    text, kinds = config.text, config.text.layer_types
    global_layers = sum(text.is_global(layer) for layer in range(len(kinds)))
    row = f"layers x 2 x {text.num_key_value_heads} heads x {text.head_dim} x"
    size = machine.dtype_bytes
    both = {"kv_bits": kv_bits, "local_kv_bits": subject.local_kv_bits}
    at, chunk = hardest_read(config, context, **both, dtype_bytes=size, fused=machine.metal, unfused=machine.unfused)
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


def _remedies(about: dict[str, Any]) -> list[str]:
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

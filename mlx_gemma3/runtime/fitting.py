"""Whether a model will fit into this machine's memory, asked before its weights are read."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.load import Checkpoint, open_checkpoint
from ..checkpoint.memory import (
    GIB,
    WEIGHT_BITS,
    cache_bytes,
    estimate,
    largest_context,
    loaded_bytes,
    planned_bytes,
    share_of,
    share_of_entries,
    this_machine,
    vision_bytes,
)
from ..checkpoint.source import resolve
from ..checkpoint.weights import open_store
from ..errors import MemoryNeedError

USUAL_CONTEXT = 4096  # what must fit when nobody says how long it will be


def check_memory(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    kv_bits: int,
    local_kv_bits: int,
    max_context: int | None,
    machines: int = 1,
) -> None:
    """Refuse a model that needs more memory than there is, and say what would fit.

    Args:
        machines: that share the model: of each its part must fit.

    Raises:
        MemoryNeedError: with the arithmetic, and other bits, cache bits or a context that fit.
    """
    machine = this_machine()
    dtype_bytes = {"float32": 4, "bfloat16": 2}.get(dtype, machine.dtype_bytes)
    config = share_of(checkpoint.config, machines)
    usual = min(USUAL_CONTEXT, config.text.max_position_embeddings)
    caches = sum(cache_bytes(config, usual, kv_bits=kv_bits, local_kv_bits=local_kv_bits, dtype_bytes=dtype_bytes))
    picture = vision_bytes(config, dtype_bytes=dtype_bytes, fused=machine.metal)
    if 8 * _file_bytes(checkpoint) + caches + picture + GIB < machine.budget and max_context is None:
        return  # far from the border: 4 bits would have to become 32 to reach it
    entries = share_of_entries(open_store(checkpoint).entries, checkpoint.config, machines)
    weights = loaded_bytes(entries, dtype_bytes=dtype_bytes)
    limit = config.text.max_position_embeddings
    context = min(max_context or USUAL_CONTEXT, limit)
    need = estimate(
        config,
        weights,
        context=context,
        kv_bits=kv_bits,
        local_kv_bits=local_kv_bits,
        dtype_bytes=dtype_bytes,
        fused=machine.metal,
        unfused=machine.unfused,
    )
    if need.total <= machine.budget:
        return
    would = []
    packed_kv = [(8, local_kv_bits), (4, local_kv_bits), (8, 8), (4, 4)] if config.text.head_dim % 64 == 0 else []
    for bits, local in packed_kv:
        if bits > kv_bits or local > local_kv_bits or (bits, local) == (kv_bits, local_kv_bits):
            continue
        smaller = estimate(
            config,
            weights,
            context=context,
            kv_bits=bits,
            local_kv_bits=local,
            dtype_bytes=dtype_bytes,
            fused=machine.metal,
            unfused=machine.unfused,
        )
        if smaller.total <= machine.budget:
            would.append(f"--kv-bits {bits}" + (f" --local-kv-bits {local}" if local != local_kv_bits else ""))
            break
    longest = largest_context(
        config,
        weights,
        machine.budget,
        kv_bits=kv_bits,
        local_kv_bits=local_kv_bits,
        dtype_bytes=dtype_bytes,
        fused=machine.metal,
        unfused=machine.unfused,
    )
    if 256 <= longest < context:
        would.append(f"--max-context {longest}")
    planned = {
        bits: planned_bytes(checkpoint.config, bits, dtype_bytes=dtype_bytes, machines=machines) for bits in WEIGHT_BITS
    }
    for bits, packed in planned.items():
        if packed >= weights:
            continue
        total = estimate(
            config,
            packed,
            context=context,
            kv_bits=kv_bits,
            local_kv_bits=local_kv_bits,
            dtype_bytes=dtype_bytes,
            fused=machine.metal,
            unfused=machine.unfused,
        )
        if bits < 16 and total.total <= machine.budget:
            would.append(f"the same converted with --bits {bits}")
            break
    raise MemoryNeedError(
        f"{checkpoint.name} at {context} tokens" + (f", a part of {machines}" if machines > 1 else ""),
        got=f"a need of {need.total / GIB:.1f} GiB (weights {need.weights / GIB:.1f}, caches {need.kv / GIB:.1f}, "
        f"work {(need.total - need.weights - need.kv) / GIB:.1f})",
        want=f"at most {machine.budget / GIB:.1f} GiB, what this machine has for it",
        do=("would fit: " + ", or ".join(would) if would else "take a smaller model") + "; --force tries all the same",
    )


def _file_bytes(checkpoint: Checkpoint) -> int:
    if checkpoint.gguf is not None:
        return sum(header.nbytes for header in checkpoint.gguf if header is not None)
    return sum(path.stat().st_size for path in checkpoint.path.glob("*.safetensors"))


def needed_bytes(
    source: str | Path, *, dtype: str = "auto", text_only: bool = False, quiet: bool = True,
    draft: str | Path | None = None, **_: object,
) -> int:  # fmt: skip
    """Bytes that a model's weights would take here, with its draft model's. Fetches them if need be.

    Raises:
        Gemma3Error: it cannot be found or understood.
    """
    checkpoint = open_checkpoint(resolve(source, text_only=text_only, quiet=quiet), text_only=text_only)
    dtype_bytes = {"float32": 4, "bfloat16": 2}.get(dtype, this_machine().dtype_bytes)
    more = 0 if draft is None else needed_bytes(draft, dtype=dtype, text_only=True, quiet=quiet)
    return loaded_bytes(open_store(checkpoint).entries, dtype_bytes=dtype_bytes) + more

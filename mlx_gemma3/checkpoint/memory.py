"""How much memory a model needs, and how much a machine has: the one place for this arithmetic. All sizes in bytes.

    total = weights + keys and values + working memory + logits + overhead

Weights and caches are exact (tests compare them with the arrays of loaded models). Working memory is a formula fitted
to peaks measured on MLX's CPU backend, on the upper side; docs/memory.md has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config import Config
from ..errors import OptionError
from ..model.cache import KV_BITS, KV_GROUP, STEP, WindowCache
from ..model.chunks import GRAIN, SCORE_BYTES, SHORTEST, UNFUSED, chunk_size, score_bytes, unfused_chunk
from ..model.device import memory_bytes, neural_accelerators
from ..model.gemma3 import Gemma3
from ..model.shard import Shard, check_machines
from .entries import Entry, Packing
from .safetensors import is_vision

GIB = 1 << 30
WEIGHT_BITS = (16, 8, 6, 5, 4, 3, 2)
# Python, the libraries and the vocabulary of 262,144 pieces: 128 MiB resident on Linux; as much again for Metal's.
OVERHEAD = 256 << 20
_NOT_EXACT = frozenset(("Q2_K", "Q3_K", "Q6_K"))  # ggml types that loading keeps as floats where nothing may be rounded


@dataclass(frozen=True)
class Estimate:
    """The parts of what a model needs at one context."""

    weights: int
    kv_global: int  # keys and values of the global layers
    kv_local: int  # and of the local ones
    prefill: int  # working memory while one chunk is read
    vision: int  # and while one picture goes through the tower; 0 without one
    logits: int
    overhead: int = OVERHEAD

    @property
    def kv(self) -> int:
        return self.kv_global + self.kv_local

    @property
    def working(self) -> int:
        """A picture is encoded before its chunk is read: the larger of the two."""
        return max(self.prefill, self.vision)

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.working + self.logits + self.overhead


def estimate(
    config: Config,
    weight_bytes: int,
    *,
    context: int,
    kv_bits: int = 16,
    local_kv_bits: int = 16,
    dtype_bytes: int = 2,
    chunk: int | None = None,
    fused: bool = True,
    unfused: int = UNFUSED,
) -> Estimate:
    """What a model needs in memory to hold `context` tokens, one sequence.

    Args:
        config: with `vision` for pictures; None there leaves the tower out.
        weight_bytes: from `loaded_bytes` or `planned_bytes`.
        context: tokens in the caches, prompt and answer.
        kv_bits: of the global layers' keys and values: 16 keeps the activations' own type, 8 and 4 pack groups.
        local_kv_bits: the same for the local layers.
        dtype_bytes: of the activations: 2 for bfloat16, 4 for float32.
        chunk: tokens read at once; None for `chunk_size` of every context on the way.
        fused: the device has fused attention for short heads (Metal); False where it has none (the CPU).
        unfused: tokens that it reads at once where attention is not fused (`Machine.unfused`).

    Raises:
        OptionError: a context that the model does not have, bits that caches do not come in.
    """
    text = config.text
    limit = text.max_position_embeddings
    if not 1 <= context <= limit:
        raise OptionError("context", got=context, want=f"1 to {limit} tokens, the positions of this model")
    for name, wanted in (("kv bits", kv_bits), ("local kv bits", local_kv_bits)):
        if wanted not in KV_BITS:
            raise OptionError(name, got=wanted, want="16, 8 or 4")
    bits = {"kv_bits": kv_bits, "local_kv_bits": local_kv_bits}
    if chunk is None:
        at, chunk = hardest_read(config, context, **bits, dtype_bytes=dtype_bytes, fused=fused, unfused=unfused)
    else:
        at, chunk = context, min(chunk, context)
    kv_global, kv_local = cache_bytes(config, context, **bits, dtype_bytes=dtype_bytes)
    return Estimate(
        weights=weight_bytes,
        kv_global=kv_global,
        kv_local=kv_local,
        prefill=prefill_bytes(config, at, chunk, **bits, dtype_bytes=dtype_bytes, fused=fused),
        vision=vision_bytes(config, dtype_bytes=dtype_bytes, fused=fused),
        logits=4 * text.vocab_size,  # one row, float32: the head runs on the last position only
    )


def cache_bytes(
    config: Config, context: int, *, kv_bits: int = 16, local_kv_bits: int = 16, dtype_bytes: int = 2
) -> tuple[int, int]:
    """Keys and values of the global layers, and of the local ones, as model/cache.py allocates them.

    A layer holds 2 * K * D numbers a token. A global one has room for `context` tokens, rounded up to its step of 256;
    a local one for W - 1 + min(W, 256), whatever the context. A number of 16 bits is one of the activations' type; of
    8 or 4 bits it takes bits / 8 bytes and its share of a scale and a bias: 2 * dtype_bytes / 64.
    """
    text = config.text
    global_layers = sum(text.is_global(layer) for layer in range(text.num_hidden_layers))
    row = 2 * text.num_key_value_heads * text.head_dim
    room = -(-context // STEP) * STEP
    local_room = WindowCache(text.sliding_window).capacity
    return (
        _stored(global_layers * row * room, kv_bits, dtype_bytes),
        _stored((text.num_hidden_layers - global_layers) * row * local_room, local_kv_bits, dtype_bytes),
    )


def _stored(numbers: int, bits: int, dtype_bytes: int) -> int:
    """So many numbers of a cache, packed or not."""
    if bits == 16:
        return numbers * dtype_bytes
    return numbers * bits // 8 + numbers * 2 * dtype_bytes // KV_GROUP


def hardest_read(
    config: Config,
    context: int,
    *,
    kv_bits: int = 16,
    local_kv_bits: int = 16,
    dtype_bytes: int = 2,
    fused: bool = True,
    unfused: int = UNFUSED,
) -> tuple[int, int]:
    """(tokens, chunk) of the read that needs most memory on the way to `context`.

    With more tokens the chunk gets smaller in steps, so the hardest read stands at the end of one of the steps.
    """
    row = score_bytes(config, 1, 1, kv_bits=kv_bits, local_kv_bits=local_kv_bits, dtype_bytes=dtype_bytes)
    steps = range(SHORTEST, unfused + 1, GRAIN)
    ends = {min(context, SCORE_BYTES // (row * chunk)) for chunk in steps} if row else set()

    def chunk(tokens: int) -> int:
        bits = {"kv_bits": kv_bits, "local_kv_bits": local_kv_bits}
        return min(tokens, chunk_size(config, tokens, **bits, dtype_bytes=dtype_bytes, unfused=unfused))

    def need(tokens: int) -> int:
        bits = {"kv_bits": kv_bits, "local_kv_bits": local_kv_bits}
        return prefill_bytes(config, tokens, chunk(tokens), **bits, dtype_bytes=dtype_bytes, fused=fused)

    hardest = max(sorted({context, *ends}), key=need)
    return hardest, chunk(hardest)


def prefill_bytes(
    config: Config,
    context: int,
    chunk: int,
    *,
    kv_bits: int = 16,
    local_kv_bits: int = 16,
    dtype_bytes: int = 2,
    fused: bool = True,
) -> int:
    """Working memory while the last chunk is read: scores + mask + growth + moved + rows.

    mask: chunk * context bytes. growth: the keys and values of one global layer, copied when its buffer grows.
    moved: a local buffer that is full is joined with the chunk before its newest rows move to the front; MLX lets go
    of these only when the whole chunk is done, so there is one for each local layer.
    rows: the chunk inside a layer, `_row_bytes` a token, and 4 copies of its keys as float32.
    """
    text = config.text
    q_size, kv_size = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    scores = score_bytes(
        config, context, chunk, kv_bits=kv_bits, local_kv_bits=local_kv_bits, dtype_bytes=dtype_bytes, fused=fused
    )
    growth = _stored(2 * kv_size * context, kv_bits, dtype_bytes)
    room = WindowCache(text.sliding_window).capacity
    moves = 0 if context <= room else sum(not text.is_global(layer) for layer in range(text.num_hidden_layers))
    moved = _stored(moves * 2 * kv_size * (room + chunk), local_kv_bits, dtype_bytes)
    rows = _row_bytes(text.intermediate_size, text.hidden_size, q_size) + 4 * 4 * kv_size
    return scores + chunk * context + growth + moved + chunk * rows


def vision_bytes(config: Config, *, dtype_bytes: int = 2, fused: bool = True) -> int:
    """Working memory for one picture: the rows, and heads * patches^2 scores where attention is not fused."""
    vision = config.vision
    if vision is None:
        return 0
    patches = vision.grid**2
    rows = _row_bytes(vision.intermediate_size, vision.hidden_size, vision.hidden_size)
    scores = 0 if fused else vision.num_attention_heads * patches**2 * dtype_bytes
    return scores + patches * rows


def _row_bytes(inner: int, hidden: int, heads: int) -> int:
    """Bytes a token inside one layer: the MLP's 5, the norms' 10 and the heads' 7 copies that live at once, measured.

    All as float32, which norms and GELU compute in, also where the activations are bfloat16.
    """
    return 4 * (5 * inner + 10 * hidden + 7 * heads)


def largest_context(
    config: Config,
    weight_bytes: int,
    budget: int,
    *,
    kv_bits: int = 16,
    local_kv_bits: int = 16,
    dtype_bytes: int = 2,
    fused: bool = True,
    unfused: int = UNFUSED,
) -> int:
    """The longest context that fits into `budget` bytes, in steps of 256 tokens; 0 when not even one step does."""
    limit = config.text.max_position_embeddings

    def fits(steps: int) -> bool:
        need = estimate(
            config,
            weight_bytes,
            context=min(steps * STEP, limit),
            kv_bits=kv_bits,
            local_kv_bits=local_kv_bits,
            dtype_bytes=dtype_bytes,
            fused=fused,
            unfused=unfused,
        )
        return need.total <= budget

    low, high = 0, -(-limit // STEP)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return min(low * STEP, limit)


@cache
def parameter_shapes(config: Config, machines: int = 1) -> Mapping[str, tuple[int, ...]]:
    """Every parameter of this model by canonical name, or of the part on the first of several machines.

    Taken from a model whose arrays are never computed.
    """
    model = Gemma3(config, Shard(0, machines))
    return {name: array.shape for name, array in tree_flatten(model.parameters())}


def share_of(config: Config, machines: int) -> Config:
    """What the first of several machines computes, as a config for `estimate`; its logits are whole. See shard.py.

    Raises:
        OptionError: the model does not divide among so many.
    """
    check_machines(config, machines)
    text, shard = config.text, Shard(0, machines)
    heads, kv, inner = shard.heads(text), len(shard.kv_range(text)), text.intermediate_size // machines
    own = replace(text, num_attention_heads=heads, num_key_value_heads=kv, intermediate_size=inner)
    return replace(config, text=own)


def share_of_entries(entries: Iterable[Entry], config: Config, machines: int) -> list[Entry]:
    """What the first of several machines, which has the tower, holds of a checkpoint."""
    shard, own = Shard(0, machines), []
    for entry in entries:
        shape = list(entry.shape)
        if (cut := shard.cut(entry.name, entry.shape, config.text)) is not None:
            shape[cut[0]] = cut[1].stop - cut[1].start
        own.append(replace(entry, shape=tuple(shape)))
    return own


def planned_bytes(config: Config, bits: int, *, group_size: int = 64, dtype_bytes: int = 2, machines: int = 1) -> int:
    """Weights of this model once converted to `bits`, as `convert --bits` packs them, in memory.

    Packed are the matrices of the decoder, its embedding and head; the vision tower, the projector and the norms stay
    plain. 16 bits pack nothing.

    Args:
        machines: that share it; the weights are those of the first.

    Raises:
        OptionError: bits that MLX does not pack, a number of machines that the model does not divide among.
    """
    if bits not in WEIGHT_BITS:
        raise OptionError("bits", got=bits, want=", ".join(map(str, WEIGHT_BITS)))
    total = 0
    for name, shape in parameter_shapes(config, machines).items():
        packs = bits < 16 and len(shape) == 2 and name.endswith(".weight") and not is_vision(name)
        packing = Packing(bits, group_size) if packs and shape[1] % group_size == 0 else None
        total += _held(shape, packing, dtype_bytes)
    return total


def loaded_bytes(entries: Iterable[Entry], *, dtype_bytes: int = 2) -> int:
    """Weights of a checkpoint once loaded: packed stays packed, every float (scales too) gets the activations' type.

    In float32 a GGUF's Q2_K, Q3_K and Q6_K are floats too (gguf.py: `read_tensors`).
    """
    plain = _NOT_EXACT if dtype_bytes == 4 else frozenset()
    return sum(_held(entry.shape, None if entry.kind in plain else entry.packing, dtype_bytes) for entry in entries)


def _held(shape: tuple[int, ...], packing: Packing | None, dtype_bytes: int) -> int:
    """numbers * dtype_bytes; packed: numbers * bits / 8, and for each group a scale and a bias (affine) or one byte."""
    numbers = math.prod(shape)
    if packing is None:
        return numbers * dtype_bytes
    extra = 2 * dtype_bytes if packing.mode == "affine" else 1
    return numbers * packing.bits // 8 + numbers // packing.group_size * extra


@dataclass(frozen=True)
class Machine:
    """A computer, and how much of its memory a model may take."""

    name: str
    memory: int
    budget: int
    rule: str  # how the budget follows from the memory
    metal: bool = True
    neural: bool = False  # M5's neural accelerators

    @property
    def unfused(self) -> int:
        """Tokens that are read at once there, where attention is not fused."""
        return unfused_chunk(self.budget, metal=self.metal, neural=self.neural)

    @property
    def dtype_bytes(self) -> int:
        """Of the activations that `load_model` chooses there: bfloat16 on a GPU, float32 on the CPU."""
        return 2 if self.metal else 4


def this_machine() -> Machine:
    """The machine this runs on. With Metal its own word for what the GPU may use, else three quarters of all memory."""
    if mx.metal.is_available():
        info = mx.device_info(mx.Device(mx.gpu))
        memory = int(info["memory_size"])
        budget = int(info["max_recommended_working_set_size"])
        name, neural = str(info.get("device_name", "this Mac")), neural_accelerators()
        return Machine(name, memory, budget, "what Metal recommends at most", neural=neural)
    memory = memory_bytes()
    return Machine("this machine", memory, memory * 3 // 4, "three quarters of its memory; no Metal, float32", False)


def other_mac(gib: float) -> Machine:
    """A Mac of so many GiB, by the rule that Metal's recommendation was seen to follow; Apple documents none.

    Two thirds below 36 GiB, three quarters from there: logs of llama.cpp and MLX programs report 5.3 of 8, 10.67 of
    16, 21.33 of 32, 27 of 36, 48 of 64 and 72 of 96 GiB. macOS 26 gives more on large ones (107.5 of 128).

    Raises:
        OptionError: not a size of memory.
    """
    if not (math.isfinite(gib) and gib > 0):
        raise OptionError("memory", got=gib, want="GiB of memory, as 16")
    memory = int(gib * GIB)
    low = gib < 36
    rule = f"{'two thirds' if low else 'three quarters'} of its memory, as Metal was seen to recommend"
    return Machine("a Mac", memory, memory * 2 // 3 if low else memory * 3 // 4, rule)

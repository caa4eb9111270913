"""How many tokens of a prompt are read at once: the one rule, for generation and for the arithmetic of memory.

Where attention is not fused its scores are real memory, heads * chunk * keys numbers. Of heads of 256, Metal's kernels
read many queries only with the neural accelerators of M5 and 1,024 queries or more (MLX 0.32.4,
scaled_dot_product_attention.cpp: `use_fallback`); no kernel reads packed rows.
"""

from __future__ import annotations

from ..config import Config

SCORE_BYTES = 1 << 30  # of one layer, at most
FUSED_HEAD = 128
LONGEST, SHORTEST, GRAIN = 2048, 32, 32  # tokens
UNFUSED, UNFUSED_ROOMY = 512, 1024  # with scores in memory; the longer one where there is room, or M5 fuses it
NEURAL_QUERIES = 1024  # from which M5 fuses heads of 256
ROOMY = 20 << 30  # bytes that a model may take: Macs of 32 GB and more


def score_bytes(
    config: Config,
    context: int,
    chunk: int,
    *,
    kv_bits: int = 16,
    local_kv_bits: int = 16,
    dtype_bytes: int = 2,
    fused: bool = True,
) -> int:
    """The largest score matrix of a layer while the last `chunk` of `context` tokens is read; 0 where all are fused.

    MLX keeps one at a time: masking and softmax work in place. A local layer sees at most W - 1 + chunk keys.

    Args:
        fused: the device has fused attention for short heads (Metal); False where it has none (the CPU).
    """
    text = config.text
    short = fused and text.head_dim <= FUSED_HEAD
    keys = 0 if short and kv_bits == 16 else context
    if not (short and local_kv_bits == 16):
        keys = max(keys, min(context, text.sliding_window - 1 + chunk))
    return text.num_attention_heads * chunk * keys * dtype_bytes


def unfused_chunk(budget: int, *, metal: bool, neural: bool) -> int:
    """Tokens to read at once with scores in memory, on this device.

    Args:
        budget: bytes that a model may take there.
        neural: it has M5's neural accelerators, which fuse heads of 256 from 1,024 queries on.
    """
    return UNFUSED_ROOMY if metal and (neural or budget >= ROOMY) else UNFUSED


def chunk_size(
    config: Config,
    context: int,
    *,
    kv_bits: int = 16,
    local_kv_bits: int = 16,
    dtype_bytes: int = 2,
    unfused: int = UNFUSED,
    left: int = 0,
    fused_from: int = 0,
) -> int:
    """Tokens to read at once when there are `context` in all: at most SCORE_BYTES of scores, whatever the context.

    2048; with scores in memory `unfused`, or as many (in steps of 32, at least 32) as keep them under the bound.

    Args:
        left: tokens that are still to be read.
        fused_from: queries from which this device fuses heads of 256, in 16 bits; 0: never. So many at least are read
            while there are so many left: they have no scores in memory.
    """
    fused = config.text.head_dim <= FUSED_HEAD and kv_bits == 16
    chunk = LONGEST if fused else unfused

    def scores(chunk: int) -> int:
        return score_bytes(
            config, context, chunk, kv_bits=kv_bits, local_kv_bits=local_kv_bits, dtype_bytes=dtype_bytes
        )

    while chunk > SHORTEST and scores(chunk) > SCORE_BYTES:
        chunk -= GRAIN
    joined = kv_bits == local_kv_bits == 16 and dtype_bytes == 2 and fused_from and left >= fused_from
    return max(chunk, fused_from) if joined else chunk

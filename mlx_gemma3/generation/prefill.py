"""Read a prompt in chunks that cut no picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ..errors import ContextError, OptionError
from ..model.cache import Caches
from ..model.chunks import chunk_size
from ..model.device import release
from ..model.runner import Runner
from .choice import Score

Progress = Callable[[int, int], None]  # tokens read, tokens in all
Spans = Sequence[tuple[int, int]]  # half-open ranges of the image tokens of each picture, in order


def usual_chunk(runner: Runner, caches: Caches, context: int) -> int:
    """Tokens to read at once when there are `context` in all; see model/chunks.py."""
    bits = {layer.window is None: layer.bits for layer in caches}
    return chunk_size(
        runner.config,
        context,
        kv_bits=bits.get(True, 16),
        local_kv_bits=bits.get(False, 16),
        dtype_bytes=runner.dtype.size,
        unfused=runner.unfused_chunk,
        left=context - caches.offset,
        fused_from=runner.fused_from,
    )


def image_runs(spans: Spans) -> list[tuple[int, int]]:
    """Blocks as attention sees them: spans that touch are one."""
    runs: list[tuple[int, int]] = []
    for start, stop in spans:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return runs


def spans_within(spans: Spans, begin: int, end: int) -> dict[int, tuple[int, int]]:
    """The spans that lie in a range of tokens by their number, each counted from the range's begin."""
    return {
        number: (start - begin, stop - begin)
        for number, (start, stop) in enumerate(spans)
        if begin <= start and stop <= end
    }


def chunk_end(begin: int, length: int, spans: Spans, chunk: int) -> int:
    """Where a chunk of at most `chunk` tokens from `begin` on ends, never inside an image block.

    A border that would fall into a block moves to the block's start; a block that is longer than the chunk, right at
    its start, is read whole.

    Args:
        length: tokens in all.
        spans: blocks that touch are one block (one attention mask).
        chunk: at least 1.
    """
    if chunk < 1:
        raise OptionError("prefill chunk", got=chunk, want=">= 1")
    end = min(begin + chunk, length)
    for start, stop in image_runs(spans):
        if start < end < stop:
            end = start if start > begin else stop
    return end


def prefill_chunks(length: int, spans: Spans, chunk: int) -> list[tuple[int, int]]:
    """All chunks of a prompt: half-open ranges that cover 0 to `length`. See `chunk_end`."""
    pieces: list[tuple[int, int]] = []
    begin = 0
    while begin < length:
        end = chunk_end(begin, length, spans, chunk)
        pieces.append((begin, end))
        begin = end
    return pieces


def read_chunk(
    runner: Runner,
    tokens: Sequence[int],
    caches: Caches,
    features: Sequence[mx.array] = (),
    spans: Spans = (),
    *,
    last: bool,
    ahead: bool = False,
    score: Score | None = None,
    following: Sequence[int] = (),
) -> mx.array | None:
    """Read the tokens that follow what the caches hold; they are computed when this returns, or see `ahead`.

    Args:
        features: (T, D) of each picture of these tokens, in order.
        spans: where these stand among these tokens. An image token elsewhere is text.
        last: the prompt ends here.
        score: takes the likelihoods of `following`, the tokens after each of these; at the prompt's end one less.
        ahead: return while a GPU computes, so that the next chunk is prepared meanwhile; `settle` waits.

    Returns:
        (1, V) float32 logits after the last token where `last`, else None.
    """
    ids = np.array([tokens], dtype=np.int32)
    rows = mx.stack(list(features)) if features else None
    hidden = runner.read(ids, rows, caches, last_only=score is None, spans=spans)
    logits = runner.head(hidden[:, -1:])[:, -1] if last else None
    settle(caches)  # two chunks in work would need twice the memory
    caches.unsettled = hidden if logits is None else logits  # not their arrays: the next write would copy what is held
    mx.async_eval(caches.arrays, caches.unsettled)
    if score is not None:
        score.add(runner, hidden, following)
    if last or not (ahead and runner.ahead):
        settle(caches)
    return logits


def settle(caches: Caches) -> None:
    """Wait for the chunk that is being computed, if there is one. What went wrong in it is raised here."""
    if caches.unsettled is not None:
        unsettled, caches.unsettled = caches.unsettled, None
        mx.eval(unsettled)
        release()  # scores and keys of this chunk fit no later one


def prefill(
    runner: Runner,
    tokens: Sequence[int],
    caches: Caches,
    *,
    features: Sequence[mx.array] = (),
    spans: Spans = (),
    chunk: int | None = None,
) -> mx.array:
    """Read a whole prompt: (1, V) float32 logits after its last token.

    Args:
        tokens: the ids that follow what the caches hold.
        features: (T, D) from `encode_images` for each of `spans`, in order.
        spans: of the image tokens of each picture within `tokens`.
        chunk: tokens at once; None for the usual.

    Raises:
        ContextError: no tokens, or more than the model has positions.
    """
    check_length(len(tokens), caches.offset + len(tokens), runner.config.text.max_position_embeddings)
    logits, begin, context = None, 0, caches.offset + len(tokens)
    while begin < len(tokens):
        end = chunk_end(begin, len(tokens), spans, chunk or usual_chunk(runner, caches, context))
        inside = spans_within(spans, begin, end)
        logits = read_chunk(
            runner,
            tokens[begin:end],
            caches,
            [features[number] for number in inside],
            list(inside.values()),
            last=end == len(tokens),
            ahead=True,
        )
        begin = end
    assert logits is not None
    return logits


def check_length(new: int, total: int, limit: int) -> None:
    """Refuse a prompt that cannot be read. Raises ContextError."""
    if not new:
        raise ContextError("prompt", got="no tokens", want="at least one")
    if total > limit:
        raise ContextError("prompt", got=f"{total} tokens", want=f"at most {limit}", do="shorten the prompt")

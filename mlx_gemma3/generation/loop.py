"""Read the prompt in chunks, then write one token after another.

While the host looks at a token a GPU already works on the next: each step is issued before the one before is read.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Sequence

import mlx.core as mx
import numpy as np

from ..errors import ContextError, OptionError
from ..model.cache import Caches
from ..model.gemma3 import Gemma3
from .sampling import Sampling, penalise, sample

SCORE_BYTES = 1 << 30
Progress = Callable[[int, int], None]  # tokens read, tokens in all


def chunk_size(model: Gemma3, keys: int, caches: Caches) -> int:
    """Tokens to read at once when there are `keys` tokens in all.

    Where attention is not fused (Metal has no fused prefill for heads of 256, nor over packed rows) the scores are real
    memory, heads * chunk * keys numbers: at most SCORE_BYTES of them, whatever the context.
    """
    text = model.config.text
    if text.head_dim <= 128 and all(layer.keys.bits == 16 for layer in caches):
        return 2048
    row = text.num_attention_heads * keys * model.language_model.norm.weight.dtype.size
    return max(32, min(512, SCORE_BYTES // row // 32 * 32))


def image_runs(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Blocks as attention sees them: spans that touch are one."""
    runs: list[tuple[int, int]] = []
    for start, stop in spans:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return runs


def prefill_chunks(length: int, spans: Sequence[tuple[int, int]], chunk: int) -> list[tuple[int, int]]:
    """Cut `length` tokens into pieces of at most `chunk`, never inside an image block.

    A border that would fall into a block moves to the block's start; a block that is longer than what is left of the
    chunk, right at its start, is read whole.

    Args:
        length: tokens in all.
        spans: half-open ranges of image tokens, in order; blocks that touch are one block (one attention mask).
        chunk: at least 1.

    Returns:
        Half-open ranges that cover 0 to length.
    """
    if chunk < 1:
        raise OptionError("prefill chunk", got=chunk, want=">= 1")
    blocks = image_runs(spans)
    pieces, begin = [], 0
    while begin < length:
        end = min(begin + chunk, length)
        for start, stop in blocks:
            if start < end < stop:
                end = start if start > begin else stop
        pieces.append((begin, end))
        begin = end
    return pieces


def prefill(
    model: Gemma3,
    tokens: Sequence[int],
    caches: Caches,
    *,
    features: Sequence[mx.array] = (),
    spans: Sequence[tuple[int, int]] = (),
    chunk: int | None = None,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> mx.array | None:
    """Read a prompt into the caches.

    Args:
        tokens: the ids that follow what the caches hold.
        features: (T, D) from `encode_images` for each of `spans`, in order.
        spans: half-open ranges of the image tokens of each picture within `tokens`.
        chunk: tokens at once; None for `chunk_size`.
        progress: called with (read, total) before the first chunk and after each.
        cancelled: asked between chunks.

    Returns:
        (1, V) float32 logits after the last token; None when cancelled.

    Raises:
        ContextError: more tokens than the model has positions.
    """
    limit = model.config.text.max_position_embeddings
    if not tokens:
        raise ContextError("prompt", got="no tokens", want="at least one")
    if caches.offset + len(tokens) > limit:
        raise ContextError(
            "prompt", got=f"{caches.offset + len(tokens)} tokens", want=f"at most {limit}", do="shorten the prompt"
        )
    ids = np.array([tokens], dtype=np.int32)
    chunk = chunk or chunk_size(model, caches.offset + len(tokens), caches)
    logits = None
    if progress is not None:
        progress(0, len(tokens))
    for begin, end in prefill_chunks(len(tokens), spans, chunk):
        if cancelled():
            return None
        inside = [rows for rows, (start, stop) in zip(features, spans, strict=True) if begin <= start and stop <= end]
        hidden = model.read(ids[:, begin:end], mx.stack(inside) if inside else None, caches, last_only=True)
        if end == len(tokens):
            logits = model.head(hidden)[:, -1]
            mx.eval(logits)
        mx.eval(caches.arrays)
        if progress is not None:
            progress(end, len(tokens))
    return logits


def decode(
    model: Gemma3,
    logits: mx.array,
    caches: Caches,
    *,
    prompt: Sequence[int] = (),
    sampling: Sampling,
    max_tokens: int,
) -> Generator[int, None, None]:
    """Write at most `max_tokens` tokens, and never more than the model has positions.

    Args:
        logits: (1, V) float32 after the prompt, from `prefill`.
        prompt: the ids before the answer, for the repetition penalty.

    Yields:
        One id at a time. The caller stops at an end id by closing the iterator; a step that was already issued is lost.
    """
    room = model.config.text.max_position_embeddings - caches.offset
    count = min(max_tokens, room)
    penalty = sampling.repetition_penalty
    seen = mx.zeros(logits.shape, dtype=mx.bool_)
    if penalty != 1 and prompt:
        seen[:, mx.array(sorted(set(prompt)))] = True
    key = None
    if sampling.temperature > 0:
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(64)
        key = mx.random.key(seed)

    def choose(logits: mx.array) -> mx.array:
        nonlocal key, seen
        now = None
        if key is not None:
            key, now = mx.random.split(key)
        if penalty == 1:
            return sample(logits, sampling, now)
        token = sample(penalise(logits, seen, penalty), sampling, now)
        seen = mx.put_along_axis(seen, token[:, None], mx.array(True), axis=-1)
        return token

    if count < 1:
        return

    def following() -> mx.array:
        made = choose(model.step(token, caches))
        mx.async_eval(made)
        return made

    token = choose(logits)
    mx.async_eval(token)
    for written in range(1, count + 1):
        more = written < count
        early = following() if more and model.ahead else None
        mx.eval(token)
        yield int(np.asarray(token)[0])
        if more:
            token = early if early is not None else following()

"""Who may attend to whom: the only place that builds an attention mask.

Rows are queries, columns keys, `#` may attend. Six tokens, t text, i one picture's block (i i i), window W = 3:

    global layer                 local layer
          t t i i i t                  t t i i i t
        t # . . . . .                t # . . . . .
        t # # . . . .                t # # . . . .
        i # # # # # .                i # # # # # .      ahead inside the block: always
        i # # # # # .                i . # # # # .      behind: at most W - 1 back
        i # # # # # .                i . . # # # .
        t # # # # # #                t . . . # # #

global = causal OR same block; local = (causal OR same block) AND key > query - W.
Source: transformers 5.23, modeling_gemma3.py:697-755 and masking_utils.py:95; Google's gemma_pytorch agrees.

An embedding model sees both sides; on a global layer everything, on a local one, W = 3, W - 1 keys to each side:

      # # # . . .
      # # # # . .
      # # # # # .
      . # # # # #
      . . # # # #
      . . . # # #
"""

from __future__ import annotations

import mlx.core as mx


def attention_mask(
    length: int,
    offset: int,
    key_count: int,
    *,
    window: int | None = None,
    blocks: mx.array | None = None,
    padding: mx.array | None = None,
) -> mx.array | str | None:
    """The mask for `length` queries at positions offset, offset + 1, … over the last `key_count` keys.

    Args:
        length: L, queries of this call.
        offset: position of the first query, padding counted.
        key_count: S, keys at hand; the last one stands at position offset + L - 1.
        window: W on a local layer, None on a global one.
        blocks: (B, L) int, 0 for text, the number of its block for an image token; None when there is none.
            Blocks never reach into earlier calls, so only this call's tokens are numbered.
        padding: (B,) leading pad tokens of each row; None when no row has any.

    Returns:
        None when every query sees every key, "causal" for the plain triangle (both have fused kernels),
        else bool (B or 1, 1, L, S).
    """
    if window is not None and key_count <= window:
        window = None  # every key at hand is inside the window
    if blocks is None and padding is None and window is None:
        return None if length == 1 else "causal"
    queries = mx.arange(offset, offset + length)[:, None]  # (L, 1)
    keys = mx.arange(offset + length - key_count, offset + length)[None]  # (1, S)
    allowed = (keys <= queries)[None]  # (1, L, S)
    if blocks is not None:
        before = mx.zeros((blocks.shape[0], key_count - length), dtype=blocks.dtype)
        key_blocks = mx.concatenate([before, blocks], axis=1)[:, None]  # (B, 1, S)
        query_blocks = blocks[:, :, None]  # (B, L, 1)
        allowed = allowed | ((query_blocks == key_blocks) & (query_blocks > 0))
    if window is not None:
        allowed = allowed & (keys > queries - window)
    if padding is not None:
        # A pad query keeps itself, or its row would be all -inf and spread NaN through its values.
        allowed = (allowed & (keys[None] >= padding[:, None, None])) | (keys == queries)
    return allowed[:, None]  # (B, 1, L, S)


def two_sided_mask(queries: range, keys: range, window: int) -> mx.array | None:
    """Of an embedding model's local layer: |query - key| < window.

    Args:
        queries, keys: their positions in one text, without gaps.
        window: W.

    Returns:
        bool (1, 1, len(queries), len(keys)); None when every query sees every key.
    """
    if max(queries.stop - 1 - keys.start, keys.stop - 1 - queries.start) < window:
        return None
    apart = mx.arange(queries.start, queries.stop)[:, None] - mx.arange(keys.start, keys.stop)[None]
    return (mx.abs(apart) < window)[None, None]

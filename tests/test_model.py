"""The model against itself: masks as drawn, cached = uncached, batch = single, and what it refuses."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from random_model import IMAGE, PER_IMAGE, WINDOW, random_model, random_pictures, tiny_config, tokens_with_pictures

from mlx_gemma3.errors import OptionError, PromptError
from mlx_gemma3.generation.prefill import prefill, prefill_chunks
from mlx_gemma3.model.cache import GlobalCache, WindowCache, keys_and_values
from mlx_gemma3.model.gemma3 import Gemma3
from mlx_gemma3.model.layers import RMSNorm, gelu_tanh
from mlx_gemma3.model.masks import attention_mask
from mlx_gemma3.model.runner import Runner

NEAR = 1e-4  # float32, logits of a few units: what another order of summation may cost


@pytest.fixture(scope="module")
def model() -> Gemma3:
    return random_model(tiny_config())


def drawn(mask: mx.array) -> list[str]:
    return ["".join("#" if seen else "." for seen in row) for row in mask[0, 0].tolist()]


def test_masks_are_the_ones_drawn_in_the_docstring() -> None:
    blocks = mx.array([[0, 0, 1, 1, 1, 0]])
    far = attention_mask(6, 0, 6, blocks=blocks)
    near = attention_mask(6, 0, 6, blocks=blocks, window=3)
    assert isinstance(far, mx.array) and isinstance(near, mx.array)
    assert drawn(far) == ["#.....", "##....", "#####.", "#####.", "#####.", "######"]
    assert drawn(near) == ["#.....", "##....", "#####.", ".####.", "..###.", "...###"]


def test_a_window_of_w_is_the_query_and_w_minus_1_keys_before_it() -> None:
    mask = attention_mask(1, 9, 10, window=4)
    assert isinstance(mask, mx.array) and drawn(mask) == ["......####"]


def test_blocks_do_not_see_later_blocks() -> None:
    mask = attention_mask(5, 0, 5, blocks=mx.array([[1, 1, 0, 2, 2]]))
    assert isinstance(mask, mx.array) and drawn(mask) == ["##...", "##...", "###..", "#####", "#####"]


def test_a_later_chunk_sees_the_block_behind_it_causally() -> None:
    mask = attention_mask(3, 4, 7, blocks=mx.array([[0, 1, 1]]))
    assert isinstance(mask, mx.array) and drawn(mask) == ["#####..", "#######", "#######"]


def test_padding_hides_the_pad_keys_and_leaves_no_empty_row() -> None:
    mask = attention_mask(4, 0, 4, padding=mx.array([2, 0]))
    assert isinstance(mask, mx.array)
    assert drawn(mask) == ["#...", ".#..", "..#.", "..##"] and drawn(mask[1:])[1] == "##.."


def test_plain_triangles_need_no_mask_array() -> None:
    assert attention_mask(5, 0, 5) == "causal" == attention_mask(5, 3, 8, window=8)
    assert attention_mask(1, 7, 8) is None is attention_mask(1, 7, 8, window=8)


def test_norm_forms_one_plus_weight_in_float32() -> None:
    """In bfloat16 1 + 0.001 is 1: the weight would be lost."""
    norm = RMSNorm(256, 1e-6)
    norm.weight = mx.full((256,), 0.003, dtype=mx.bfloat16)
    x = mx.random.normal((4, 256), key=mx.random.key(0))
    exact = x * mx.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    got, rounded = norm(x), exact * (1 + norm.weight).astype(mx.float32)
    assert mx.allclose(got, exact * (1 + norm.weight.astype(mx.float32)), atol=1e-6)
    assert not mx.allclose(got, rounded, atol=1e-3)


def test_gelu_is_the_tanh_form() -> None:
    x = np.linspace(-6, 6, 101)
    erf = 0.5 * x * (1 + np.array([math.erf(v / math.sqrt(2)) for v in x]))
    got = np.array(gelu_tanh(mx.array(x.astype(np.float32))))
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    assert abs(got - tanh).max() < 1e-6 and abs(got - erf).max() > 1e-4


PLANS = ["t" * 5, "t" * 45, "I", "tttItt", "IttI", "tIItt", "tttIttItttI" + "t" * 12, "t" * 7 + "I" + "t" * 20]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunked_and_cached_is_whole_and_uncached(model: Gemma3, plan: str, chunk: int) -> None:
    ids, spans = tokens_with_pictures(plan)
    pixels = random_pictures(len(spans)) if spans else None
    whole = np.array(model([ids], pixels))
    caches, start = model.make_caches(), 0
    for begin, end in prefill_chunks(len(ids), spans, chunk):
        inside = [n for n, (a, b) in enumerate(spans) if begin <= a and b <= end]
        part = model([ids[begin:end]], pixels[inside] if inside else None, caches)  # type: ignore[index]
        assert np.abs(np.array(part) - whole[:, begin:end]).max() < NEAR
        start = end
    assert start == len(ids) == caches.offset


def test_decoding_is_the_uncached_model_far_past_the_window_and_the_cache_steps(model: Gemma3) -> None:
    ids, spans = tokens_with_pictures("tItt")
    pixels, caches = random_pictures(1), model.make_caches()
    logits = prefill(Runner(model), ids, caches, features=list(model.encode_images(pixels)), spans=spans)
    more = np.random.default_rng(1).integers(4, 58, 120).tolist()
    for count, token in enumerate(more):
        logits = Runner(model).step(mx.array([token]), [caches])
        if count % 17 == 0 or count == 119:
            whole = model([ids + more[: count + 1]], pixels, last_only=True)
            assert mx.abs(logits - whole[:, -1]).max() < NEAR


def test_a_local_cache_has_a_fixed_size_and_a_global_one_grows_in_steps() -> None:
    near, far = WindowCache(8), GlobalCache()
    sizes = set()
    for length in (1, 5, 30, 1, 1, 200, 1, 300, 7):
        block = mx.ones((1, 2, length, 4))  # one head, of keys and of values
        (keys,), _ = keys_and_values(near.append(block))
        assert keys.shape[2] <= 7 + length and keys.shape[2] >= min(near.offset, 7 + length if length > 1 else 8)
        far.append(block)
        sizes.add(near.parts[0].shape[2])
    assert sizes == {near.capacity} and near.capacity == 23
    assert far.offset == 546 and far.parts[0].shape[2] == 768


def test_a_batch_of_several_lengths_is_each_prompt_alone(model: Gemma3) -> None:
    prompts = [tokens_with_pictures(plan, seed=n) for n, plan in enumerate(("tItttt", "t" * 33, "ttIttIt"))]
    length = max(len(ids) for ids, _ in prompts)
    padding = [length - len(ids) for ids, _ in prompts]
    rows = [[0] * pad + ids for pad, (ids, _) in zip(padding, prompts, strict=True)]
    pixels, at, solo = random_pictures(3), 0, []
    for ids, spans in prompts:
        solo.append(np.array(model([ids], pixels[at : at + len(spans)] if spans else None))[0])
        at += len(spans)
    together = np.array(model(rows, pixels, padding=padding))
    for pad, alone, batched in zip(padding, solo, together, strict=True):
        assert np.abs(batched[pad:] - alone).max() < NEAR
    caches = model.make_caches(padding=padding)
    logits = model(rows, pixels, caches, last_only=True)[:, -1]
    assert np.abs(np.array(logits) - np.stack([row[-1] for row in solo])).max() < NEAR
    for _ in range(20):
        token = mx.argmax(logits[:, :58], axis=-1)  # text only: the uncached run would ask for a picture
        rows = [[*row, int(t)] for row, t in zip(rows, token.tolist(), strict=True)]
        logits = model(token[:, None], caches=caches)[:, 0]
    whole = model(rows, pixels, padding=padding, last_only=True)[:, -1]
    assert mx.abs(logits - whole).max() < NEAR


def test_image_attention_is_bidirectional_inside_its_block_only(model: Gemma3) -> None:
    """A change in a picture's last rows reaches its first token, but no token before the picture."""
    ids, (span,) = tokens_with_pictures("tttItt")
    pixels = random_pictures(1)
    other = pixels.copy()
    other[:, -7:] *= -1
    moved = np.abs(np.array(model([ids], pixels)) - np.array(model([ids], other))).max(axis=(0, 2))
    assert (moved[: span[0]] == 0).all() and moved[span[0]] > 1e-3


def test_image_rows_replace_text_rows_and_are_not_scaled(model: Gemma3) -> None:
    ids, (span,) = tokens_with_pictures("tIt")
    pixels = random_pictures(1)
    rows = model.embed([ids], model.encode_images(pixels))[0][0]
    text = model.language_model.embed(mx.array([ids]))[0]
    assert mx.allclose(rows[span[0] : span[1]], model.encode_images(pixels)[0])
    assert mx.array_equal(rows[: span[0]], text[: span[0]]) and mx.array_equal(rows[span[1] :], text[span[1] :])


def test_several_pictures_are_encoded_as_each_alone(model: Gemma3) -> None:
    pixels = random_pictures(3)
    together = model.encode_images(pixels)
    for n in range(3):
        assert mx.allclose(together[n], model.encode_images(pixels[n : n + 1])[0], atol=1e-6)


def test_a_step_never_reads_its_token() -> None:
    """As in the reference, an image id that the model wrote is text."""
    model = random_model(tiny_config())
    caches = model.make_caches()
    model([[2, 5]], caches=caches)
    logits = Runner(model).step(mx.array([IMAGE]), [caches])
    assert logits.shape == (1, 64) and mx.isfinite(logits).all()


@pytest.mark.parametrize(
    ("tokens", "pictures", "what"),
    [
        ([[2, IMAGE, 5]], None, "image tokens"),
        ([[2, *[IMAGE] * 4, 5]], None, "image tokens"),
        ([[2, *[IMAGE] * 4, 5]], 2, "image tokens"),
        ([[2, *[IMAGE] * 3, 5, IMAGE]], 1, "image block"),
        ([[2, 5]], 1, "image tokens"),
        ([[2, 64]], None, "token id"),
        ([[-1]], None, "token id"),
        ([2, 5], None, "tokens"),
        ([[]], None, "tokens"),
        ([[2.5]], None, "tokens"),
    ],
)
def test_what_cannot_be_computed_is_refused(model: Gemma3, tokens: list, pictures: int | None, what: str) -> None:
    caches = model.make_caches()
    with pytest.raises(PromptError, match=what) as caught:
        model(tokens, random_pictures(pictures) if pictures else None, caches)
    assert "\n" not in str(caught.value) and caches.offset == 0 and not caches.ends_in_image


def test_a_block_that_goes_on_in_the_next_call_is_refused(model: Gemma3) -> None:
    """Two pictures with nothing between are one block in the reference: cutting them apart would change the answer."""
    caches = model.make_caches()
    model([[2, *[IMAGE] * PER_IMAGE]], random_pictures(1), caches)
    with pytest.raises(PromptError, match="image block"):
        model([[IMAGE] * PER_IMAGE], random_pictures(1), caches)
    model([[59]], caches=caches)
    model([[58, *[IMAGE] * PER_IMAGE]], random_pictures(1), caches)


def test_pictures_of_a_wrong_size_or_for_a_text_model_are_refused(model: Gemma3) -> None:
    ids, _ = tokens_with_pictures("I")
    with pytest.raises(PromptError, match=r"pixels: got \(1, 14, 14, 3\)"):
        model([ids], np.zeros((1, 14, 14, 3), np.float32))
    with pytest.raises(PromptError, match="text-only"):
        random_model(tiny_config(vision=False))([[2]], random_pictures(1))
    with pytest.raises(OptionError, match="padding"):
        model([[2, 5]], padding=[-1])


def test_an_untied_head_is_used() -> None:
    tied = tiny_config(vision=False)
    config = type(tied)(**{**tied.__dict__, "tie_word_embeddings": False})
    model = random_model(config)
    hidden = Runner(model).read([[2, 5, 9]])
    assert mx.allclose(model([[2, 5, 9]]), hidden @ model.lm_head.weight.T, atol=1e-5)
    assert not mx.allclose(model([[2, 5, 9]]), hidden @ model.language_model.embed_tokens.weight.T, atol=1e-1)


def test_logits_are_float32_whatever_the_weights() -> None:
    model = random_model(tiny_config())
    model.set_dtype(mx.bfloat16)
    logits = model([[2, 5, 9]], last_only=True)
    assert logits.dtype == mx.float32 and logits.shape == (1, 1, 64)
    assert Runner(model).read([[2, 5]]).dtype == mx.bfloat16 and model.config.text.sliding_window == WINDOW

"""Two checkpoints on the same words and pictures: perplexity of each, and how far apart their predictions are.

    text ─ ids ─ windows ┐
                         ├─ both models, a prefill chunk at a time ─ heads on a few rows ─ one line of numbers a token
    pictures ─ prompts ──┘

Logits of a whole text would be 1 MiB a token and model, so the heads run on slices of SLICE numbers, both models on the
same rows, and of each slice only its scores stay. Knows nothing of quantisation: any two checkpoints with one
vocabulary can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..checkpoint.load import Checkpoint
from ..errors import OptionError, PromptError, TokenizerError
from ..generation.prefill import prefill, prefill_chunks
from ..prompt.processor import Processor, Prompt
from ..prompt.vocabulary import END_OF_TURN, START_OF_IMAGE
from .opened import MIN_TOKENS, Opened, check_vocabularies, open_model, read_text, text_ids, with_adapter
from .scores import Distance, Evaluation, Scores
from .vectors import compared

if TYPE_CHECKING:
    from ..prompt.processor import Picture

__all__ = ["Evaluation", "Opened", "evaluate", "open_model", "read_text", "text_ids"]

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much (0, 0: not counted)

CHUNK = 512  # tokens read at once: attention's scores over a whole window would be real memory
SLICE = 1 << 24  # logits of one model at once: 64 tokens of Gemma 3's vocabulary, 64 MiB
ANSWER_TOKENS = 32  # of the reference's greedy answer about each picture
QUESTION = "Describe this picture."
OPENING = "This picture shows"  # for checkpoints that complete and do not answer


def evaluate(
    model: str | Path | Checkpoint | Opened,
    *,
    text: str = "",
    against: str | Path | Checkpoint | Opened | None = None,
    adapter: str | Path | None = None,
    against_adapter: str | Path | None = None,
    images: Sequence[Picture] = (),
    window: int = 2048,
    max_tokens: int | None = None,
    dtype: str = "auto",
    text_only: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a checkpoint on a text, and with `against` how far it is from another one.

    Of embedding models, both of them, each paragraph of the text is a document, and what counts is the cosine between
    its two vectors.

    Perplexity is that of every token of the text, each counted once: a window's first token after <bos> alone, its
    n-th after <bos> and the n - 1 before it. Names of control tokens in the text are plain characters. Of each picture
    the words of its prompt count, and those of the greedy answer that `against` gives; never the picture's own rows.

    Args:
        model: alias, folder, Hub id, .gguf, or what `open_model` returned.
        text: may be left out where there are pictures.
        against: the reference; the divergence is KL(against || model). The same name as `model` is loaded once.
        adapter, against_adapter: folders of adapters, for the model and for the reference.
        images: paths, bytes of files or Pillow images; they need `against`.
        window: tokens that are read together, without any of the text before; at most the models' positions.
        max_tokens: only the text's first ones.
        dtype: of the models that are loaded here, as in `load_model`.
        text_only: leave vision towers out, as without `images`, which it does not go with.
        progress: called before and during the work.

    Raises:
        PromptError: the text has fewer than 16 tokens, or a picture for a checkpoint without vision.
        OptionError: a setting out of range, pictures without `against`.
        TokenizerError: the two vocabularies differ.
        Gemma3Error: what loading either raises.
    """
    tell: Progress = progress or (lambda what, done, total: None)
    if window < 1 or (max_tokens is not None and max_tokens < MIN_TOKENS):
        name, got, least = ("window", window, 1) if window < 1 else ("max_tokens", max_tokens, MIN_TOKENS)
        raise OptionError(name, got=got, want=f">= {least}")
    if isinstance(images, str | bytes | Path):
        raise OptionError("images", got=type(images).__name__, want="a list of pictures")
    if images and against is None:
        raise OptionError("pictures", got=len(images), want="another checkpoint as well, to compare with (against)")
    if images and text_only:
        raise OptionError("pictures", got=f"{len(images)} and text_only", want="one or the other")
    if not text and not images:
        raise PromptError("text", got="nothing", want="a text, or pictures", do="give a file with --text")
    if against is None and against_adapter is not None:
        raise OptionError("against_adapter", got=against_adapter, want="another checkpoint as well (against)")
    subjects: list[Opened] = []
    plain: Opened | None = None
    for source, own in ((model, adapter),) if against is None else ((model, adapter), (against, against_adapter)):
        if isinstance(source, Opened):
            plain = source
        elif plain is None or source != model:
            tell(f"loading {source.name if isinstance(source, Checkpoint) else source}", 0, 0)
            plain = open_model(source, dtype=dtype, text_only=not images)
        assert plain is not None
        subjects.append(plain if own is None else with_adapter(plain, own, text_only=not images))
    if any(subject.runner.config.embedder is not None for subject in subjects):
        return _of_embedders(subjects, text, images, tell)
    size = min(subject.runner.config.text.vocab_size for subject in subjects)
    if against is not None:
        check_vocabularies(*subjects)
    window = min(window, *(subject.runner.config.text.max_position_embeddings for subject in subjects))
    return Evaluation(
        model=subjects[0].name,
        against=subjects[1].name if against is not None else None,
        window=window,
        words=_on_text(subjects, size, text, window, max_tokens, tell) if text else None,
        pictures=_on_pictures(subjects, size, images, tell) if images else None,
        notes=tuple(note for subject in subjects for note in subject.notes),
    )


def _of_embedders(subjects: Sequence[Opened], text: str, images: Sequence[Picture], tell: Progress) -> Evaluation:
    """The cosine between the vectors of two embedding models."""
    if len(subjects) < 2:
        do = "give the plain checkpoint with --against (against=…)"
        raise OptionError("evaluate", got="one embedding model", want="another to compare its vectors with", do=do)
    if images:
        raise PromptError("pictures", got="an embedding model", want="a text")
    model, reference = ((subject.runner, subject.tokenizer) for subject in subjects)
    return Evaluation(
        model=subjects[0].name,
        against=subjects[1].name,
        window=0,
        words=None,
        pictures=None,
        vectors=compared(model, reference, text, lambda done, total: tell("texts", done, total)),
        notes=tuple(note for subject in subjects for note in subject.notes),
    )


def _on_text(
    subjects: Sequence[Opened], size: int, text: str, window: int, max_tokens: int | None, tell: Progress
) -> Scores:
    ids, *others = (text_ids(subject.tokenizer, text) for subject in subjects)
    if any(other != ids for other in others):
        raise TokenizerError("token ids of the text", got="two ways to merge", want="the same from both checkpoints")
    ids = ids[:max_tokens]
    tally = _Tally(subjects, size, lambda done: tell("text", done, len(ids)))
    bos = subjects[-1].runner.config.bos_token_id
    for begin in range(0, len(ids), window):
        piece = ids[begin : begin + window]
        tally.read([bos, *piece[:-1]], np.array(piece))
    return tally.scores()


def _on_pictures(subjects: Sequence[Opened], size: int, images: Sequence[Picture], tell: Progress) -> Scores:
    model, reference = subjects
    _check_vision(model, reference)
    tally = _Tally(subjects, size)
    for number, picture in enumerate(images):
        tell("pictures", number, len(images))
        prompt = _picture_prompt(reference, picture)
        tokens = [*prompt.tokens, *_greedy(reference, prompt)]
        of_picture = np.array(tokens) == reference.runner.config.image_token_id
        targets = np.where(of_picture[:-1] | of_picture[1:], -1, tokens[1:])
        tally.read(tokens[:-1], targets, pixels=prompt.pixels, spans=prompt.spans)
    tell("pictures", len(images), len(images))
    return tally.scores()


def _check_vision(model: Opened, reference: Opened) -> None:
    """Both see, and see pictures of one size in as many tokens."""
    views = []
    for subject in (model, reference):
        config = subject.runner.config
        if config.vision is None:
            raise PromptError("pictures", got=f"{subject.name}, which is text-only", want="two checkpoints that see")
        views.append((config.vision.image_size, config.mm_tokens_per_image, config.image_token_id))
    if views[0] != views[1]:
        raise PromptError(
            f"pictures of {model.name} and {reference.name}",
            got=" and ".join(f"{side} pixels in {count} tokens of id {token}" for side, count, token in views),
            want="the same",
        )


def _picture_prompt(subject: Opened, picture: Picture) -> Prompt:
    processor = Processor(subject.tokenizer, subject.runner.config)
    if not subject.instruct:
        return processor.prepare(f"{START_OF_IMAGE}{OPENING}", [picture])
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    return processor.prepare([{"role": "user", "content": content}], [picture])


def _greedy(subject: Opened, prompt: Prompt) -> list[int]:
    """The greedy answer, the token that ends it included."""
    runner, answer = subject.runner, list[int]()
    ends = {*runner.config.eos_token_ids, *([subject.tokenizer.id(END_OF_TURN)] if subject.instruct else [])}
    caches = runner.make_caches(adapter=subject.adapter)
    features = list(runner.encode_images(prompt.pixels, subject.adapter)) if prompt.pixels is not None else []
    logits = prefill(runner, prompt.tokens, caches, features=features, spans=prompt.spans)
    while len(answer) < ANSWER_TOKENS:
        token = mx.argmax(logits, axis=-1).astype(mx.int32)
        answer.append(int(np.asarray(token)[0]))
        if answer[-1] in ends:
            break
        logits = runner.step(token, [caches])
    return answer


class _Tally:
    """Scores of the tokens read so far, by one model or by a model and its reference."""

    def __init__(self, subjects: Sequence[Opened], size: int, tell: Callable[[int], None] | None = None) -> None:
        self.runners = [subject.runner for subject in subjects]
        self.adapters = [subject.adapter for subject in subjects]
        self.size = size  # ids that both models have; a few without a piece may follow in one of them
        self.tell = tell or (lambda done: None)
        self.parts: list[list[NDArray[Any]]] = []  # a slice: loss; against a reference also loss, divergence, …
        self.count = 0

    def read(
        self,
        tokens: Sequence[int],
        targets: NDArray[np.int64],
        *,
        pixels: NDArray[np.float32] | None = None,
        spans: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Read one context and score it.

        Args:
            tokens: L ids.
            targets: (L,) the id that comes after each; -1 where none is scored.
            pixels: (N, S, S, 3), the pictures of the image tokens `spans`.
        """
        ids = np.array([tokens], dtype=np.int32)
        each = list(zip(self.runners, self.adapters, strict=True))
        caches = [runner.make_caches(adapter=adapter) for runner, adapter in each]
        features = [
            runner.encode_images(pixels, adapter) if pixels is not None else None for runner, adapter in each
        ]  # (N, T, D)
        for begin, end in prefill_chunks(len(tokens), spans, CHUNK):
            inside = [n for n, (start, stop) in enumerate(spans) if begin <= start and stop <= end]
            rows = []
            for runner, own, seen in zip(self.runners, caches, features, strict=True):
                pictures = seen[mx.array(inside)] if seen is not None and inside else None
                rows.append(runner.read(ids[:, begin:end], pictures, own))  # (1, l, D)
                mx.eval(rows[-1], own.arrays)
            self._score(rows, targets[begin:end])

    def _score(self, rows: Sequence[mx.array], targets: NDArray[np.int64]) -> None:
        places = np.flatnonzero(targets >= 0)
        step = max(1, SLICE // self.size)
        for start in range(0, len(places), step):
            chosen = places[start : start + step]
            logits = [
                runner.head(own[:, mx.array(chosen)])[0, :, : self.size]
                for runner, own in zip(self.runners, rows, strict=True)
            ]
            scores = slice_scores(mx.array(targets[chosen]), *logits)
            mx.eval(scores)
            self.parts.append([np.array(values) for values in scores])
            self.count += len(chosen)
            self.tell(self.count)

    def scores(self) -> Scores:
        loss, *others = (np.concatenate(values) for values in zip(*self.parts, strict=True))
        if not others:
            return Scores(loss, None)
        reference, divergence, agree, difference = others
        return Scores(loss, Distance(reference, divergence, agree, float(difference.max())))


def slice_scores(targets: mx.array, logits: mx.array, reference: mx.array | None = None) -> list[mx.array]:
    """What is kept of R positions.

    Args:
        targets: (R,) the ids that came.
        logits, reference: (R, V) float32; changed by neither.

    Returns:
        (R,) arrays: the model's loss, that is -log p(target), in nats; with a reference also its loss, the divergence
        KL(reference || model), whether the likeliest token is the same, and the largest difference of a logit.
    """
    largest, _, total = _powers(logits)
    loss = mx.log(total) + largest - _at(logits, targets)
    if reference is None:
        return [loss]
    reference_largest, reference_powers, reference_total = _powers(reference)
    apart = reference - logits
    # Of close distributions this is exact to 1e-7; the difference of the two logarithms would not be.
    shift = mx.log(reference_total / total) + (reference_largest - largest)
    divergence = _sum(reference_powers * (apart - shift[:, None])) / reference_total
    return [
        loss,
        mx.log(reference_total) + reference_largest - _at(reference, targets),
        mx.maximum(divergence, 0.0),  # below 0 by rounding only
        mx.argmax(logits, axis=-1) == mx.argmax(reference, axis=-1),
        mx.abs(apart).max(axis=-1),
    ]


def _powers(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """(R, V) → the largest of each row (R,), e to what each is below that (R, V), and the sum of these (R,)."""
    largest = logits.max(axis=-1)
    powers = mx.exp(logits - largest[:, None])
    return largest, powers, _sum(powers)


def _sum(x: mx.array) -> mx.array:
    """(R, V) → (R,), in two steps: one long float32 sum over a vocabulary is off by 1e-5, as much as 8 bits are."""
    rows, size = x.shape
    blocks = size // 512
    return x[:, : blocks * 512].reshape(rows, blocks, 512).sum(axis=-1).sum(axis=-1) + x[:, blocks * 512 :].sum(axis=-1)


def _at(logits: mx.array, ids: mx.array) -> mx.array:
    """(R, V) and (R,) → (R,): of each row the entry of its id."""
    return mx.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]

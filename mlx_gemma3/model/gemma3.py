"""The whole model: ids and pixels to logits.

    tokens ─ embed × sqrt(D) ──────────────┐
                                           ├─ gather rows ─ decoder layers ─ norm ─ head ─ logits
    pixels ─ SigLIP ─ pool ─ norm ─ @ W ───┘

Image rows replace the rows at image tokens after the text rows were scaled, and are themselves not scaled
(transformers 5.23, modeling_gemma3.py:864-876).
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import Config
from ..errors import PromptError
from . import embedder
from .cache import Caches, check_padding
from .context import Chunk, Texts
from .layers import Linear
from .shard import WHOLE, Shard, check_machines
from .text import TextModel
from .vision import PLAIN, Projector, TowerKernels, VisionTower


class Gemma3(nn.Module):
    """Gemma 3 of any size, with or without the vision tower (`config.vision`): the rule, as plain modules.

    runner.py runs it on a device.
    """

    def __init__(self, config: Config, shard: Shard = WHOLE) -> None:
        """
        Args:
            config: of the whole model.
            shard: the part of it that this machine holds.

        Raises:
            OptionError: the model does not divide among so many machines.
        """
        super().__init__()
        check_machines(config, shard.size)
        self.config, self.shard = config, shard
        self.language_model = TextModel(config.text, shard)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.text.hidden_size, len(shard.vocabulary(config.text)), bias=False)
        if config.vision is not None and shard.rank == 0:
            self.vision_tower = VisionTower(config.vision)
            self.multi_modal_projector = Projector(config, config.vision)
        if config.embedder is not None and config.embedder.dense:
            self.dense = [Linear(one.inputs, one.outputs, bias=one.bias) for one in config.embedder.dense]

    def make_caches(
        self, *, padding: Sequence[int] | None = None, kv_bits: int = 16, local_kv_bits: int = 16
    ) -> Caches:
        """Empty caches for one run over a batch.

        Args:
            padding: leading pad tokens of each row, for prompts of several lengths; None for none.
            kv_bits: how global layers store keys and values: 16 (the activations' own dtype), 8 or 4.
            local_kv_bits: the same for local layers, whose caches are small anyway.

        Raises:
            OptionError: other bits, or a head_dim that cannot be packed.
        """
        return Caches(self.config, padding=padding, kv_bits=kv_bits, local_kv_bits=local_kv_bits)

    def __call__(
        self,
        tokens: mx.array | np.ndarray | Sequence[Sequence[int]],
        pixels: mx.array | np.ndarray | None = None,
        caches: Caches | None = None,
        last_only: bool = False,
        *,
        padding: Sequence[int] | None = None,
    ) -> mx.array:
        """Logits for the next token after each token, or after the last one only.

        Image tokens attend to all of their own block, so a call holds whole blocks and the pictures of its own tokens.

        Args:
            tokens: (B, L) int32.
            pixels: (N, S, S, 3) float32 in [-1, 1], the pictures of these tokens, row by row; None without pictures.
            caches: from `make_caches`; None reads the tokens alone, from position 0.
            last_only: the head runs on the last position alone.
            padding: leading pad tokens of each row when there are no caches (caches carry their own).

        Returns:
            (B, L or 1, V) float32.

        Raises:
            PromptError: image tokens and pictures do not match, a block is cut by the call's end, or an id is not
                in the vocabulary; an embedding model.
        """
        check_writes(self.config)
        self._check_pixels(pixels)
        features = self.encode_images(pixels) if pixels is not None and len(pixels) else None
        rows, blocks = self.embed(tokens, features, caches)
        padding = caches.padding if caches is not None else check_padding(padding)
        context = Chunk(rows.shape[1], caches, blocks, padding)
        return self.head(self.language_model(rows, context, last_only=last_only))

    def embed(
        self,
        tokens: mx.array | np.ndarray | Sequence[Sequence[int]],
        features: mx.array | None = None,
        caches: Caches | None = None,
        spans: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        """The rows that the decoder reads. Looks at `tokens` on the host, so they cannot be lazy for free.

        Args:
            tokens: (B, L) int32.
            features: (N, T, D) from `encode_images`, the pictures of these tokens; None without pictures.
            caches: what was read before; they note whether these tokens end in an image block.
            spans: where the pictures stand in a single sequence, as half-open ranges in order: an image token that the
                model itself wrote is text. None: every image token belongs to a picture.

        Returns:
            (B, L, D), and (B, L) int32 image blocks, 0 for text; None when there is no image token.

        Raises:
            PromptError: see `__call__`.
        """
        ids, image, blocks = self.place(tokens, 0 if features is None else features.shape[0], caches, spans)
        return self.rows(ids, image, features), mx.array(blocks) if blocks is not None else None

    def place(
        self,
        tokens: mx.array | np.ndarray | Sequence[Sequence[int]],
        pictures: int,
        caches: Caches | None = None,
        spans: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """What `embed` looks at on the host, before anything is computed; arguments and errors are its.

        Args:
            pictures: N.

        Returns:
            (B, L) ids, (B, L) bool: a picture's rows go there, (B, L) int32 image blocks or None.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 2 or 0 in ids.shape or ids.dtype.kind not in "iu":
            raise PromptError("tokens", got=f"{ids.dtype} of shape {ids.shape}", want="integers (B, L), L >= 1")
        image = ids == self.config.image_token_id
        if spans is not None:
            image &= _inside(spans, ids.shape[1])
        return ids, image, self._image_blocks(ids, image, pictures, caches)

    def rows(self, ids: np.ndarray, image: np.ndarray, features: mx.array | None) -> mx.array:
        """(B, L, D) rows of what `place` returned."""
        rows = self.language_model.embed(mx.array(ids.astype(np.int32)))
        return rows if features is None or not image.any() else _replace_rows(rows, features, image)

    def head(self, hidden: mx.array) -> mx.array:
        """(B, L, D) → (B, L, V) float32: the embedding, unscaled, or lm_head where the checkpoint has its own."""
        tied = self.config.tie_word_embeddings
        logits = self.language_model.embed_tokens.as_linear(hidden) if tied else self.lm_head(hidden)
        return self.shard.logits(logits, self.config.text).astype(mx.float32)

    def vectors(self, texts: Sequence[Sequence[int]], skipped: Sequence[int] | None = None) -> mx.array:
        """The vectors of an embedding model (`config.embedder`).

        Args:
            texts: N lists of token ids, with all that stands around a text; none is empty.
            skipped: how many first tokens of each do not count in its mean; None for none.

        Returns:
            (N, E) float32.

        Raises:
            PromptError: an id that is not in the vocabulary.
        """
        assert self.config.embedder is not None, "no embedding model"
        lengths = [len(ids) for ids in texts]
        rows, _ = self.embed([[token] for ids in texts for token in ids])  # (T, 1, D)
        hidden = self.language_model(rows, Texts(lengths))
        means = embedder.pooled(hidden, lengths, skipped or [0] * len(lengths))
        return embedder.finished(means, self.config.embedder, self.get("dense", []))

    def encode_images(self, pixels: mx.array | np.ndarray, kernels: TowerKernels = PLAIN) -> mx.array:
        """(N, S, S, 3) float32 in [-1, 1] → (N, T, D) rows.

        One picture after another: the score matrix of one is already patches² a head.
        """
        pixels = mx.array(pixels)
        rows = [
            self.multi_modal_projector(self.vision_tower(pixels[n : n + 1], kernels), kernels)
            for n in range(pixels.shape[0])
        ]
        return mx.concatenate(rows)

    def _check_pixels(self, pixels: mx.array | np.ndarray | None) -> None:
        if pixels is None:
            return
        if self.config.vision is None:
            raise PromptError("pictures", got=len(pixels), want="none", do="this checkpoint is text-only")
        size = self.config.vision.image_size
        if tuple(pixels.shape[1:]) != (size, size, 3):
            raise PromptError("pixels", got=tuple(pixels.shape), want=f"(N, {size}, {size}, 3)")

    def _image_blocks(self, ids: np.ndarray, image: np.ndarray, count: int, caches: Caches | None) -> np.ndarray | None:
        """Number the image blocks of each row: (B, L) int32, 0 for text; None when there is no image token.

        A block is a maximal run of image tokens (modeling_gemma3.py:686-694). Refuses what cannot be computed
        exactly: pictures and image tokens that do not match, and blocks that this call holds only a part of.
        """
        config = self.config
        if ids.min() < 0 or ids.max() >= config.text.vocab_size:
            wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise PromptError("token id", got=wrong, want=f"0 to {config.text.vocab_size - 1}")
        if config.vision is None:
            return None
        per_image = config.mm_tokens_per_image
        if image.sum() != count * per_image:
            raise PromptError(
                "image tokens",
                got=f"{image.sum()} for {count} pictures",
                want=f"{per_image} a picture, each block whole within one call",
            )
        starts = image & ~np.pad(image, ((0, 0), (1, 0)))[:, :-1]
        blocks = np.where(image, starts.cumsum(axis=1), 0).astype(np.int32)
        cut = any((np.bincount(numbers)[1:] % per_image).any() for numbers in blocks)
        if cut or (caches is not None and caches.ends_in_image and image[:, 0].any()):
            raise PromptError(
                "image block", got="a part of it", want="the whole block in one call", do="cut the prompt elsewhere"
            )
        if caches is not None:
            caches.ends_in_image = bool(image[:, -1].any())
        return blocks if image.any() else None


def check_writes(config: Config) -> None:
    """Refuse to write with an embedding model, which has no head. Raises PromptError."""
    if config.text.bidirectional:
        raise PromptError(
            "answer",
            got="an embedding model, which writes nothing",
            want="a generative checkpoint",
            do="ask this one for vectors: mlx-gemma3 embed, engine.embed, /v1/embeddings",
        )


def _inside(spans: Sequence[tuple[int, int]], length: int) -> np.ndarray:
    """(length,) bool: true inside the spans."""
    inside = np.zeros(length, dtype=bool)
    for start, stop in spans:
        inside[start:stop] = True
    return inside


def _replace_rows(rows: mx.array, features: mx.array, image: np.ndarray) -> mx.array:
    """Put the image rows, in order, where `image` is true: one gather by index.

    Args:
        rows: (B, L, D) scaled text rows.
        features: (N, T, D).
        image: (B, L) bool, N * T of them true.
    """
    index = np.arange(image.size).reshape(image.shape)
    index[image] = image.size + np.arange(int(image.sum()))
    both = mx.concatenate([rows.flatten(0, 1), features.astype(rows.dtype).flatten(0, 1)])
    return both[mx.array(index)]

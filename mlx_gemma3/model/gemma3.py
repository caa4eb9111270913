"""The whole model: ids and pixels to logits.

    tokens ─ embed × sqrt(D) ──────────────┐
                                           ├─ gather rows ─ decoder layers ─ norm ─ head ─ logits
    pixels ─ SigLIP ─ pool ─ norm ─ @ W ───┘

Image rows replace the rows at image tokens after the text rows were scaled, and are themselves not scaled
(transformers 5.23, modeling_gemma3.py:864-876).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import Config
from ..errors import PromptError
from . import cpu
from .attention import attend_all_padded
from .cache import Caches, check_padding
from .layers import Linear, gelu_tanh
from .lean import Kernels, LeanText, Matrix, gpu_kernels
from .text import TextModel
from .vision import Projector, VisionTower


class Gemma3(nn.Module):
    """Gemma 3 of any size, with or without the vision tower (`config.vision`)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.language_model = TextModel(config.text)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        if config.vision is not None:
            self.vision_tower = VisionTower(config.vision)
            self.multi_modal_projector = Projector(config, config.vision)
        self._lean: LeanText | None = None  # from `fuse`
        self._head: Matrix = None  # likewise
        self._widen_head = False
        self.ahead = True  # see Kernels

    def fuse(self, between: Callable[[], None] = lambda: None) -> None:
        """Evaluate the weights and run on them in fewer steps (lean.py), arranged for the CPU where that is the device.

        Logits are the same within rounding. Weights must not be replaced afterwards.

        Args:
            between: called before each layer; what it raises leaves the model as it was, its weights partly read.
        """
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        embedding, dtype = self.language_model.embed_tokens, self.language_model.norm.weight.dtype
        late = (
            isinstance(embedding, nn.Embedding) and embedding.weight.dtype != dtype
        )  # load_model(late_embedding=True)
        self._widen_head = late and self.config.tie_word_embeddings
        self.run_on(cpu.kernels() if on_cpu else gpu_kernels(), between)
        if self.config.vision is not None:
            for layer in self.vision_tower.encoder.layers:
                layer.self_attn.attend = cpu.attend_all if on_cpu else attend_all_padded
                layer.mlp.gelu = cpu.gelu_tanh if on_cpu else gelu_tanh
            if on_cpu:
                cpu.arrange(self.vision_tower)
        mx.eval(self.parameters())

    def run_on(self, kernels: Kernels, between: Callable[[], None] = lambda: None) -> None:
        """The decoder and the head on these kernels."""
        self._lean = LeanText(self.language_model, kernels, between)
        self.ahead = kernels.ahead
        tied = self.config.tie_word_embeddings
        self._head = kernels.matrix(self.language_model.embed_tokens if tied else self.lm_head)

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
        The check of that reads `tokens`; a decode loop that must not wait for its own token calls `step`.

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
                in the vocabulary.
        """
        self._check_pixels(pixels)
        features = self.encode_images(pixels) if pixels is not None and len(pixels) else None
        return self.head(self.read(tokens, features, caches, last_only, padding=padding))

    def read(
        self,
        tokens: mx.array | np.ndarray | Sequence[Sequence[int]],
        features: mx.array | None = None,
        caches: Caches | None = None,
        last_only: bool = False,
        *,
        padding: Sequence[int] | None = None,
    ) -> mx.array:
        """As a call, without the head: (B, L or 1, D) normed rows.

        Args:
            features: (N, T, D) from `encode_images`, the pictures of these tokens; None without pictures.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 2 or 0 in ids.shape or ids.dtype.kind not in "iu":
            raise PromptError("tokens", got=f"{ids.dtype} of shape {ids.shape}", want="integers (B, L), L >= 1")
        blocks = self._image_blocks(ids, 0 if features is None else features.shape[0], caches)
        rows = self.language_model.embed(mx.array(ids.astype(np.int32)))
        if features is not None and blocks is not None:
            rows = _replace_rows(rows, features, ids == self.config.image_token_id)
        return self._decoder(
            rows,
            caches=caches,
            blocks=mx.array(blocks) if blocks is not None else None,
            padding=caches.padding if caches is not None else check_padding(padding),
            last_only=last_only,
        )

    def step(self, tokens: mx.array, caches: Caches) -> mx.array:
        """One decoded token a row: (B,) int32 → (B, V) float32. Never reads the token on the host.

        As in the reference, a token that the model itself wrote is text, whatever its id.
        """
        caches.ends_in_image = False
        if self._widen_head and self._lean is not None:
            # Worth its time when a second token is asked for, not before the first.
            embedding = self.language_model.embed_tokens
            embedding.weight = embedding.weight.astype(self.language_model.norm.weight.dtype)
            self._head = self._lean.kernels.matrix(embedding)
            self._widen_head = False
        hidden = self._decoder(self.language_model.embed(tokens[:, None]), caches=caches, padding=caches.padding)
        return self.head(hidden)[:, 0]

    @property
    def _decoder(self) -> TextModel | LeanText:
        return self._lean or self.language_model

    def head(self, hidden: mx.array) -> mx.array:
        """(B, L, D) → (B, L, V) float32: the embedding, unscaled, or lm_head where the checkpoint has its own."""
        if self._lean is not None:
            logits = self._lean.kernels.multiply(hidden, self._head)
        elif self.config.tie_word_embeddings:
            logits = self.language_model.embed_tokens.as_linear(hidden)
        else:
            logits = self.lm_head(hidden)
        return logits.astype(mx.float32)

    def encode_images(self, pixels: mx.array | np.ndarray) -> mx.array:
        """(N, S, S, 3) float32 in [-1, 1] → (N, T, D) rows.

        One picture after another: the score matrix of one is already patches² a head.
        """
        pixels = mx.array(pixels)
        rows = [self.multi_modal_projector(self.vision_tower(pixels[n : n + 1])) for n in range(pixels.shape[0])]
        return mx.concatenate(rows)

    def _check_pixels(self, pixels: mx.array | np.ndarray | None) -> None:
        if pixels is None:
            return
        if self.config.vision is None:
            raise PromptError("pictures", got=len(pixels), want="none", do="this checkpoint is text-only")
        size = self.config.vision.image_size
        if tuple(pixels.shape[1:]) != (size, size, 3):
            raise PromptError("pixels", got=tuple(pixels.shape), want=f"(N, {size}, {size}, 3)")

    def _image_blocks(self, ids: np.ndarray, count: int, caches: Caches | None) -> np.ndarray | None:
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
        image = ids == config.image_token_id
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

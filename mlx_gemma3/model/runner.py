"""A model on a device: what generation calls. gemma3.py is the rule; tests hold a runner equal to it.

prompt  ─ read ─ hidden ─ head ─ logits          a chunk of one sequence, into its caches
tokens  ─ step ─ logits                          one token of each of several sequences, each into its own caches
tokens  ─ verify ─ logits ─ take_back            some tokens of each, of which the last may turn out wrong
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import Gemma3Error
from . import cpu, embedder, unpacking
from .adapter import Adapter
from .adapter_terms import AdapterTerms, adapted_tower
from .cache import Caches
from .chunks import UNFUSED
from .context import Chunk, Context, Step, Texts
from .device import fused_from, unfused_tokens
from .fused import FusedDecoder, Kernels, Matrix, gpu_kernels, gpu_tower
from .gemma3 import Gemma3, check_writes
from .vision import PLAIN, TowerKernels

_PADDED = "a padded batch is read by calls of the model"
TEXT_GRAIN = 256  # rows: a GPU's graphs are compiled for each number of rows, so a batch of texts is filled up


class Runner:
    """Runs the plain modules, or with `kernels` the fused decoder (fused.py). Logits are the same within rounding."""

    def __init__(
        self,
        model: Gemma3,
        kernels: Kernels | None = None,
        tower: TowerKernels = PLAIN,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """With `kernels` the weights are evaluated, and must not be replaced afterwards.

        Args:
            between: called before each layer; what it raises leaves the model as it was, its weights partly read.
        """
        self.model, self.config, self.shard = model, model.config, model.shard
        self.dtype: mx.Dtype = model.language_model.norm.weight.dtype  # of the activations
        self.ahead = kernels is None or kernels.ahead  # a step may be issued before the one before is read
        self.unpacked_bytes = 0  # of packed matrices that are kept as float32 too
        self.unfused_chunk = UNFUSED  # tokens to read at once where attention is not fused
        self.fused_from = 0  # queries from which heads of 256 are; 0: never
        self.rest: float | None = None  # seconds with nothing to do after which it wants `beat`; None for never
        self._kernels, self._tower = kernels, tower
        self._adapters: AdapterTerms | None = None
        self._towers: dict[str, TowerKernels] = {}  # of adapters that do something to the tower
        self._fused = None if kernels is None else FusedDecoder(model.language_model, kernels, between)
        self._decoder = self._fused or model.language_model
        self._head: Matrix = None
        # load_model(late_embedding=True): widening it is worth its time when a second token is asked for, not before.
        self._widen_at_step = False
        self._dense: list[Matrix] = []
        if kernels is not None and model.config.embedder is not None:
            self._dense = [kernels.matrix(module) for module in model.get("dense", [])]
            mx.eval(model.parameters())
        elif kernels is not None:
            embedding, tied = model.language_model.embed_tokens, model.config.tie_word_embeddings
            self._head = kernels.matrix(embedding if tied else model.lm_head)
            self._widen_at_step = tied and isinstance(embedding, nn.Embedding) and embedding.weight.dtype != self.dtype
            mx.eval(model.parameters())

    def beat(self) -> None:
        """Called while nothing is asked for, every `rest` seconds."""

    def gone(self, error: BaseException) -> Gemma3Error | None:
        """An error after which nothing can be computed any more, said so that it can be told; None for others."""
        return None

    def close(self) -> None:
        """Called once, when nothing more will be asked for."""

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Let sequences be computed with an adapter: those whose caches are made with its name.

        Args:
            adapter: all its matrices are of this model, in its shapes; evaluated here.
        """
        assert self._kernels is not None, "plain modules have adapters by adapter.attach"
        if self._adapters is None:
            self._adapters = AdapterTerms(self.model.language_model, self._kernels.matrix, self.dtype)
        self._adapters.add(name, adapter)
        if "vision_tower" in self.model:
            tower = adapted_tower(self.model.vision_tower, self._tower, adapter, self.dtype)
            if tower is not None:
                self._towers[name] = tower

    def sees_with(self, adapter: str | None) -> str | None:
        """The adapter itself where it does something to the tower, else None: what a picture's rows depend on."""
        return adapter if adapter in self._towers else None

    def make_caches(self, *, kv_bits: int = 16, local_kv_bits: int = 16, adapter: str | None = None) -> Caches:
        """Empty caches for one sequence; see Gemma3.make_caches. Raises PromptError for an embedding model.

        Args:
            adapter: what everything that is read into them is computed with; None for the model alone.

        Raises:
            PromptError: an embedding model.
        """
        check_writes(self.config)
        caches = self.model.make_caches(kv_bits=kv_bits, local_kv_bits=local_kv_bits)
        caches.adapter = adapter
        return caches

    def read(
        self,
        tokens: mx.array | np.ndarray | Sequence[Sequence[int]],
        features: mx.array | None = None,
        caches: Caches | None = None,
        last_only: bool = False,
        spans: Sequence[tuple[int, int]] | None = None,
    ) -> mx.array:
        """A chunk of a prompt, without the head: (B, L) int32 → (B, L or 1, D) normed hidden states.

        Args:
            features: (N, T, D) from `encode_images`, the pictures of these tokens; None without pictures.
            spans: where these pictures stand, see Gemma3.embed.

        Raises:
            PromptError: see Gemma3.
        """
        assert caches is None or caches.padding is None, _PADDED
        rows, blocks = self.model.embed(tokens, features, caches, spans)
        return self.decode_chunk(rows, blocks, caches, last_only=last_only)

    def decode_chunk(
        self, rows: mx.array, blocks: mx.array | None, caches: Caches | None, *, last_only: bool
    ) -> mx.array:
        """The rest of `read`, from what Gemma3.embed returned on."""
        names = [] if caches is None else [caches.adapter]
        return self._decode(rows, Chunk(rows.shape[1], caches, blocks), names, last_only=last_only)

    def step(self, tokens: mx.array, rows: Sequence[Caches]) -> mx.array:
        """One decoded token of each sequence: (B,) int32 → (B, V) float32. Never reads the tokens on the host.

        As in the reference, a token that the model itself wrote is text, whatever its id.

        Args:
            rows: the caches of each sequence, B of them, each of one sequence without padding.
        """
        return self._step(tokens, rows, None)

    def verify(self, tokens: mx.array, rows: Sequence[Caches], counts: Sequence[int], last: Sequence[int]) -> mx.array:
        """As `step`, several tokens of each sequence, which may be a guess: `take_back` takes the wrong ones back.

        Args:
            tokens: (T,) int32, those of the first sequence before those of the next.
            counts: how many are of each sequence, at least 1; T together.
            last: of how many of each, the last, logits are wanted.

        Returns:
            (sum of `last`, V) float32.
        """
        return self._step(tokens, rows, counts, last)

    def take_back(self, rows: Sequence[Caches], counts: Sequence[int]) -> None:
        """Forget the last tokens of each sequence: no more than `Caches.slack`, of those that `verify` read last."""
        for caches, count in zip(rows, counts, strict=True):
            if count:
                caches.take_back(count)

    def _step(
        self, tokens: mx.array, rows: Sequence[Caches], counts: Sequence[int] | None, last: Sequence[int] = ()
    ) -> mx.array:
        if self._widen_at_step:
            assert self._kernels is not None
            embedding = self.model.language_model.embed_tokens
            embedding.weight = embedding.weight.astype(self.dtype)
            self._head = self._kernels.matrix(embedding)
            self._widen_at_step = False
        for caches in rows:
            assert caches.padding is None, _PADDED
            caches.ends_in_image = False
        hidden = self.model.language_model.embed(tokens[:, None])
        names = [caches.adapter for caches in rows]
        if counts is None:
            return self.head(self._decode(hidden, Step(rows), names))[:, 0]
        names = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
        found = self._decode(hidden, Step(rows, counts), names)
        if list(counts) != list(last):
            ends = accumulate(counts)
            found = found[mx.array([at for end, some in zip(ends, last, strict=True) for at in range(end - some, end)])]
        return self.head(found)[:, 0]

    def _decode(
        self, rows: mx.array, context: Context, names: Sequence[str | None], *, last_only: bool = False
    ) -> mx.array:
        if self._adapters is None or not any(names):
            assert not any(names), names
            return self._decoder(rows, context, last_only=last_only)
        assert self._fused is not None
        return self._fused(rows, context, last_only=last_only, adapted=self._adapters.of(names))

    def head(self, hidden: mx.array) -> mx.array:
        """(B, L, D) → (B, L, V) float32."""
        if self._kernels is None:
            return self.model.head(hidden)
        return self.shard.logits(self._kernels.multiply(hidden, self._head), self.config.text).astype(mx.float32)

    def vectors(self, texts: Sequence[Sequence[int]], skipped: Sequence[int] | None = None) -> mx.array:
        """See Gemma3.vectors: N lists of ids → (N, E) float32."""
        if self._kernels is None:
            return self.model.vectors(texts, skipped)
        kernels, config, multiply = self._kernels, self.config.embedder, self._kernels.multiply
        assert config is not None, "no embedding model"
        lengths = [len(ids) for ids in texts]
        fill = -sum(lengths) % TEXT_GRAIN if kernels.ahead else 0
        ids = [token for text in texts for token in text] + [self.config.pad_token_id] * fill
        rows, _ = self.model.embed([[token] for token in ids])  # (T, 1, D)
        hidden = self._decoder(rows, Texts([*lengths, *([fill] if fill else [])]))
        means = embedder.pooled(hidden, lengths, skipped or [0] * len(lengths))
        return embedder.finished(
            means, config, self.model.get("dense", []), lambda number, x: multiply(x, self._dense[number])
        )

    def encode_images(self, pixels: mx.array | np.ndarray, adapter: str | None = None) -> mx.array:
        """(N, S, S, 3) float32 in [-1, 1] → (N, T, D), by the tower as this adapter has it."""
        tower = self._tower if adapter is None else self._towers.get(adapter, self._tower)
        return self.model.encode_images(pixels, tower)


def on_device(
    model: Gemma3, between: Callable[[], None] = lambda: None, kind: Callable[..., Runner] = Runner
) -> Runner:
    """Evaluate the weights and arrange them for MLX's default device. See Runner for `between`.

    Args:
        kind: makes it, as Runner does.
    """
    if mx.default_device().type != mx.DeviceType.cpu:
        runner = kind(model, gpu_kernels(), gpu_tower(), between)
        runner.unfused_chunk, runner.fused_from = unfused_tokens(), fused_from()
        return runner
    tower = cpu.tower_kernels(model.vision_tower) if "vision_tower" in model else PLAIN
    unpacked_bytes = unpacking.unpacked_bytes(model)
    runner = kind(model, cpu.kernels(unpack=unpacked_bytes > 0), tower, between)
    runner.unpacked_bytes = unpacked_bytes
    return runner

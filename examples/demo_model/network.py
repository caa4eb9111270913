"""Gemma 3 in torch for training: the same arithmetic and the same parameter names as the Hub's checkpoints.

Written for one processor core: fused attention, bfloat16 products, and branches (several questions about one picture
in one row, each seeing the picture and itself alone). `compare.py` holds it against transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """The shape of the model; `config()` in export.py writes it as config.json."""

    vocabulary: int
    image: int = 112
    patch: int = 14
    rows: int = 16  # of a picture in the prompt
    vision_width: int = 128
    vision_inner: int = 512
    vision_layers: int = 4
    vision_heads: int = 4
    width: int = 128
    inner: int = 384
    layers: int = 6  # the last is global
    heads: int = 4
    head_size: int = 32
    window: int = 48
    theta: float = 1_000_000.0
    theta_local: float = 10_000.0

    @property
    def grid(self) -> int:
        return self.image // self.patch


class _Norm(torch.autograd.Function):
    """`x / rms(x) * (1 + weight)`, with a backward pass that keeps one array instead of five."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        even = (x * scale).to(x.dtype)
        context.save_for_backward(even, scale, weight)
        return even * (1 + weight).to(x.dtype)

    @staticmethod
    def backward(context: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
        even, scale, weight = context.saved_tensors
        inner = slope * (1 + weight).to(slope.dtype)
        drift = (inner * even).mean(-1, keepdim=True)
        back = ((inner - even * drift) * scale.to(slope.dtype)).to(slope.dtype)
        return back, (slope * even).flatten(0, -2).sum(0, dtype=torch.float32), None


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight, self.eps)


class VisionLayer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, self.heads = sizes.vision_width, sizes.vision_heads
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, sizes.vision_inner), "fc2": nn.Linear(sizes.vision_inner, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        y, attention = self.layer_norm1(x), self.self_attn
        q, k, v = (
            attention[name](y).view(count, length, self.heads, -1).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        y = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype) @ v
        x = x + attention["out_proj"](y.transpose(1, 2).reshape(count, length, width))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh"))


class Embeddings(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, sizes.vision_width, sizes.patch, sizes.patch)
        self.position_embedding = nn.Embedding(sizes.grid**2, sizes.vision_width)
        with torch.no_grad():
            self.position_embedding.weight.copy_(_waves(sizes.grid, sizes.vision_width))


class VisionModel(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embeddings = Embeddings(sizes)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(VisionLayer(sizes) for _ in range(sizes.vision_layers))})
        self.post_layernorm = nn.LayerNorm(sizes.vision_width, eps=1e-6)

    def forward(self, patches: Tensor) -> Tensor:
        """(N, grid², 3 * patch²) in [-1, 1] → (N, grid², width)"""
        embed = self.embeddings.patch_embedding
        x = F.linear(patches, embed.weight.flatten(1), embed.bias) + self.embeddings.position_embedding.weight
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.post_layernorm(x)


class Projector(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.mm_input_projection_weight = nn.Parameter(torch.randn(sizes.vision_width, sizes.width) * sizes.width**-0.5)
        self.mm_soft_emb_norm = RMSNorm(sizes.vision_width)
        self.side, self.kernel = math.isqrt(sizes.rows), sizes.grid // math.isqrt(sizes.rows)

    def forward(self, x: Tensor) -> Tensor:
        """(N, grid², width) → (N, rows, text width)"""
        count, _, width = x.shape
        x = x.view(count, self.side, self.kernel, self.side, self.kernel, width).mean((2, 4)).flatten(1, 2)
        return self.mm_soft_emb_norm(x) @ self.mm_input_projection_weight


class TextLayer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, inner, head, self.heads = sizes.width, sizes.inner, sizes.head_size, sizes.heads
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(width, self.heads * head, bias=False),
                "k_proj": nn.Linear(width, head, bias=False),
                "v_proj": nn.Linear(width, head, bias=False),
                "o_proj": nn.Linear(self.heads * head, width, bias=False),
                "q_norm": RMSNorm(head),
                "k_norm": RMSNorm(head),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(width, inner, bias=False),
                "up_proj": nn.Linear(width, inner, bias=False),
                "down_proj": nn.Linear(inner, width, bias=False),
            }
        )
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width), RMSNorm(width)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = RMSNorm(width), RMSNorm(width)

    def forward(self, x: Tensor, mask: Tensor, waves: tuple[Tensor, Tensor]) -> Tensor:
        y, attention, mlp = self.input_layernorm(x), self.self_attn, self.mlp
        q = attention["q_norm"](attention["q_proj"](y).unflatten(-1, (self.heads, -1))).transpose(1, 2)  # (B, H, L, D)
        k = attention["k_norm"](attention["k_proj"](y)).unsqueeze(1)  # (B, 1, L, D)
        v = attention["v_proj"](y)  # (B, L, D)
        q, k = _turned(q, waves), _turned(k, waves)[:, 0]
        # One key head: the queries of all heads are one matrix. Much faster on a CPU than torch's fused attention.
        score = (q.flatten(1, 2) @ k.mT).view(*q.shape[:3], -1) * q.shape[-1] ** -0.5 + mask
        y = (score.softmax(-1).to(v.dtype).flatten(1, 2) @ v).view_as(q)
        x = x + self.post_attention_layernorm(attention["o_proj"](y.transpose(1, 2).flatten(2)))
        y = self.pre_feedforward_layernorm(x)
        y = mlp["down_proj"](F.gelu(mlp["gate_proj"](y), approximate="tanh") * mlp["up_proj"](y))
        return x + self.post_feedforward_layernorm(y)


class TextModel(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        nn.init.normal_(self.embed_tokens.weight, std=sizes.width**-0.5)
        self.layers = nn.ModuleList(TextLayer(sizes) for _ in range(sizes.layers))
        self.norm = RMSNorm(sizes.width)


class Gemma3(nn.Module):
    """The model, and the two heads that judge each patch in training (they are not exported)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.vision_tower = nn.ModuleDict({"vision_model": VisionModel(sizes)})
        self.multi_modal_projector = Projector(sizes)
        self.language_model = nn.ModuleDict({"model": TextModel(sizes)})

    def see(self, pixels: Tensor) -> Tensor:
        """(N, S, S, 3) uint8 → (N, grid², width)"""
        grid, patch = self.sizes.grid, self.sizes.patch
        x = (
            pixels.view(-1, grid, patch, grid, patch, 3)
            .permute(0, 1, 3, 5, 2, 4)
            .reshape(-1, grid * grid, 3 * patch**2)
        )
        return self.vision_tower["vision_model"](x.float() / 127.5 - 1)

    def forward(self, batch: dict[str, Tensor], seen: Tensor) -> Tensor:
        """Rows of branches → (answers, V) logits at the places `batch["asked"]`, flat indices into B * L.

        Args:
            batch: tokens (B, L), positions (B, L), branches (B, L) 0 for what all branches of a row see and -1 for
                padding, blocks (B, L) numbers of image blocks or 0, image_at (N * rows,) flat indices, asked (A,).
            seen: (N, grid², width) of `see`.
        """
        text: TextModel = self.language_model["model"]
        tokens = batch["tokens"]
        x = text.embed_tokens(tokens) * math.sqrt(self.sizes.width)
        rows = self.multi_modal_projector(seen).flatten(0, 1)
        x = x.flatten(0, 1).index_copy(0, batch["image_at"], rows.to(x.dtype)).view_as(x)
        near, far = masks(batch, self.sizes.window)
        places = batch["positions"].float()
        waves = [_angles(places, self.sizes.head_size, theta) for theta in (self.sizes.theta_local, self.sizes.theta)]
        for number, layer in enumerate(text.layers):
            last = number == len(text.layers) - 1
            x = layer(x, far if last else near, waves[last])
        x = text.norm(x.flatten(0, 1)[batch["asked"]])
        return F.linear(x, text.embed_tokens.weight)


def masks(batch: dict[str, Tensor], window: int) -> tuple[Tensor, Tensor]:
    """(local, global), each (B, 1, L, L) additive: a branch sees row 0's tokens and its own, in order of position."""
    place, branch, block = batch["positions"], batch["branches"], batch["blocks"]
    back = place[:, :, None] - place[:, None]
    kin = (branch[:, None] == 0) | (branch[:, :, None] == branch[:, None])
    same = (block[:, :, None] == block[:, None]) & (block[:, None] > 0)
    seen = ((back >= 0) & kin) | same
    seen |= torch.eye(place.shape[1], dtype=torch.bool)
    near = seen & (back < window)
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    return tuple(torch.zeros(m.shape, dtype=kind).masked_fill_(~m, -1e4)[:, None] for m in (near, seen))


def _angles(places: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    angles = places[:, None, :, None] * theta ** (-torch.arange(0, size, 2) / size)
    both = torch.cat((angles, angles), -1)
    return both.cos(), both.sin()  # (B, 1, L, D)


def _turned(x: Tensor, waves: tuple[Tensor, Tensor]) -> Tensor:
    half = x.shape[-1] // 2
    return (x * waves[0] + torch.cat((-x[..., half:], x[..., :half]), -1) * waves[1]).to(x.dtype)


def _waves(grid: int, width: int) -> Tensor:
    """Sine and cosine of row and column, a quarter of the width each."""
    place = torch.arange(grid).float()
    angles = place[:, None] * 30.0 ** (-torch.arange(width // 4) / (width // 4))
    line = torch.cat((angles.sin(), angles.cos()), -1)  # (grid, width / 2)
    rows = line[:, None].expand(grid, grid, -1)
    return torch.cat((rows, rows.transpose(0, 1)), -1).flatten(0, 1) * 0.5

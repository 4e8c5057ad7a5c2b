"""Networks with random weights for ``gpu_speed.py``: callables that return ``(module, example inputs)``."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = qkv[0] @ qkv[1].transpose(-2, -1) * (width // self.heads) ** -0.5
        if self.causal:
            scores = scores + torch.full((tokens, tokens), -1e4, device=x.device).triu(1).to(scores.dtype)
        mixed = functional.softmax(scores, -1) @ qkv[2]
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """A transformer block that normalizes first."""

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.act(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Blocks between a projection and a head."""

    def __init__(self, given: int, width: int, depth: int, heads: int, outputs: int, *, causal: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(given, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=causal) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, given] to [batch, tokens, outputs]."""
        return self.head(self.norm(self.blocks(self.embed(x))))


POOL = 4_000_037
"""Random numbers that all weights are pieces of: making them is no part of what is measured."""


def _fill(tensor: Tensor, pool: Tensor, begin: int, scale: float) -> int:
    """Fill a tensor of any shape with the pool's numbers from ``begin`` on, over and over; returns where they end."""
    flat, done = tensor.detach().view(-1), 0
    while done < len(flat):
        count = min(len(flat) - done, POOL - begin)
        torch.mul(pool[begin : begin + count], scale, out=flat[done : done + count])
        done, begin = done + count, (begin + count) % POOL
    return begin


def _made(*sizes: int, shape: tuple[int, ...], causal: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """A ``Transformer`` of these sizes, its linear layers distributed as torch has them."""
    with mock.patch.object(nn.Linear, "reset_parameters", return_value=None):
        module = Transformer(*sizes, causal=causal)
    draw = torch.Generator().manual_seed(0)
    pool, begin = torch.rand(POOL, generator=draw) * 2 - 1, 0
    for part in module.modules():
        if isinstance(part, nn.Linear):
            for tensor in (part.weight, part.bias):
                begin = _fill(tensor, pool, begin, part.in_features**-0.5)
    return module.eval(), {"x": torch.randn(shape, generator=draw)}


def vit_large() -> tuple[nn.Module, dict[str, Tensor]]:
    """ViT-L without its patches: 24 blocks of width 1024, 303 M parameters; 4 images of 576 tokens."""
    return _made(768, 1024, 24, 16, 1000, shape=(4, 576, 768))


def vit_small() -> tuple[nn.Module, dict[str, Tensor]]:
    """The same in small, to try the commands: 2 blocks of width 64."""
    return _made(32, 64, 2, 4, 10, shape=(2, 16, 32))


def vit_narrow() -> tuple[nn.Module, dict[str, Tensor]]:
    """ViT-L with few tokens and a quarter of its weights: what a bisect costs beside its arithmetic."""
    return _made(384, 512, 24, 8, 1000, shape=(1, 8, 384))


def decoder_1b() -> tuple[nn.Module, dict[str, Tensor]]:
    """A decoder of 24 layers of width 1856, 1.0 G parameters; one sequence of 512."""
    return _made(1856, 1856, 24, 29, 1856, shape=(1, 512, 1856), causal=True)

"""A module with everything that makes torch and ONNX hard to align."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

OUTPUTS = ["map", "zero_0", "zero_1", "logits"]


class Pair(nn.Module):
    """A leaf with two outputs."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = x.chunk(2, 1)
        return left * 2, right + 1


class Stress(nn.Module):
    """In-place ReLU, a module called three times, GroupNorm, attention, identities, tuples, tensors that are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.drop, self.identity = nn.Dropout(0.3), nn.Identity()
        self.group_norm, self.gelu = nn.GroupNorm(2, 8), nn.GELU()
        self.shared, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True)
        right = nn.Sequential(nn.Conv2d(8, 8, 1), nn.SiLU())
        self.branches = nn.ModuleDict({"left": nn.Conv2d(8, 8, 1), "right": right})
        self.pair = Pair()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(approximate="tanh"), nn.Dropout(), nn.Linear(16, 8))
        self.up, self.up_norm = nn.ConvTranspose2d(8, 8, 2, stride=2, bias=False), nn.BatchNorm2d(8)
        self.position = nn.Parameter(torch.randn(1, 16, 8))
        self.zeros = nn.ModuleList([nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.drop(self.identity(self.stem(x)))
        x = self.gelu(self.group_norm(x))
        for _ in range(3):
            x = self.relu(self.shared(x))
        x = self.branches["left"](x) + self.branches["right"](x)
        x = torch.cat(self.pair(x), dim=1)
        x = functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        tokens = functional.avg_pool2d(x, 4).flatten(2).transpose(1, 2) + self.position
        query = self.norm(tokens)
        tokens = tokens + self.attention(query, query, query, need_weights=False)[0]
        tokens = tokens + self.mlp(tokens)
        grid = self.up_norm(self.up(tokens.transpose(1, 2).reshape(-1, 8, 4, 4)))
        grid = functional.relu(self.relu(grid))  # the second changes nothing
        return {
            "map": grid,
            "zero": [zero(grid) for zero in self.zeros],
            "logits": self.head(tokens.mean(1)).softmax(-1),
        }


def make_stress() -> tuple[nn.Module, Tensor]:
    """The module in eval mode with seeded weights, and an input."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, image = Stress().eval(), torch.randn(2, 3, 8, 8)
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.running_mean)
                nn.init.uniform_(part.running_var, 0.5, 2)
        for parameter in module.zeros.parameters():
            nn.init.zeros_(parameter)
    return module, image

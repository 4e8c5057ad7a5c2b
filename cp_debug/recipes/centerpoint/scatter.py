"""Pillars back to their places on the bird's-eye canvas."""

from __future__ import annotations

from torch import Tensor


def scatter(pillar_features: Tensor, coors: Tensor, grid: tuple[int, int, int], batch_size: int = 1) -> Tensor:
    """``spatial_features`` [B, C, ny, nx]: ``pillar_features`` [N, 1, C] at ``coors`` [N, 4] (batch, z, y, x)."""
    nx, ny, _ = grid
    features = pillar_features.squeeze(1)
    batch, _, y, x = coors.long().unbind(1)
    canvas = features.new_zeros(batch_size, features.shape[1], ny * nx)
    canvas[batch, :, y * nx + x] = features
    return canvas.view(batch_size, -1, ny, nx)

"""Hard voxelization, bit for bit as mmcv's ``hard_voxelize`` (deterministic) does it, without its loop over points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cp_debug.recipes.centerpoint.config import CenterPointConfig


class Voxels(NamedTuple):
    """Points gathered into pillars, in the order in which the pillars' first points appear."""

    voxels: Tensor
    """[N, max_num_points, C] float32; unused slots are 0."""
    num_points: Tensor
    """[N] int32, how many slots are used."""
    coors: Tensor
    """[N, 4] int32: batch, z, y, x."""


def voxelize(points: Tensor, config: CenterPointConfig) -> Voxels:
    """Pillars of one cloud ``points`` [M, C] float32, with batch index 0. An empty cloud gives no pillars.

    A pillar keeps its first ``max_num_points`` points in input order. Pillars beyond the first ``max_voxels`` are
    dropped; the kept ones go on collecting. Points out of range, NaN and Inf are dropped.
    """
    nx, ny, nz = config.grid
    low = points.new_tensor(config.point_cloud_range[:3])
    cells = torch.floor((points[:, :3] - low) / points.new_tensor(config.voxel_size))
    inside = ((cells >= 0) & (cells < points.new_tensor((nx, ny, nz)))).all(dim=1)
    points, cells = points[inside], cells[inside].long()
    keys = (cells[:, 2] * ny + cells[:, 1]) * nx + cells[:, 0]

    # Points sorted by cell, still in input order within a cell: a run a pillar, whose first point gives its rank.
    sorted_keys, order = torch.sort(keys, stable=True)
    run_keys, run_lengths = torch.unique_consecutive(sorted_keys, return_counts=True)
    run_starts = run_lengths.cumsum(0) - run_lengths
    ranked = torch.argsort(order[run_starts])[: config.max_voxels]
    rank = torch.full_like(run_keys, -1)
    rank[ranked] = torch.arange(len(ranked), device=points.device)

    slot = torch.arange(len(order), device=points.device) - run_starts.repeat_interleave(run_lengths)
    pillar = rank.repeat_interleave(run_lengths)
    used = (pillar >= 0) & (slot < config.max_num_points)
    voxels = points.new_zeros(len(ranked), config.max_num_points, points.shape[1])
    voxels[pillar[used], slot[used]] = points[order[used]]

    keys = run_keys[ranked]
    coors = torch.stack((torch.zeros_like(keys), keys // (nx * ny), keys // nx % ny, keys % nx), dim=1)
    return Voxels(voxels, run_lengths[ranked].clamp(max=config.max_num_points).int(), coors.int())


def voxelize_batch(clouds: Sequence[Tensor], config: CenterPointConfig) -> Voxels:
    """Pillars of several clouds one after the other, told apart by the batch column of ``coors``."""
    parts = [voxelize(points, config) for points in clouds]
    for index, part in enumerate(parts):
        part.coors[:, 0] = index
    return Voxels(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

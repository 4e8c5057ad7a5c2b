"""Pillar features: the decoration, which stays outside the exported graph, and the encoder, which is in it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from cp_debug.recipes.centerpoint.config import CenterPointConfig
from cp_debug.recipes.centerpoint.voxelize import Voxels


def decorate(pillars: Voxels, config: CenterPointConfig) -> Tensor:
    """``input_features`` [N, P, C + 6] of pillars [N, P, C]: raw, offset to the points' mean, offset to the centre.

    Computed as by mmdet3d's PillarFeatureNet with ``legacy=False``; empty slots are zeroed after the concatenation.
    """
    voxels, num_points, coors = pillars
    xyz = voxels[:, :, :3]
    mean = xyz.sum(dim=1, keepdim=True) / num_points.to(voxels).view(-1, 1, 1)
    size = voxels.new_tensor(config.voxel_size)
    first_centre = [low + size / 2 for low, size in zip(config.point_cloud_range[:3], config.voxel_size, strict=True)]
    centre = coors[:, [3, 2, 1]].to(voxels) * size + voxels.new_tensor(first_centre)
    features = torch.cat((voxels, xyz - mean, xyz - centre.unsqueeze(1)), dim=2)
    used = torch.arange(voxels.shape[1], device=voxels.device) < num_points.unsqueeze(1)
    return features * used.unsqueeze(2)


class PFNLayer(nn.Module):
    """Linear, BatchNorm and ReLU on every point, then the maximum over the pillar's points."""

    def __init__(self, in_channels: int, out_channels: int, last: bool) -> None:
        super().__init__()
        self.last = last
        units = out_channels if last else out_channels // 2
        self.norm = nn.BatchNorm1d(units, eps=1e-3, momentum=0.01)
        self.linear = nn.Linear(in_channels, units, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, P, in] to [N, 1, out] for the last layer, else [N, P, out] with the maximum beside every point."""
        x = self.linear(inputs)
        x = self.norm(x.permute(0, 2, 1).contiguous()).permute(0, 2, 1).contiguous()
        x = functional.relu(x)
        x_max = torch.max(x, dim=1, keepdim=True)[0]
        if self.last:
            return x_max
        return torch.cat((x, x_max.expand_as(x)), dim=2)


class PillarFeatureNet(nn.Module):
    """mmdet3d's PillarFeatureNet on decorated points, as AWML exports it."""

    def __init__(self, config: CenterPointConfig) -> None:
        super().__init__()
        channels = (config.decorated_channels, *config.encoder_channels)
        last = len(config.encoder_channels) - 1
        self.pfn_layers = nn.ModuleList(
            PFNLayer(before, after, last=index == last)
            for index, (before, after) in enumerate(itertools.pairwise(channels))
        )

    def forward(self, input_features: Tensor) -> Tensor:
        """``input_features`` [N, P, C] to ``pillar_features`` [N, 1, out]."""
        for layer in self.pfn_layers:
            input_features = layer(input_features)
        return input_features

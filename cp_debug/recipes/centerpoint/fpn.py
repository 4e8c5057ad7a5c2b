"""SECONDFPN: every stage brought to one resolution and concatenated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cp_debug.recipes.centerpoint.config import CenterPointConfig
from cp_debug.recipes.centerpoint.second import conv_bn_relu


def resample(before: int, after: int, stride: float) -> nn.Module:
    """A transposed convolution where the map must grow, else a convolution (mmdet3d's ``use_conv_for_no_stride``)."""
    if stride > 1:
        return nn.ConvTranspose2d(before, after, round(stride), stride=round(stride), bias=False)
    step = round(1 / stride)
    return nn.Conv2d(before, after, step, stride=step, bias=False)


class SECONDFPN(nn.Module):
    """mmdet3d's neck."""

    def __init__(self, config: CenterPointConfig) -> None:
        super().__init__()
        sizes = zip(config.backbone_channels, config.neck_channels, config.neck_strides, strict=True)
        self.deblocks = nn.ModuleList(
            nn.Sequential(*conv_bn_relu(resample(before, after, stride), after)) for before, after, stride in sizes
        )

    def forward(self, stages: tuple[Tensor, ...]) -> Tensor:
        """The backbone's maps to [B, sum(neck_channels), ny / out_size_factor, nx / out_size_factor]."""
        return torch.cat([deblock(stage) for deblock, stage in zip(self.deblocks, stages, strict=True)], dim=1)

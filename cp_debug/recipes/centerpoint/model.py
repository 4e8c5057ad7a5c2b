"""CenterPoint, whole and in the two components that are deployed: pillar features, SECOND, SECONDFPN and CenterHead.

Voxelization, the decoration of pillars and the scatter to the bird's-eye canvas stay outside the exported graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cp_debug.recipes.centerpoint.config import HEAD_CHANNELS, OUTPUT_ORDER, CenterPointConfig


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


def scatter(pillar_features: Tensor, coors: Tensor, grid: tuple[int, int, int], batch_size: int = 1) -> Tensor:
    """``spatial_features`` [B, C, ny, nx]: ``pillar_features`` [N, 1, C] at ``coors`` [N, 4] (batch, z, y, x)."""
    nx, ny, _ = grid
    features = pillar_features.squeeze(1)
    batch, _, y, x = coors.long().unbind(1)
    canvas = features.new_zeros(batch_size, features.shape[1], ny * nx)
    canvas[batch, :, y * nx + x] = features
    return canvas.view(batch_size, -1, ny, nx)


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


def conv_bn_relu(conv: nn.Module, channels: int) -> list[nn.Module]:
    """The convolution with BatchNorm and ReLU as backbone and neck use them."""
    return [conv, nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01), nn.ReLU(inplace=True)]


class SECOND(nn.Module):
    """A stage is one strided 3×3 convolution and ``backbone_layers`` more, each with BatchNorm and ReLU."""

    def __init__(self, config: CenterPointConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        before = config.encoder_channels[-1]
        for after, layers, stride in zip(
            config.backbone_channels, config.backbone_layers, config.backbone_strides, strict=True
        ):
            block = conv_bn_relu(nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False), after)
            for _ in range(layers):
                block += conv_bn_relu(nn.Conv2d(after, after, 3, padding=1, bias=False), after)
            self.blocks.append(nn.Sequential(*block))
            before = after

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, C, ny, nx] to one feature map a stage, finest first."""
        stages = []
        for block in self.blocks:
            x = block(x)
            stages.append(x)
        return tuple(stages)


class CenterPoint(nn.Module):
    """CenterPoint from point clouds to head maps. ``state_dict()`` has the names and shapes of mmdet3d 1.4.0."""

    def __init__(self, config: CenterPointConfig) -> None:
        super().__init__()
        self.config = config
        self.pts_voxel_encoder = PillarFeatureNet(config)
        self.pts_backbone = SECOND(config)
        self.pts_neck = SECONDFPN(config)
        self.pts_bbox_head = CenterHead(config)

    def forward(self, clouds: Sequence[Tensor]) -> dict[str, Tensor]:
        """Clouds, one [M, C] float32 a sample, to ``config.output_names``; differentiable from the pillars on."""
        return self.forward_pillars(voxelize_batch(clouds, self.config), batch_size=len(clouds))

    def forward_pillars(self, pillars: Voxels, batch_size: int = 1) -> dict[str, Tensor]:
        """Voxelized clouds to ``config.output_names``; ``batch_size`` of them, by the column ``batch`` of ``coors``."""
        pillar_features = self.pts_voxel_encoder(decorate(pillars, self.config))
        canvas = scatter(pillar_features, pillars.coors, self.config.grid, batch_size)
        return self.pts_bbox_head(self.pts_neck(self.pts_backbone(canvas)))


class BackboneNeckHead(nn.Module):
    """The component ``pts_backbone_neck_head``: its modules keep mmdet3d's paths."""

    def __init__(self, model: CenterPoint) -> None:
        super().__init__()
        self.pts_backbone = model.pts_backbone
        self.pts_neck = model.pts_neck
        self.pts_bbox_head = model.pts_bbox_head

    def forward(self, spatial_features: Tensor) -> tuple[Tensor, ...]:
        """``spatial_features`` [B, C, ny, nx] to the maps named by ``config.output_names``, in that order."""
        return tuple(self.pts_bbox_head(self.pts_neck(self.pts_backbone(spatial_features))).values())


def build_model(config: CenterPointConfig, seed: int = 0) -> CenterPoint:
    """A CenterPoint with seeded random weights, in eval mode; the global random state is left alone.

    Kaiming convolutions and ``heatmap_bias``. BatchNorm gets statistics and scales near those that such weights give
    rise to, never the identity: activations stay near 1, and folding BatchNorm into a convolution is not a no-op that
    would hide a fault.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = CenterPoint(config).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.ConvTranspose2d):
            # The kernel equals the stride, so a result has one term an input channel.
            module.weight.normal_(std=(2 / module.in_channels) ** 0.5, generator=generator)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.weight.uniform_(0.8, 1.2, generator=generator)
            module.bias.normal_(std=0.1, generator=generator)
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.8, 1.2, generator=generator)
    for name, bias in model.pts_bbox_head.named_parameters():
        if name.endswith("heatmap.1.bias"):
            nn.init.constant_(bias, config.heatmap_bias)
    first = model.pts_voxel_encoder.get_submodule("pfn_layers.0")
    assert isinstance(first, PFNLayer)
    assert first.norm.running_var is not None
    first.norm.running_var.copy_((first.linear.weight * _feature_scales(config)).square().sum(dim=1))
    return model.requires_grad_(True).eval()


def _feature_scales(config: CenterPointConfig) -> Tensor:
    """Typical magnitude of each channel of ``input_features``; points lie denser near the sensor."""
    low, high = config.point_cloud_range[:3], config.point_cloud_range[3:]
    raw = {name: (b - a) / 6 for name, a, b in zip("xyz", low, high, strict=True)}
    raw |= {"intensity": 30.0, "dt": 0.1}
    offsets = [size / 4 for size in config.voxel_size]
    return torch.tensor([*(raw[name] for name in config.point_features), *offsets, *offsets])


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


class ConvModule(nn.Module):
    """mmcv's block of that name: convolution without bias, BatchNorm (eps 1e-5), ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.activate = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, out_channels, H, W]."""
        return self.activate(self.bn(self.conv(x)))


class SeparateHead(nn.Module):
    """The six outputs of one task; only each last convolution has a bias."""

    def __init__(self, config: CenterPointConfig, num_classes: int) -> None:
        super().__init__()
        width, kernel = config.head_channels, config.head_kernel
        for name, channels in {**HEAD_CHANNELS, "heatmap": num_classes}.items():
            last = nn.Conv2d(width, channels, kernel, padding=kernel // 2)
            self.add_module(name, nn.Sequential(ConvModule(width, width, kernel), last))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, width, H, W] to the heads' maps, in AWML's order."""
        return {name: self.get_submodule(name)(x) for name in OUTPUT_ORDER}


class CenterHead(nn.Module):
    """mmdet3d's head without decoding (that is ``decode.py``)."""

    def __init__(self, config: CenterPointConfig) -> None:
        super().__init__()
        self.output_names = config.output_names
        self.shared_conv = ConvModule(sum(config.neck_channels), config.head_channels, 3)
        self.task_heads = nn.ModuleList(SeparateHead(config, len(task)) for task in config.tasks)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The neck's map to ``config.output_names``; heatmaps are logits, [B, channels, H, W] each."""
        x = self.shared_conv(x)
        maps = [tensor for head in self.task_heads for tensor in head(x).values()]
        return dict(zip(self.output_names, maps, strict=True))

"""CenterPoint, whole and in the two components that are deployed, with SECONDFPN and CenterHead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cp_debug.recipes.centerpoint.config import HEAD_CHANNELS, OUTPUT_ORDER, CenterPointConfig
from cp_debug.recipes.centerpoint.pillar_encoder import PFNLayer, PillarFeatureNet, decorate
from cp_debug.recipes.centerpoint.scatter import scatter
from cp_debug.recipes.centerpoint.second import SECOND, conv_bn_relu
from cp_debug.recipes.centerpoint.voxelize import Voxels, voxelize_batch


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

"""CenterHead: one shared convolution, then a small stack for every output of every task."""

from __future__ import annotations

from torch import Tensor, nn

from cp_debug.recipes.centerpoint.config import HEAD_CHANNELS, OUTPUT_ORDER, CenterPointConfig


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

"""SECOND: the backbone on the bird's-eye canvas."""

from __future__ import annotations

from torch import Tensor, nn

from cp_debug.recipes.centerpoint.config import CenterPointConfig


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

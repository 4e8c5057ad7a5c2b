"""Faults of range: numbers that a narrow type cannot hold, and numbers that are none."""

from __future__ import annotations

from torch import Tensor, nn

from cp_debug.bisect.faults.base import Fault, Seeded
from cp_debug.bisect.faults.edits import quantize, zero_times_infinity
from cp_debug.bisect.faults.seeding import edited
from cp_debug.recipes.centerpoint.model import CenterPoint
from cp_debug.recipes.centerpoint.recipe import CenterPointModel

_CHAIN = tuple(
    (f"pts_backbone.blocks.{c}", f"pts_backbone.blocks.{n}")
    for c, n in (("1.0", "1.1"), ("1.3", "1.4"), ("1.6", "1.7"), ("2.0", "2.1"))
)
"""Convolution and BatchNorm of successive layers of the backbone, each read by the next one …"""
_ALSO = {"pts_backbone.blocks.1.7": "pts_neck.deblocks.1.0"}
"""BatchNorm that ends a block of the backbone → convolution of the neck that reads it."""


def _rescaled(scales: tuple[float, ...], where: str, layer: str) -> Seeded:
    """A model whose inner values are multiplied by ``scales``, layer after layer, and whose function is the same: with
    powers of two bit for bit in FP32. Both backends run it; FP16 cannot."""
    model = CenterPointModel("tiny")
    before = 1.0
    for (convolution, norm), after in zip(_CHAIN, scales, strict=False):
        _parameter(model.network, convolution, "weight").div_(before)
        for name in ("weight", "bias"):
            _parameter(model.network, norm, name).mul_(after)
        if norm in _ALSO:
            _parameter(model.network, _ALSO[norm], "weight").div_(after)
        before = after
    return Seeded(model, where, (layer,), backends="torch,emu-fp16")


def _parameter(network: CenterPoint, path: str, name: str) -> Tensor:
    module: nn.Module = network.get_submodule(path)
    return module.get_parameter(name).data


RANGES = (
    Fault("fp16-overflow", "activations beyond 65504 in a network that is right in FP32", "NaN boxes with FP16 alone",
          lambda: _rescaled((2.0**13, 2.0**6, 1.0),
                            "pts_backbone.blocks.1.1 × 8192, undone by the next two layers",
                            "pts_backbone.blocks.1.1")),
    Fault("fp16-underflow", "activations that vanish in FP16", "weak objects disappear with FP16 alone",
          lambda: _rescaled((2.0**-10, 2.0**-18, 2.0**-8, 1.0),
                            "pts_backbone.blocks.1.4 ÷ 262144, prepared before and undone behind",
                            "pts_backbone.blocks.1.4")),
    Fault("zero-times-infinity", "a scale overflowed to Inf: 0·Inf is NaN", "NaN in every output",
          lambda: edited("pts_neck.deblocks.1.2 × Inf", {"pts_neck.deblocks.1.2": zero_times_infinity})),
    Fault("int8-clipped", "an INT8 scale four times too small cuts the peaks off", "confident objects lose their score",
          lambda: edited("INT8 quantizer saturating at 4.0 behind pts_neck.deblocks.0.2",
                         {"pts_neck.deblocks.0.2": lambda editor, value: quantize(editor, value, 4.0)})),
)  # fmt: skip

"""AWML's ``--rot-y-axis-reference``: yaw counted from the y axis, as Autoware's node reads it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cp_debug.recipes.centerpoint.model import BackboneNeckHead

_ORDER = {"dim": [1, 0, 2], "rot": [1, 0]}


def turn(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Head maps [B, channels, H, W] in the other convention; doing it twice changes nothing.

    (length, width, height) becomes (width, length, height), (sin, cos) becomes (−cos, −sin).
    """
    turned = dict(maps)
    for name, tensor in maps.items():
        head = name.rpartition(".")[2]
        if head in _ORDER:
            reordered = tensor[:, _ORDER[head]]
            turned[name] = -reordered if head == "rot" else reordered
    return turned


class TurnedBackboneNeckHead(BackboneNeckHead):
    """``BackboneNeckHead`` with yaw counted from the y axis in its outputs."""

    def forward(self, spatial_features: Tensor) -> tuple[Tensor, ...]:
        """``spatial_features`` [B, C, ny, nx] to the turned maps, in the order of ``config.output_names``."""
        maps = super().forward(spatial_features)
        names = self.pts_bbox_head.output_names
        return tuple(turn(dict(zip(names, maps, strict=True))).values())

"""Faults in the weights: BatchNorm's epsilon and statistics, the order of channels."""

from __future__ import annotations

import torch

from cp_debug.bisect.demos import Fault, Seeded, changed
from cp_debug.recipes.centerpoint.model import CenterPoint


def _batch_norm_eps() -> Seeded:
    def change(network: CenterPoint) -> None:
        norm = network.get_submodule("pts_backbone.blocks.0.4")
        assert isinstance(norm, torch.nn.BatchNorm2d)
        norm.eps = 1e-5

    return changed(change, "eps 1e-5 instead of 1e-3 in pts_backbone.blocks.0.4", "pts_backbone.blocks.0.4")


def _stale_statistics() -> Seeded:
    def change(network: CenterPoint) -> None:
        norm = network.get_submodule("pts_neck.deblocks.2.1")
        assert isinstance(norm, torch.nn.BatchNorm2d)
        norm.reset_running_stats()

    return changed(change, "mean 0 and variance 1 in pts_neck.deblocks.2.1", "pts_neck.deblocks.2.1")


def _swapped_dimensions() -> Seeded:
    def change(network: CenterPoint) -> None:
        head = network.get_submodule("pts_bbox_head.task_heads.0.dim.1")
        for parameter in head.parameters():
            parameter.data = parameter.data[[1, 0, 2]]

    return changed(change, "length and width of task 0 change places", "pts_bbox_head.task_heads.0.dim.1")


WEIGHTS = (
    Fault("bn-eps", "BatchNorm was built with torch's default eps", "a small offset everywhere after export",
          _batch_norm_eps),
    Fault("stale-statistics", "BatchNorm's running statistics were never loaded", "objects of one scale are missed",
          _stale_statistics),
    Fault("swapped-dimensions", "length and width are exchanged in the box head", "every box is rotated by 90°",
          _swapped_dimensions),
)  # fmt: skip

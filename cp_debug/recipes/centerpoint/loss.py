"""CenterPoint's training loss, as mmdet3d 1.4.0's ``CenterHead.loss`` defines it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cp_debug.recipes.centerpoint.config import HEAD_CHANNELS, OUTPUT_ORDER
from cp_debug.recipes.centerpoint.targets import TaskTargets

CODE_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)
BOX_WEIGHT = 0.25


class Loss(NamedTuple):
    """CenterPoint's two losses, each a scalar summed over the tasks."""

    heatmap: Tensor
    box: Tensor

    @property
    def total(self) -> Tensor:
        """The loss that training minimizes."""
        return self.heatmap + self.box


def gaussian_focal_loss(logits: Tensor, target: Tensor, alpha: float = 2.0, gamma: float = 4.0) -> Tensor:
    """CornerNet's focal loss of a Gaussian heatmap, divided by the number of peaks (``target == 1``).

    ``logits`` and ``target`` [B, classes, H, W]; returns a scalar. Law and Deng, CornerNet (2018), equation 1.
    """
    score = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    peak = target == 1
    positive = -score.log() * (1 - score) ** alpha
    negative = -(1 - score).log() * score**alpha * (1 - target) ** gamma
    return torch.where(peak, positive, negative).sum() / peak.sum().clamp(min=1)


def centerpoint_loss(outputs: dict[str, Tensor], targets: Sequence[TaskTargets]) -> Loss:
    """The loss of a model's outputs (heatmaps as logits, tasks in order) against the targets of the same batch."""
    maps = list(outputs.values())
    heatmap_loss, box_loss = maps[0].new_zeros(()), maps[0].new_zeros(())
    for index, task in enumerate(targets):
        heads = dict(zip(OUTPUT_ORDER, maps[index * len(OUTPUT_ORDER) :], strict=False))
        heatmap_loss = heatmap_loss + gaussian_focal_loss(heads["heatmap"], task.heatmap)
        predicted = torch.cat([heads[name][task.sample, :, task.row, task.column] for name in HEAD_CHANNELS], dim=1)
        values = torch.where(task.values.isnan(), predicted.detach(), task.values)  # unknown velocities teach nothing
        error = (predicted - values).abs() * predicted.new_tensor(CODE_WEIGHTS)
        box_loss = box_loss + BOX_WEIGHT * error.sum() / (len(error) + 1e-4)
    return Loss(heatmap_loss, box_loss)

"""CenterPoint's training targets and loss, as mmdet3d 1.4.0's ``CenterHead`` defines them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cp_debug.recipes.centerpoint.config import HEAD_CHANNELS, OUTPUT_ORDER, CenterPointConfig

MIN_OVERLAP = 0.1
MIN_RADIUS = 2


class TaskTargets(NamedTuple):
    """Targets of one task; K objects of the whole batch stand in its classes and inside the range."""

    heatmap: Tensor
    """[B, classes, H, W]: 1 in the centre's cell, a Gaussian around it."""
    values: Tensor
    """[K, 10]: offset in the cell (2), z, log of l, w, h, sin and cos of yaw, velocity (2)."""
    sample: Tensor
    """[K] index into the batch."""
    row: Tensor
    """[K] the centre's cell along y."""
    column: Tensor
    """[K] the centre's cell along x."""


def gaussian_radius(length: Tensor, width: Tensor, min_overlap: float = MIN_OVERLAP) -> Tensor:
    """CornerNet's radius in cells: boxes shifted by less than it still overlap by ``min_overlap`` (IoU).

    ``length`` and ``width`` [K] in cells give [K]. The minimum over its three cases, with the roots as CornerNet
    published them and mmdet3d kept them.
    """
    total, area = length + width, length * width
    roots = (
        (1, total, area * (1 - min_overlap) / (1 + min_overlap)),
        (4, 2 * total, area * (1 - min_overlap)),
        (4 * min_overlap, -2 * min_overlap * total, area * (min_overlap - 1)),
    )
    return torch.stack([(b + (b**2 - 4 * a * c).sqrt()) / 2 for a, b, c in roots]).amin(dim=0)


def make_targets(boxes: Sequence[Tensor], labels: Sequence[Tensor], config: CenterPointConfig) -> list[TaskTargets]:
    """One TaskTargets a task, from boxes [M, 9] (gravity centre, l, w, h, yaw, velocity) and labels [M] of each sample.

    Labels index ``config.class_names``. Objects whose centre is out of range are left out.
    """
    sample = torch.cat([torch.full_like(sample_labels, index) for index, sample_labels in enumerate(labels)])
    box, label = torch.cat(list(boxes)), torch.cat(list(labels))
    cell = box.new_tensor(config.voxel_size[:2]) * config.out_size_factor
    centre = (box[:, :2] - box.new_tensor(config.point_cloud_range[:2])) / cell
    width, height = (size // config.out_size_factor for size in config.grid[:2])
    inside = ((centre >= 0) & (centre < centre.new_tensor((width, height)))).all(dim=1)

    targets, first_label = [], 0
    for task in config.tasks:
        chosen = inside & (label >= first_label) & (label < first_label + len(task))
        at, size, column, row = centre[chosen], box[chosen, 3:5] / cell, *centre[chosen].long().unbind(1)
        radius = gaussian_radius(size[:, 0], size[:, 1]).long().clamp(min=MIN_RADIUS)
        shape = (len(boxes), len(task), height, width)
        channel = sample[chosen] * len(task) + label[chosen] - first_label
        targets.append(
            TaskTargets(
                heatmap=_draw(channel, column, row, radius, shape),
                values=_encode(box[chosen], at),
                sample=sample[chosen],
                row=row,
                column=column,
            )
        )
        first_label += len(task)
    return targets


def _encode(box: Tensor, centre: Tensor) -> Tensor:
    """Regression targets [K, 10] of boxes [K, 9] whose centres are at [K, 2] in cells."""
    yaw = box[:, 6:7]
    return torch.cat(
        (centre - centre.floor(), box[:, 2:3], box[:, 3:6].log(), yaw.sin(), yaw.cos(), box[:, 7:9]), dim=1
    )


def _draw(channel: Tensor, column: Tensor, row: Tensor, radius: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Heatmaps of ``shape``: at each cell the maximum of the Gaussians, each cut off beyond its radius."""
    batch, classes, height, width = shape
    variance = ((2 * radius + 1) / 6).square()

    def along(positions: Tensor, size: int) -> Tensor:
        distance = (torch.arange(size, device=positions.device) - positions[:, None]).abs()
        bell = torch.exp(-distance.square() / (2 * variance[:, None]))
        return torch.where(distance <= radius[:, None], bell, 0.0)

    bells = along(row, height).unsqueeze(2) * along(column, width).unsqueeze(1)
    heatmap = bells.new_zeros(batch * classes, height, width)
    return heatmap.scatter_reduce(0, channel[:, None, None].expand_as(bells), bells, "amax").view(shape)


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

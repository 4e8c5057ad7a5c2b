"""Head maps to boxes: mmdet3d's CenterPointBBoxCoder, circle or rotated NMS and ``CenterHead.predict_by_feat``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cp_debug.recipes.centerpoint.config import OUTPUT_ORDER, CenterPointConfig

_CORNERS = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])


def intersection_areas(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Common area [K] of the rectangles in each row of ``a`` and ``b`` [K, 5]: x, y, length, width, yaw.

    The border of ``a``, in the frame of ``b``, with each point outside moved to the nearest of ``b``: what is outside
    collapses onto the border of ``b`` and encloses nothing, so the curve encloses the intersection. It bends where an
    edge crosses a side's line. Lengths in metres, angles in radians, areas in m².
    """
    corners, limits = _corners(a, b), b[:, None, 2:4] / 2
    steps = np.roll(corners, -1, axis=1) - corners
    with np.errstate(divide="ignore", invalid="ignore"):
        crossings = np.concatenate(((-limits - corners) / steps, (limits - corners) / steps), axis=-1)
    bends = np.sort(np.clip(np.nan_to_num(crossings), 0, 1), axis=-1)
    bends = np.concatenate((np.zeros_like(bends[..., :1]), bends), axis=-1)[..., None]
    curve = np.clip(corners[:, :, None] + bends * steps[:, :, None], -limits[:, None], limits[:, None])
    x, y = np.moveaxis(curve.reshape(len(a), 4 * 5, 2), -1, 0)
    return (x * np.roll(y, -1, axis=1) - y * np.roll(x, -1, axis=1)).sum(axis=1) / 2


def _corners(of: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Corners [K, 4, 2] of the rectangles, counter-clockwise, in the frames of others (their centres, their axes)."""
    local = _CORNERS * of[:, None, 2:4]
    return _turned(_turned(local, of[:, 4]) + (of[:, :2] - frame[:, :2])[:, None], -frame[:, 4])


def _turned(points: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    cos, sin = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    x, y = points[..., 0], points[..., 1]
    return np.stack((x * cos - y * sin, x * sin + y * cos), axis=-1)


@dataclass(frozen=True)
class Detections:
    """Boxes of one sample, task by task, best first within a task."""

    boxes: np.ndarray
    """[N, 9] float32: x, y, z of the *bottom* centre (as mmdet3d predicts), length, width, height, yaw, vx, vy."""
    scores: np.ndarray
    """[N] float32 in (0, 1)."""
    labels: np.ndarray
    """[N] int32, index into ``class_names``."""
    class_names: tuple[str, ...] = ()


def decode(outputs: Mapping[str, Tensor], config: CenterPointConfig, *, nms: bool = True) -> list[Detections]:
    """Decode head maps into one ``Detections`` a sample.

    ``outputs`` has ``config.output_names``, each [B, channels, H, W], heatmaps as logits. ``nms=False`` leaves out the
    suppression; z is the bottom in both cases.
    """
    names = iter(config.output_names)
    maps = [{head: outputs[next(names)] for head in OUTPUT_ORDER} for _ in config.tasks]
    batch_size = len(maps[0]["heatmap"])
    samples = []
    for sample in range(batch_size):
        parts, first_label = [], 0
        for task, task_maps in enumerate(maps):
            boxes, scores, labels = decode_task({head: tensor[sample] for head, tensor in task_maps.items()}, config)
            if nms:
                kept = survivors(boxes, scores, config, task)[: config.post_max_size]
                boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
            boxes[:, 2] -= boxes[:, 5] * np.float32(0.5)
            parts.append((boxes, scores, labels + np.int32(first_label)))
            first_label += len(config.tasks[task])
        boxes, scores, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        samples.append(Detections(boxes, scores, labels, config.class_names))
    return samples


def decode_task(maps: Mapping[str, Tensor], config: CenterPointConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best ``max_num`` peaks of one task's maps [channels, H, W]: boxes [N, 9] (z of the centre), scores, labels [N].

    Peaks at or below ``score_threshold`` and centres outside ``post_center_range`` are left out. ``dim`` is the
    logarithm of the size, ``rot`` is (sin, cos).
    """
    heatmap = maps["heatmap"].float().sigmoid()
    width, area = heatmap.shape[2], heatmap[0].numel()
    # Best of each class first, then of those, as mmdet3d does it: that decides which of equal scores is kept.
    class_scores, class_cells = heatmap.flatten(1).topk(min(config.max_num, area))
    scores, index = class_scores.flatten().topk(class_scores.shape[1])
    labels, cell = index // class_scores.shape[1], class_cells.flatten()[index]

    at = {head: maps[head].float().flatten(1)[:, cell] for head in OUTPUT_ORDER[1:]}
    sizes, origin = config.voxel_size, config.point_cloud_range
    x = (cell % width + at["reg"][0]) * config.out_size_factor * sizes[0] + origin[0]
    y = (cell // width + at["reg"][1]) * config.out_size_factor * sizes[1] + origin[1]
    yaw = torch.atan2(at["rot"][0], at["rot"][1])
    boxes = torch.stack((x, y, at["height"][0], *at["dim"].exp(), yaw, *at["vel"]), dim=1)

    limits = boxes.new_tensor(config.post_center_range)
    inside = ((boxes[:, :3] >= limits[:3]) & (boxes[:, :3] <= limits[3:])).all(dim=1)
    passing = inside & (scores > config.score_threshold)
    boxes, scores, labels = boxes[passing], scores[passing], labels[passing].int()
    return boxes.detach().cpu().numpy(), scores.detach().cpu().numpy(), labels.cpu().numpy()


def survivors(boxes: np.ndarray, scores: np.ndarray, config: CenterPointConfig, task: int) -> np.ndarray:
    """Indices [K] of the boxes [N, 9] of one task that the configuration's NMS keeps, best first; ``scores`` [N]."""
    if config.nms_overlap is None:
        return circle_nms(boxes[:, :2], scores, config.nms_min_radius[task])
    best = np.argsort(-scores, kind="stable")[: config.nms_pre_max_size]
    return best[rotated_nms(boxes[best][:, [0, 1, 3, 4, 6]], scores[best], config.nms_overlap)]


def circle_nms(centres: np.ndarray, scores: np.ndarray, min_radius: float) -> np.ndarray:
    """Indices [K] that survive, best first: a box within a *squared* distance of ``min_radius`` of a better one goes.

    ``centres`` [N, 2] in metres, ``scores`` [N], ``min_radius`` in m².
    """
    return _greedy(scores, lambda best, others: ((centres[others] - centres[best]) ** 2).sum(axis=1) > min_radius)


def rotated_nms(rectangles: np.ndarray, scores: np.ndarray, limit: float) -> np.ndarray:
    """Indices [K] that survive, best first: a rectangle that overlaps a better one by more than ``limit`` goes.

    ``rectangles`` [N, 5]: x, y, length, width in metres, yaw in radians; ``scores`` [N]; ``limit`` is an intersection
    over union, as in mmdet3d's ``nms_bev``.
    """
    rectangles = rectangles.astype(np.float64)
    areas = np.abs(rectangles[:, 2:4]).prod(axis=1)

    def apart(best: int, others: np.ndarray) -> np.ndarray:
        common = intersection_areas(np.repeat(rectangles[[best]], len(others), 0), rectangles[others])
        union = areas[best] + areas[others] - common
        return ~(np.divide(common, union, out=np.zeros_like(union), where=union > 0) > limit)

    return _greedy(scores, apart)


def _greedy(scores: np.ndarray, apart: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """Indices that survive, best first; ``apart``: which of some others stay beside a better one."""
    remaining = np.argsort(-scores, kind="stable")
    survivors = []
    while remaining.size:
        best, remaining = remaining[0], remaining[1:]
        survivors.append(best)
        remaining = remaining[apart(best, remaining)]
    return np.array(survivors, dtype=np.int64)

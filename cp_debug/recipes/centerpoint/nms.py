"""Suppression of boxes that better ones make superfluous: circle and rotated NMS as in mmdet3d."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cp_debug.recipes.centerpoint.config import CenterPointConfig
from cp_debug.recipes.centerpoint.rectangles import intersection_areas


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

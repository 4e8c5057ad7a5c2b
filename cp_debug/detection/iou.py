"""Intersection over union of turned boxes, many pairs at a time."""

from __future__ import annotations

import numpy as np

from cp_debug.detection.boxes import Boxes, Floats, Ints
from cp_debug.recipes.centerpoint.rectangles import intersection_areas


def overlaps(a: Boxes, b: Boxes, of_a: Ints, of_b: Ints, *, bev: bool) -> Floats:
    """Intersection over union of the pairs ``of_a``, ``of_b`` (indices of one shape); NaN where a box is not finite.

    ``bev`` takes the rectangles seen from above, else the boxes, which stand upright. float64, in the shape of the
    indices; sizes in metres, angles in radians.
    """
    gap = np.linalg.norm(a.centers[of_a] - b.centers[of_b], axis=-1)
    reach = np.linalg.norm(a.sizes[:, :2], axis=1)[of_a] + np.linalg.norm(b.sizes[:, :2], axis=1)[of_b]
    result = np.where(a.finite[of_a] & b.finite[of_b], 0.0, np.nan)
    near = (gap < reach / 2) & (result == 0)
    first, second = a.take(of_a[near]), b.take(of_b[near])
    common = intersection_areas(_rectangles(first), _rectangles(second))
    volumes = [np.abs(boxes.sizes[:, :2]).prod(axis=1) for boxes in (first, second)]
    if not bev:
        top = np.minimum(*(boxes.heights + boxes.sizes[:, 2] / 2 for boxes in (first, second)))
        bottom = np.maximum(*(boxes.heights - boxes.sizes[:, 2] / 2 for boxes in (first, second)))
        common = common * np.maximum(top - bottom, 0)
        volumes = [area * boxes.sizes[:, 2] for area, boxes in zip(volumes, (first, second), strict=True)]
    union = volumes[0] + volumes[1] - common
    result[near] = np.divide(common, union, out=np.zeros_like(union), where=union > 0)
    return result


def _rectangles(boxes: Boxes) -> Floats:
    return np.column_stack((boxes.centers, np.abs(boxes.sizes[:, :2]), boxes.yaws))

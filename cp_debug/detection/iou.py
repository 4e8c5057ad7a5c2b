"""Intersection over union of turned boxes, many pairs at a time."""

from __future__ import annotations

import numpy as np

from cp_debug.detection.boxes import Boxes, Floats, Ints

_CORNERS = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])


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


def intersection_areas(a: Floats, b: Floats) -> Floats:
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


def _corners(of: Floats, frame: Floats) -> Floats:
    """Corners [K, 4, 2] of the rectangles, counter-clockwise, in the frames of others (their centres, their axes)."""
    local = _CORNERS * of[:, None, 2:4]
    return _turned(_turned(local, of[:, 4]) + (of[:, :2] - frame[:, :2])[:, None], -frame[:, 4])


def _turned(points: Floats, yaw: Floats) -> Floats:
    cos, sin = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    x, y = points[..., 0], points[..., 1]
    return np.stack((x * cos - y * sin, x * sin + y * cos), axis=-1)

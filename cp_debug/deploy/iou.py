"""Intersection over union of turned boxes, many pairs at a time."""

from __future__ import annotations

import numpy as np

from cp_debug.deploy.objects import Boxes, Floats, Ints

MARGIN = 1e-7
"""Metres by which each side of the first rectangle is moved inwards, so that no two edges coincide."""
_CORNERS = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])


def overlaps(a: Boxes, b: Boxes, of_a: Ints, of_b: Ints, *, bev: bool) -> Floats:
    """Intersection over union of the pairs ``of_a``, ``of_b`` (indices of one shape); NaN where a box is not finite.

    ``bev``: of the rectangles seen from above, else of the boxes, which stand upright.
    """
    gap = np.linalg.norm(a.centers[of_a] - b.centers[of_b], axis=-1)
    reach = np.linalg.norm(a.sizes[:, :2], axis=1)[of_a] + np.linalg.norm(b.sizes[:, :2], axis=1)[of_b]
    found = np.where(a.finite[of_a] & b.finite[of_b], 0.0, np.nan)
    near = (gap < reach / 2) & (found == 0)
    first, second = a.take(of_a[near]), b.take(of_b[near])
    common = intersection_areas(_rectangles(first), _rectangles(second))
    volumes = [np.abs(boxes.sizes[:, :2]).prod(axis=1) for boxes in (first, second)]
    if not bev:
        top = np.minimum(*(boxes.heights + boxes.sizes[:, 2] / 2 for boxes in (first, second)))
        bottom = np.maximum(*(boxes.heights - boxes.sizes[:, 2] / 2 for boxes in (first, second)))
        common = common * np.maximum(top - bottom, 0)
        volumes = [area * boxes.sizes[:, 2] for area, boxes in zip(volumes, (first, second), strict=True)]
    union = volumes[0] + volumes[1] - common
    found[near] = np.divide(common, union, out=np.zeros_like(union), where=union > 0)
    return found


def _rectangles(boxes: Boxes) -> Floats:
    return np.column_stack((boxes.centers, np.abs(boxes.sizes[:, :2]), boxes.yaws))


def intersection_areas(a: Floats, b: Floats) -> Floats:
    """Common area [K] of the rectangles in each row of ``a`` and ``b`` [K, 5]: x, y, length, width, yaw.

    By Green's theorem: the border of the intersection is what of each one's border is inside the other. Right to about
    ``MARGIN`` times the perimeter.
    """
    a = np.column_stack((a[:, :2], a[:, 2:4] - 2 * MARGIN, a[:, 4]))
    corners_a, corners_b = _corners(a, b), _corners(b, b)
    inside_b, inside_a = _share_inside(corners_a, b[:, 2:4] / 2), _share_inside(_corners(b, a), a[:, 2:4] / 2)
    area = (inside_b * _turning(corners_a)).sum(axis=1) + (inside_a * _turning(corners_b)).sum(axis=1)
    return np.maximum(area / 2, 0)


def _corners(of: Floats, frame: Floats) -> Floats:
    """Corners [K, 4, 2] of the rectangles, counter-clockwise, in the frames of others (their centres, their axes)."""
    local = _CORNERS * of[:, None, 2:4]
    return _turned(_turned(local, of[:, 4]) + (of[:, :2] - frame[:, :2])[:, None], -frame[:, 4])


def _turned(points: Floats, yaw: Floats) -> Floats:
    cos, sin = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    x, y = points[..., 0], points[..., 1]
    return np.stack((x * cos - y * sin, x * sin + y * cos), axis=-1)


def _turning(corners: Floats) -> Floats:
    """Cross product [K, 4] of each edge's ends: twice the area that it sweeps about the origin."""
    following = np.roll(corners, -1, axis=1)
    return corners[..., 0] * following[..., 1] - corners[..., 1] * following[..., 0]


def _share_inside(corners: Floats, half: Floats) -> Floats:
    """Share [K, 4] of each edge that is within ±``half`` [K, 2] in both axes (a slab test)."""
    steps = np.roll(corners, -1, axis=1) - corners
    limits = half[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = np.sort(np.stack(((-limits - corners) / steps, (limits - corners) / steps)), axis=0)
    level = steps == 0
    within = np.abs(corners) <= limits
    enter = np.where(level, np.where(within, -np.inf, np.inf), ends[0]).max(axis=-1)
    leave = np.where(level, np.where(within, np.inf, -np.inf), ends[1]).min(axis=-1)
    return np.maximum(np.minimum(leave, 1) - np.maximum(enter, 0), 0)

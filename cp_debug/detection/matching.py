"""Matching of predictions to objects, by the distance of centres or the overlap of turned boxes: greedily by falling
confidence, as the nuScenes devkit does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cp_debug.detection.boxes import Boxes, Floats, Ints, Objects
from cp_debug.recipes.centerpoint.rectangles import intersection_areas

THRESHOLDS = (0.5, 1.0, 2.0, 4.0)
"""Distances in metres within which a detection may match an object."""

Cost = Callable[[Ints, Ints], Floats]
"""Distances [n, P] from predictions [n] to the candidate objects of each [n, P]; NaN for what cannot match."""


def confidence_order(scores: Floats) -> Ints:
    """Indices by falling score; of equal scores the later comes first, as in the devkit's reversed sort.

    ``scores`` [N] float64; indices [N] int64.
    """
    return np.argsort(scores, kind="stable")[::-1]


def match_centers(predicted: Objects, truth: Objects, thresholds: Sequence[float] = THRESHOLDS) -> Ints:
    """Index of the object that each prediction matches at each threshold in metres, -1 for none: [T, N].

    In order of falling confidence each prediction takes the nearest object of its sample that is still free, if it is
    nearer than the threshold. Labels are ignored.
    """

    def distance(ours: Ints, theirs: Ints) -> Floats:
        return np.linalg.norm(truth.centers[theirs] - predicted.centers[ours, None], axis=-1)

    return _match(predicted, truth, thresholds, distance)


def match_overlaps(predicted: Boxes, truth: Boxes, thresholds: Sequence[float], *, bev: bool) -> Ints:
    """``match_centers`` by intersection over union, which must be above the threshold: [T, N].

    ``bev`` takes the rectangles seen from above, else the boxes. Indices are int64; thresholds are ratios from 0 to 1.
    """

    def distance(ours: Ints, theirs: Ints) -> Floats:
        return 1 - overlaps(predicted, truth, np.broadcast_to(ours[:, None], theirs.shape), theirs, bev=bev)

    return _match(predicted, truth, [1 - threshold for threshold in thresholds], distance)


def _match(predicted: Objects, truth: Objects, limits: Sequence[float], cost: Cost) -> Ints:
    """Index of the matched object for each limit and prediction [T, N], -1 for none.

    The k-th predictions of all samples are matched in one step.
    """
    levels = np.asarray(limits, dtype=np.float64)[:, None]
    matched = np.full((len(levels), len(predicted)), -1, dtype=np.int64)
    if not len(truth) or not len(predicted):
        return matched
    names, rows = np.unique(np.concatenate((truth.samples, predicted.samples)), return_inverse=True)
    truth_rows, rows = rows[: len(truth)], rows[len(truth) :]
    place = _position_in_group(truth_rows)
    table = np.full((len(names), place.max() + 1), -1)
    table[truth_rows, place] = np.arange(len(place))

    order = confidence_order(predicted.scores)
    turn = np.empty_like(order)
    turn[order] = _position_in_group(rows[order])
    free = np.repeat((table >= 0)[None], len(levels), axis=0)
    for step in np.split(np.argsort(turn, kind="stable"), np.cumsum(np.bincount(turn))[:-1]):
        distance = cost(step, table[rows[step]])
        distance = np.where(free[:, rows[step]] & ~np.isnan(distance), distance, np.inf)
        nearest = distance.argmin(axis=-1)
        level, hit = np.nonzero(np.take_along_axis(distance, nearest[..., None], axis=-1)[..., 0] < levels)
        partners = nearest[level, hit]
        free[level, rows[step][hit], partners] = False
        matched[level, step[hit]] = table[rows[step][hit], partners]
    return matched


def _position_in_group(groups: Ints) -> Ints:
    """Number of earlier elements in the same group: [0, 0, 1, 2] for groups [7, 3, 7, 7]."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    position = np.empty_like(order)
    position[order] = np.arange(len(groups)) - np.searchsorted(ordered, ordered)
    return position


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

"""Detection metrics as the nuScenes devkit (1.2.0, ``detection_cvpr_2019``) defines them, and KITTI's AP by overlap.

Predictions are matched to objects greedily by falling confidence, as the devkit does it: by the distance of centres or
the overlap of turned boxes. All metrics are computed for many *draws* at once: a draw is a weight for each sample, all
ones for the score itself, and how often the bootstrap drew each sample for a confidence interval. Matching happens
within a sample, so that one matching serves all draws; a sample of weight k counts as k equal ones.

A curve of recall and precision has a point for every drawn prediction and is straight between them. Recall grows at
hits alone: whatever recall is looked for, its neighbours are a hit and what was drawn last before it. Predictions that
were not drawn stay in the arrays with weight 0; they add nothing, and no recall is first reached there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from cp_debug.detection.boxes import Boxes, Floats, Ints, Objects
from cp_debug.recipes.centerpoint.decode import intersection_areas

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


TP_THRESHOLD = 2.0
"""Distance in metres within which a detection's errors are taken."""

ERRORS = ("ATE", "ASE", "AOE", "AVE", "AAE")
"""Errors of true positives: translation (m), scale (1 − IoU of the aligned boxes), orientation (rad), velocity (m/s),
attribute (1 − accuracy)."""
UNDEFINED = {"traffic_cone": ("AOE", "AVE", "AAE"), "barrier": ("AVE", "AAE")}
"""Errors that nuScenes does not ask of a class."""
HALF_TURN = ("barrier",)
"""Classes whose front is like their back."""
MAP_WEIGHT = 5
"""Weight of mAP in NDS; each error has weight 1."""
BLOCK = 2**15
"""Draws × predictions worked on at once: such arrays stay in the cache."""

OVERLAPS = (0.5, 0.7)


def average_precision(predicted: Objects, truth: Objects, thresholds: Sequence[float] = THRESHOLDS) -> Floats:
    """AP of one class at each threshold [T]; 0 where nothing matches and, as in the devkit, without any object.

    float64; thresholds in metres. As ``curves.average_precision``.
    """
    samples = max(int(group.samples.max(initial=-1)) for group in (predicted, truth)) + 1
    curves = Curves(predicted, truth, np.ones((1, samples)))
    return np.array([curves.average_precision(row)[0] for row in match_centers(predicted, truth, thresholds)])


def class_average_precisions(predicted: Objects, truth: Objects, num_classes: int) -> Floats:
    """AP of every class at each of ``THRESHOLDS`` [C, T]; its mean is the mAP."""
    return np.stack([average_precision(predicted.of_class(c), truth.of_class(c)) for c in range(num_classes)])


@dataclass(frozen=True)
class Scores:
    """Figures of C classes in B draws.

    precisions: [B, C, 4] AP by centre distance. errors: [B, C, 5], NaN where not asked. bev, volume: [B, C, 2] AP by
    overlap (0.5, 0.7) seen from above and of the boxes. found: [B, C] number of objects found within 2 m.
    """

    precisions: Floats
    errors: Floats
    bev: Floats
    volume: Floats
    found: Floats

    def summary(self) -> dict[str, Floats]:
        """Name → figure [B]: mAP, NDS, the mean errors over the classes that have them, and mAP by overlap.

        NDS = (5 mAP + Σ max(1 − error, 0)) / 10: Caesar et al., nuScenes (2020), equation 3.
        """
        mean_ap = self.precisions.mean(axis=(1, 2))
        is_defined = ~np.isnan(self.errors)
        errors = np.where(is_defined, self.errors, 0).sum(axis=1) / np.maximum(is_defined.sum(axis=1), 1)
        good = np.maximum(1 - errors, 0).sum(axis=1)
        figures = {"mAP": mean_ap, "NDS": (MAP_WEIGHT * mean_ap + good) / (MAP_WEIGHT + len(ERRORS))}
        figures |= {f"m{name}": errors[:, index] for index, name in enumerate(ERRORS)}
        for kind, values in (("BEV", self.bev), ("3D", self.volume)):
            figures |= {f"{kind} AP@{limit}": values[..., index].mean(axis=1) for index, limit in enumerate(OVERLAPS)}
        return figures


def score(predicted: Boxes, truth: Boxes, class_names: Sequence[str], weights: Floats) -> Scores:
    """All metrics in each draw; ``samples`` of the boxes index ``weights`` [B, S]."""
    classes = [
        _score_class(predicted.of_class(label), truth.of_class(label), name, weights)
        for label, name in enumerate(class_names)
    ]
    return Scores(*(np.stack(figures, axis=1) for figures in zip(*classes, strict=True)))


def _score_class(predicted: Boxes, truth: Boxes, name: str, weights: Floats) -> tuple[Floats, ...]:
    """Fields of ``Scores`` for one class, without the axis of the classes."""
    matches = match_centers(predicted, truth)
    overlapping = [match_overlaps(predicted, truth, OVERLAPS, bev=bev) for bev in (True, False)]
    near = matches[THRESHOLDS.index(TP_THRESHOLD)]
    errors = box_errors(predicted, truth, near, half_turn=name in HALF_TURN)

    def figures(weights: Floats) -> tuple[Floats, ...]:
        curves = Curves(predicted, truth, weights)
        mean_errors = curves.mean_errors(near, errors)
        mean_errors[:, [ERRORS.index(kind) for kind in UNDEFINED.get(name, ())]] = np.nan
        return (
            np.stack([curves.average_precision(matched) for matched in matches], axis=1),
            mean_errors,
            *(np.stack([curves.interpolated_precision(row) for row in rows], axis=1) for rows in overlapping),
            weights[:, predicted.samples[near >= 0]].sum(axis=1),
        )

    blocks = np.array_split(weights, math.ceil(len(weights) * max(len(predicted), 1) / BLOCK))
    return tuple(np.concatenate(blockwise) for blockwise in zip(*map(figures, blocks), strict=True))


def box_errors(predicted: Boxes, truth: Boxes, matched: Ints, *, half_turn: bool = False) -> Floats:
    """``ERRORS`` [5, N] of each prediction against the object that it found; NaN where it found none, or unknown.

    Errors in metres, 1 − IoU, radians, metres per second, and 0 or 1; ``matched`` [N] indexes ``truth``, −1 for none.
    As the nuScenes devkit defines them; ``half_turn`` takes angles modulo π.
    """
    errors = np.full((len(ERRORS), len(predicted)), np.nan)
    hits = np.flatnonzero(matched >= 0)
    ours, theirs = predicted.take(hits), truth.take(matched[hits])
    period = np.pi if half_turn else 2 * np.pi
    smaller = np.minimum(ours.sizes, theirs.sizes).prod(axis=1)
    union = ours.sizes.prod(axis=1) + theirs.sizes.prod(axis=1) - smaller
    errors[0, hits] = np.linalg.norm(ours.centers - theirs.centers, axis=1)
    errors[1, hits] = 1 - smaller / union
    errors[2, hits] = np.abs((theirs.yaws - ours.yaws + period / 2) % period - period / 2)
    errors[3, hits] = np.linalg.norm(ours.velocities - theirs.velocities, axis=1)
    errors[4, hits] = np.where(theirs.attributes == "", np.nan, ours.attributes != theirs.attributes)
    return errors


MIN_RECALL = 0.1
MIN_PRECISION = 0.1
RECALLS = np.linspace(0, 1, 101)[round(100 * MIN_RECALL) + 1 :]
"""The R recalls at which nuScenes samples a curve."""
OVERLAP_RECALLS = np.arange(1, 41) / 40
"""The 40 recalls at which KITTI (R40) samples a curve."""

T = TypeVar("T", bound=np.generic)


class Hits(NamedTuple):
    """Predictions that found an object: H of falling confidence, or some of them for each draw [B, R]."""

    places: Ints
    """[H] or [B, R] places among all predictions."""
    weights: Floats
    """[B, H] or [B, R]: how often a draw has each hit."""
    found: Floats
    """[B, H] or [B, R] weights of all hits so far, this one included."""


class Curves:
    """The curves of one class in B draws.

    ``predicted`` and ``truth`` are of that class; ``weights`` [B, S] say how often a draw has each sample. The methods
    take ``matched`` [N]: the object that each prediction found, -1 for none.
    """

    def __init__(self, predicted: Objects, truth: Objects, weights: Floats) -> None:
        self._order = confidence_order(predicted.scores)
        self._scores = predicted.scores[self._order]
        self._weights = weights.take(predicted.samples[self._order], axis=1)
        self._seen = self._weights.cumsum(axis=1)
        self._positives = np.maximum(weights[:, truth.samples].sum(axis=1, keepdims=True), 1)

    def average_precision(self, matched: Ints) -> Floats:
        """nuScenes' AP [B]: mean precision beyond ``MIN_RECALL``, less ``MIN_PRECISION``, scaled to reach 1.

        Precisions below ``MIN_PRECISION`` count as 0. Caesar et al., nuScenes (2020), section 3.1, as its devkit
        computes it.
        """
        hits = self._hits(matched)
        if not len(hits.places):
            return np.zeros(len(hits.weights))
        place, weights, hit_weight = reaching = self._reaching(hits)
        drawn_weight = _take(self._seen, place)
        upon = hit_weight / np.maximum(drawn_weight, 1)
        before = np.where(drawn_weight > weights, (hit_weight - weights) / np.maximum(drawn_weight - weights, 1), upon)
        end = hits.found[:, -1:] / np.maximum(self._seen[:, -1:], 1)
        beyond = self._at_recalls(reaching, before, upon, end)
        return np.maximum(beyond - MIN_PRECISION, 0).mean(axis=1) / (1 - MIN_PRECISION)

    def interpolated_precision(self, matched: Ints) -> Floats:
        """KITTI's AP (R40) [B]: over 40 recalls, the mean of the best precision at that recall or a higher one.

        ``B`` draws. Simonelli et al., Disentangling Monocular 3D Object Detection (2019), as KITTI's benchmark scores
        since.
        """
        places, weights, hit_weight = self._hits(matched)
        precision = np.column_stack(
            (hit_weight / np.maximum(self._seen.take(places, axis=1), 1), np.zeros(len(weights)))
        )
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        return _take(best, _search(hit_weight / self._positives, OVERLAP_RECALLS, "left")).mean(axis=1)

    def mean_errors(self, matched: Ints, errors: Floats) -> Floats:
        """Means [B, E] of each kind of error [E, N] over the recalls from ``MIN_RECALL`` to the highest reached.

        At a recall it is the running mean of the hits so far, NaN left out. 1 where that recall is not reached, and
        where all are NaN.
        """
        places, weights, _ = hits = self._hits(matched)
        means = np.ones((len(weights), len(errors)))
        if not len(places):
            return means
        confidence = self._confidence(hits)
        reached = np.logical_or.accumulate(confidence[:, ::-1] != 0, axis=1)[:, ::-1]
        count = reached.sum(axis=1)
        scores = self._scores[places]
        gap = np.searchsorted(-scores, -confidence)
        low, high = (_take(neighbours, gap) for neighbours in _drawn_neighbours(weights > 0))
        for index, row in enumerate(errors[:, self._order[places]]):
            running = _running_means(row, hits)
            values = _line(confidence, scores[low], _take(running, low), scores[high], _take(running, high))
            total = np.where(reached, values, 0).sum(axis=1)
            means[:, index] = np.divide(total, count, out=means[:, index], where=count > 0)
        return means

    def _hits(self, matched: Ints) -> Hits:
        places = np.flatnonzero(matched[self._order] >= 0)
        weights = self._weights.take(places, axis=1)
        return Hits(places, weights, weights.cumsum(axis=1))

    def _confidence(self, hits: Hits) -> Floats:
        """The score down to which predictions must be taken to reach each recall [B, R]; 0 where it is not reached."""
        place, _, _ = reaching = self._reaching(hits)
        lowest = np.minimum.accumulate(np.where(self._weights > 0, self._scores, np.inf), axis=1)
        upon = self._scores[place]
        before = np.where(place > 0, _take(lowest, np.maximum(place - 1, 0)), np.inf)
        before = np.where(np.isinf(before), upon, before)
        return self._at_recalls(reaching, before, upon, lowest[:, -1:])

    def _reaching(self, hits: Hits) -> Hits:
        """For each recall [B, R] the hit with which it is exceeded, or the last one."""
        number = np.minimum(_search(hits.found / self._positives, RECALLS, "right"), len(hits.places) - 1)
        return Hits(hits.places[number], _take(hits.weights, number), _take(hits.found, number))

    def _at_recalls(self, reaching: Hits, before: Floats, upon: Floats, end: Floats) -> Floats:
        """A curve [B, R] from its values at what was drawn last before the hits that exceed the recalls, at these, and
        at its end [B, 1]; 0 beyond."""
        start, stop = (reaching.found - reaching.weights) / self._positives, reaching.found / self._positives
        values = _line(RECALLS, start, before, stop, upon)
        return np.where(stop > RECALLS, values, np.where(stop == RECALLS, end, 0))


def _running_means(errors: Floats, hits: Hits) -> Floats:
    """Weighted means [B, H] of the first 1 … H errors, NaN left out: 0 before the first, 1 without any."""
    is_known = ~np.isnan(errors)
    sums = (np.where(is_known, errors, 0) * hits.weights).cumsum(axis=1)
    counts = hits.found if is_known.all() else (is_known * hits.weights).cumsum(axis=1)
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    means[counts[:, -1] == 0] = 1
    return means


def _drawn_neighbours(is_drawn: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """Drawn hits after and before each gap between H hits: two arrays [B, H + 1].

    Where one side has none, the hit of the other side stands for both.
    """
    rows, hits = is_drawn.shape
    after, before = np.full((rows, hits + 1), hits), np.full((rows, hits + 1), -1)
    after[:, :-1] = np.where(is_drawn, np.arange(hits), hits)
    before[:, 1:] = np.where(is_drawn, np.arange(hits), -1)
    after = np.minimum.accumulate(after[:, ::-1], axis=1)[:, ::-1]
    before = np.maximum.accumulate(before, axis=1)
    first, last = after[:, :1], before[:, -1:]
    return np.where(after == hits, last, after), np.where(before < 0, first % hits, before)


def _search(rows: Floats, values: Floats, side: Literal["left", "right"]) -> Ints:
    """``searchsorted`` of the same values in every row."""
    return np.concatenate([row.searchsorted(values, side) for row in rows]).reshape(len(rows), -1)


def _take(rows: NDArray[T], places: Ints) -> NDArray[T]:
    """``take_along_axis`` of the last axis."""
    return rows.take(places + rows.shape[1] * np.arange(len(rows))[:, None])


def _line(x: Floats, x0: Floats, y0: Floats, x1: Floats, y1: Floats) -> Floats:
    """Values on the line through two points, as ``numpy.interp`` computes them; ``y0`` where the points are one."""
    return np.divide(y1 - y0, x1 - x0, out=np.zeros_like(y0), where=x1 != x0) * (x - x0) + y0

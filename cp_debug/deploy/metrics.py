"""Detection metrics as the nuScenes devkit (1.2.0, ``detection_cvpr_2019``) defines them, and KITTI's AP by overlap.

All are computed for many *draws* at once: a draw is a weight for each sample, all ones for the score itself, and how
often the bootstrap drew each sample for a confidence interval. Matching happens within a sample, so that one matching
serves all draws; a sample of weight k counts as k equal ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cp_debug.deploy.matching import THRESHOLDS, confidence_order, match_centers, match_overlaps
from cp_debug.deploy.objects import Boxes, Floats, Ints, Objects

MIN_RECALL = 0.1
MIN_PRECISION = 0.1
RECALLS = np.linspace(0, 1, 101)
FIRST = round(100 * MIN_RECALL) + 1
"""The first of ``RECALLS`` that counts."""
TP_THRESHOLD = 2.0
"""Metres within which a detection's errors are taken."""

ERRORS = ("ATE", "ASE", "AOE", "AVE", "AAE")
"""Errors of true positives: translation (m), scale (1 − IoU of the aligned boxes), orientation (rad), velocity (m/s),
attribute (1 − accuracy)."""
UNDEFINED = {"traffic_cone": ("AOE", "AVE", "AAE"), "barrier": ("AVE", "AAE")}
"""Errors that nuScenes does not ask of a class."""
HALF_TURN = ("barrier",)
"""Classes whose front is like their back."""
MAP_WEIGHT = 5
"""Of mAP in NDS; each error has weight 1."""

OVERLAPS = (0.5, 0.7)
OVERLAP_RECALLS = np.arange(1, 41) / 40
"""Where KITTI (R40) samples the precision."""

Mask = NDArray[np.bool_]


class Curves:
    """Recall and precision of one class along falling confidence, in each of B draws.

    ``predicted`` and ``truth`` are of that class; ``weights`` [B, S] are of each sample in each draw.
    """

    def __init__(self, predicted: Objects, truth: Objects, weights: Floats) -> None:
        self.order = confidence_order(predicted.scores)
        self._scores = predicted.scores[self.order]
        self._weights = weights[:, predicted.samples[self.order]]
        self._drawn = [np.flatnonzero(row) for row in self._weights]
        self._positives = weights[:, truth.samples].sum(axis=1)

    def average_precision(self, matched: Ints) -> Floats:
        """nuScenes' AP [B]: the mean precision beyond ``MIN_RECALL``, less ``MIN_PRECISION`` and not below 0, scaled to
        reach 1. ``matched`` [N] is the object that each prediction found, -1 for none."""
        beyond = np.zeros((len(self._weights), len(RECALLS) - FIRST))
        for draw, recall, precision in self._found(matched):
            beyond[draw] = np.interp(RECALLS[FIRST:], recall, precision, right=0)
        return np.maximum(beyond - MIN_PRECISION, 0).mean(axis=1) / (1 - MIN_PRECISION)

    def interpolated_precision(self, matched: Ints) -> Floats:
        """KITTI's AP [B]: over 40 recalls the mean of the best precision at that recall or a higher one."""
        best = np.zeros((len(self._weights), len(OVERLAP_RECALLS)))
        for draw, recall, precision in self._found(matched):
            highest = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
            best[draw] = highest[np.searchsorted(recall, OVERLAP_RECALLS)]
        return best.mean(axis=1)

    def mean_errors(self, matched: Ints, errors: Floats) -> Floats:
        """Of each kind of error [E, N] the mean over the recalls from ``MIN_RECALL`` to the highest reached: [B, E].

        At a recall it is the running mean of the hits so far, NaN left out. 1 where that recall is not reached, and
        where all are NaN.
        """
        hits, errors = matched[self.order] >= 0, errors[:, self.order]
        means = np.ones((len(self._weights), len(errors)))
        for draw, recall, _ in self._found(matched):
            drawn = self._drawn[draw]
            confidence = np.interp(RECALLS, recall, self._scores[drawn], right=0)
            reached = np.flatnonzero(confidence)
            if not len(reached) or reached[-1] < FIRST:
                continue
            used = drawn[hits[drawn]]
            running = _running_means(errors[:, used], self._weights[draw, used])
            at = confidence[FIRST : reached[-1] + 1]
            for index, row in enumerate(running):
                means[draw, index] = np.interp(at, self._scores[used][::-1], row[::-1]).mean()
        return means

    def _found(self, matched: Ints) -> Iterator[tuple[int, Floats, Floats]]:
        """(draw, recall, precision) of the draws in which anything is found; a value for each drawn prediction."""
        hits = matched[self.order] >= 0
        for draw, drawn in enumerate(self._drawn):
            weights = self._weights[draw, drawn]
            found = (weights * hits[drawn]).cumsum()
            if len(found) and found[-1]:
                yield draw, found / self._positives[draw], found / weights.cumsum()


def _running_means(errors: Floats, weights: Floats) -> Floats:
    """Weighted means [E, N] of the first 1 … N errors of each kind, NaN left out: 0 before the first, 1 without any."""
    known = ~np.isnan(errors)
    sums, counts = (np.where(known, errors, 0) * weights).cumsum(axis=1), (known * weights).cumsum(axis=1)
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    means[counts[:, -1] == 0] = 1
    return means


def average_precision(predicted: Objects, truth: Objects, thresholds: Sequence[float] = THRESHOLDS) -> Floats:
    """AP of one class at each threshold [T]; 0 where nothing matches and, as in the devkit, without any object."""
    curves = Curves(predicted, truth, _equal_weights(predicted, truth))
    return np.array([curves.average_precision(row)[0] for row in match_centers(predicted, truth, thresholds)])


def class_average_precisions(
    predicted: Objects, truth: Objects, num_classes: int, thresholds: Sequence[float] = THRESHOLDS
) -> Floats:
    """AP of every class at every threshold [C, T]; its mean is the mAP."""
    return np.stack(
        [average_precision(predicted.of_class(c), truth.of_class(c), thresholds) for c in range(num_classes)]
    )


def _equal_weights(*objects: Objects) -> Floats:
    return np.ones((1, max(int(each.samples.max(initial=-1)) for each in objects) + 1))


@dataclass(frozen=True)
class Scores:
    """Of C classes in B draws: precisions [B, C, 4] by centre distance, errors [B, C, 5], NaN where not asked, AP by
    overlap (0.5, 0.7) seen from above and of the boxes, bev [B, C, 2] and volume [B, C, 2], and the number of objects
    found within 2 m [B, C]."""

    precisions: Floats
    errors: Floats
    bev: Floats
    volume: Floats
    found: Floats

    def summary(self) -> dict[str, Floats]:
        """Name → [B]: mAP, NDS, the mean errors over the classes for which they are defined, and mAP by overlap."""
        mean_ap = self.precisions.mean(axis=(1, 2))
        asked = ~np.isnan(self.errors)
        errors = np.where(asked, self.errors, 0).sum(axis=1) / np.maximum(asked.sum(axis=1), 1)
        good = np.maximum(1 - errors, 0).sum(axis=1)
        named = {"mAP": mean_ap, "NDS": (MAP_WEIGHT * mean_ap + good) / (MAP_WEIGHT + len(ERRORS))}
        named |= {f"m{name}": errors[:, index] for index, name in enumerate(ERRORS)}
        for kind, values in (("BEV", self.bev), ("3D", self.volume)):
            named |= {f"{kind} AP@{limit}": values[..., index].mean(axis=1) for index, limit in enumerate(OVERLAPS)}
        return named


def score(predicted: Boxes, truth: Boxes, class_names: Sequence[str], weights: Floats) -> Scores:
    """All metrics in each draw; ``samples`` of the boxes index ``weights`` [B, S]."""
    classes = [
        _score_class(predicted.of_class(label), truth.of_class(label), name, weights)
        for label, name in enumerate(class_names)
    ]
    return Scores(*(np.stack(figures, axis=1) for figures in zip(*classes, strict=True)))


def _score_class(predicted: Boxes, truth: Boxes, name: str, weights: Floats) -> tuple[Floats, ...]:
    """The fields of ``Scores`` for one class, without the axis of the classes."""
    curves = Curves(predicted, truth, weights)
    matches = match_centers(predicted, truth)
    near = matches[THRESHOLDS.index(TP_THRESHOLD)]
    errors = curves.mean_errors(near, box_errors(predicted, truth, near, half_turn=name in HALF_TURN))
    errors[:, [ERRORS.index(kind) for kind in UNDEFINED.get(name, ())]] = np.nan
    overlapping = [match_overlaps(predicted, truth, OVERLAPS, bev=bev) for bev in (True, False)]
    return (
        np.stack([curves.average_precision(matched) for matched in matches], axis=1),
        errors,
        *(np.stack([curves.interpolated_precision(row) for row in rows], axis=1) for rows in overlapping),
        weights[:, predicted.samples[near >= 0]].sum(axis=1),
    )


def box_errors(predicted: Boxes, truth: Boxes, matched: Ints, *, half_turn: bool = False) -> Floats:
    """``ERRORS`` of each prediction against the object that it found [5, N]; NaN where it found none, or unknown."""
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

"""Detection metrics as the nuScenes devkit (1.2.0, ``detection_cvpr_2019``) defines them, and KITTI's AP by overlap.

All are computed for many *draws* at once: a draw is a weight for each sample, all ones for the score itself, and how
often the bootstrap drew each sample for a confidence interval. Matching happens within a sample, so that one matching
serves all draws; a sample of weight k counts as k equal ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cp_debug.detection.boxes import Boxes, Floats, Ints, Objects
from cp_debug.detection.curves import Curves
from cp_debug.detection.matching import THRESHOLDS, match_centers, match_overlaps

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
    return np.ones((1, max(int(group.samples.max(initial=-1)) for group in objects) + 1))


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

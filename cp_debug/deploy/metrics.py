"""Detection metrics as the nuScenes devkit (1.2.0, ``detection_cvpr_2019``) defines them, vectorised over samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

THRESHOLDS = (0.5, 1.0, 2.0, 4.0)
"""Distances in metres within which a detection may match an object."""
MIN_RECALL = 0.1
MIN_PRECISION = 0.1
RECALLS = np.linspace(0, 1, 101)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Objects:
    """Objects of many samples, one after the other.

    centers: [N, 2] x and y in m. samples: [N] which sample each is in (any integers). labels: [N] class indices.
    scores: [N] confidence; of no meaning for ground truth.
    """

    centers: Floats
    samples: Ints
    labels: Ints
    scores: Floats

    @classmethod
    def gather(cls, samples: Sequence[tuple[Floats, Ints, Floats]]) -> Objects:
        """From (centers [n, 2], labels [n], scores [n]) of each sample."""
        return cls(
            centers=np.concatenate([np.reshape(centers, (-1, 2)) for centers, _, _ in samples]).astype(np.float64),
            samples=np.repeat(np.arange(len(samples)), [len(labels) for _, labels, _ in samples]),
            labels=np.concatenate([labels for _, labels, _ in samples]).astype(np.int64),
            scores=np.concatenate([scores for _, _, scores in samples]).astype(np.float64),
        )

    def of_class(self, label: int) -> Objects:
        chosen = self.labels == label
        return Objects(self.centers[chosen], self.samples[chosen], self.labels[chosen], self.scores[chosen])


def confidence_order(scores: Floats) -> Ints:
    """Indices by falling score; of equal scores the later comes first, as in the devkit's reversed sort."""
    return np.argsort(scores, kind="stable")[::-1]


def match_centers(predicted: Objects, truth: Objects, thresholds: Sequence[float] = THRESHOLDS) -> Ints:
    """For each threshold and prediction the index of the matched object, -1 for none: [T, N].

    In order of falling confidence each prediction takes the nearest object of its sample that is still free, if it is
    nearer than the threshold. Labels are ignored. The k-th predictions of all samples are matched in one step.
    """
    limits = np.asarray(thresholds, dtype=np.float64)[:, None]
    matched = np.full((len(limits), len(predicted.samples)), -1, dtype=np.int64)
    names, rows = np.unique(np.concatenate((truth.samples, predicted.samples)), return_inverse=True)
    truth_rows, rows = rows[: len(truth.samples)], rows[len(truth.samples) :]

    place = _position_in_group(truth_rows)
    table = np.full((len(names), place.max(initial=0) + 1), -1)
    table[truth_rows, place] = np.arange(len(place))
    centers = np.full((*table.shape, 2), np.inf)
    centers[truth_rows, place] = truth.centers

    order = confidence_order(predicted.scores)
    turn = np.empty_like(order)
    turn[order] = _position_in_group(rows[order])
    free = np.repeat((table >= 0)[None], len(limits), axis=0)
    for now in np.split(np.argsort(turn, kind="stable"), np.cumsum(np.bincount(turn))[:-1]):
        distance = np.linalg.norm(centers[rows[now]] - predicted.centers[now, None], axis=-1)
        distance = np.where(free[:, rows[now]], distance, np.inf)
        nearest = distance.argmin(axis=-1)
        level, hit = np.nonzero(np.take_along_axis(distance, nearest[..., None], axis=-1)[..., 0] < limits)
        taken = nearest[level, hit]
        free[level, rows[now][hit], taken] = False
        matched[level, now[hit]] = table[rows[now][hit], taken]
    return matched


def _position_in_group(groups: Ints) -> Ints:
    """How many earlier elements are in the same group: [0, 0, 1, 2] for groups [7, 3, 7, 7]."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    position = np.empty_like(order)
    position[order] = np.arange(len(groups)) - np.searchsorted(ordered, ordered)
    return position


def precision_at_recalls(hits: NDArray[np.bool_], positives: int) -> Floats:
    """Precision at each of ``RECALLS``; ``hits`` [N] says by falling confidence which predictions found an object."""
    if not hits.any():
        return np.zeros_like(RECALLS)
    found = np.cumsum(hits)
    return np.interp(RECALLS, found / positives, found / np.arange(1, len(hits) + 1), right=0)


def average_precision(predicted: Objects, truth: Objects, thresholds: Sequence[float] = THRESHOLDS) -> Floats:
    """AP of one class at each threshold [T]; 0 where nothing matches and, as in the devkit, where there is no object.

    The mean precision beyond ``MIN_RECALL``, less ``MIN_PRECISION`` and not below 0, scaled to reach 1.
    """
    hits = match_centers(predicted, truth, thresholds)[:, confidence_order(predicted.scores)] >= 0
    curves = np.stack([precision_at_recalls(row, len(truth.samples)) for row in hits])
    beyond = curves[:, round(100 * MIN_RECALL) + 1 :]
    return np.clip(beyond - MIN_PRECISION, 0, None).mean(axis=1) / (1 - MIN_PRECISION)


def class_average_precisions(
    predicted: Objects, truth: Objects, num_classes: int, thresholds: Sequence[float] = THRESHOLDS
) -> Floats:
    """AP of every class at every threshold [C, T]; its mean is the mAP."""
    return np.stack(
        [average_precision(predicted.of_class(c), truth.of_class(c), thresholds) for c in range(num_classes)]
    )

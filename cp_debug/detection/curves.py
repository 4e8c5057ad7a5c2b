"""Recall and precision of detections along falling confidence, in many draws at once.

A curve has a point for every drawn prediction and is straight between them. Recall grows at hits alone: whatever recall
is looked for, its neighbours are a hit and what was drawn last before it. Predictions that were not drawn stay in the
arrays with weight 0; they add nothing, and no recall is first reached there.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from cp_debug.detection.boxes import Floats, Ints, Objects
from cp_debug.detection.matching import confidence_order

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

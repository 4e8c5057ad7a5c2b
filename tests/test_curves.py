"""Curves in many draws at once against the definition, one draw and one prediction at a time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from cp_debug.detection import metrics
from cp_debug.detection.boxes import Boxes, Objects
from cp_debug.detection.metrics import Curves, Hits, _drawn_neighbours, _line, _running_means, score

SAMPLES = 4


class Case(NamedTuple):
    predicted: Objects
    truth: Objects
    matched: np.ndarray
    errors: np.ndarray
    weights: np.ndarray


def objects(samples: list[int], scores: list[float]) -> Objects:
    nowhere = np.zeros((len(samples), 2))
    return Objects(nowhere, np.array(samples, int), np.zeros(len(samples), int), np.array(scores, float))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Few scores, so that many are equal; a score of 0; errors that are not known; draws that lack any sample."""
    truth = draw(st.lists(st.integers(0, SAMPLES - 1), max_size=8))
    free = dict(enumerate(truth))
    samples, scores, matched = [], [], []
    score = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 0.9]) | st.floats(0, 1, width=32)
    for sample, confidence, hit in draw(st.lists(st.tuples(st.integers(0, SAMPLES - 1), score, st.booleans()))):
        found = next((index for index, place in free.items() if place == sample and hit), -1)
        free.pop(found, None)
        samples.append(sample)
        scores.append(confidence)
        matched.append(found)
    error = st.sampled_from([0.0, 0.3, 1.0, np.nan]) | st.floats(0, 4, width=32)
    errors = [draw(st.lists(error, min_size=len(samples), max_size=len(samples))) for _ in range(2)]
    weight = st.lists(st.integers(0, 3), min_size=SAMPLES, max_size=SAMPLES)
    weights = np.array(draw(st.lists(weight, min_size=1, max_size=4)), float)
    return Case(
        objects(samples, scores), objects(truth, [1.0] * len(truth)), np.array(matched, int), np.array(errors), weights
    )


def in_one_draw(case: Case, weights: np.ndarray) -> tuple[float, float, list[float]]:
    """nuScenes' AP, KITTI's AP and the mean errors by their definitions."""
    positives = sum(weights[sample] for sample in case.truth.samples)
    recall, precision, confidence, hits = [], [], [], []
    seen = found = 0.0
    for confident, index in sorted(((s, i) for i, s in enumerate(case.predicted.scores)), reverse=True):
        weight = weights[case.predicted.samples[index]]
        if weight:
            seen += weight
            found += weight * (case.matched[index] >= 0)
            recall.append(found / positives if positives else 0.0)
            precision.append(found / seen)
            confidence.append(confident)
            if case.matched[index] >= 0:
                hits.append((index, weight))
    if not hits:
        return 0.0, 0.0, [1.0] * len(case.errors)
    recalls = np.linspace(0, 1, 101)
    nuscenes = np.mean([max(p - 0.1, 0) for p in np.interp(recalls, recall, precision, right=0)[11:]]) / 0.9
    best = [max((p for r, p in zip(recall, precision, strict=True) if r >= k / 40), default=0) for k in range(1, 41)]
    at = np.interp(recalls, recall, confidence, right=0)
    last = max(np.flatnonzero(at), default=0)
    return (
        nuscenes,
        np.mean(best),
        [mean_error(row, case.predicted.scores, hits, at[11 : last + 1]) for row in case.errors],
    )


def mean_error(errors: np.ndarray, scores: np.ndarray, hits: list[tuple[int, float]], at: np.ndarray) -> float:
    if not len(at) or all(np.isnan(errors[index]) for index, _ in hits):
        return 1.0
    means, total, count = [], 0.0, 0.0
    for index, weight in hits:
        if not np.isnan(errors[index]):
            total, count = total + errors[index] * weight, count + weight
        means.append(total / count if count else 0.0)
    return float(np.interp(at, [scores[index] for index, _ in hits][::-1], means[::-1]).mean())


@given(cases())
def test_each_draw_is_as_by_the_definition(case: Case) -> None:
    curves = Curves(case.predicted, case.truth, case.weights)
    nuscenes, kitti = curves.average_precision(case.matched), curves.interpolated_precision(case.matched)
    errors = curves.mean_errors(case.matched, case.errors)
    for draw, weights in enumerate(case.weights):
        expected = in_one_draw(case, weights)
        assert nuscenes[draw] == pytest.approx(expected[0], abs=1e-12)
        assert kitti[draw] == pytest.approx(expected[1], abs=1e-12)
        assert errors[draw] == pytest.approx(expected[2], abs=1e-12)


def test_blocks_of_draws_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    boxes = Boxes.of(
        np.column_stack((rng.uniform(-9, 9, (60, 2)), np.zeros(60), np.ones((60, 3)), np.zeros((60, 3)))),
        rng.integers(0, SAMPLES, 60), rng.integers(0, 2, 60), rng.random(60), np.full(60, ""),
    )  # fmt: skip
    weights = rng.integers(0, 3, (7, SAMPLES)).astype(float)
    whole = score(boxes.take(np.arange(40)), boxes.take(np.arange(20, 60)), ("a", "b", "none"), weights)
    monkeypatch.setattr(metrics, "BLOCK", 50)
    blocks = score(boxes.take(np.arange(40)), boxes.take(np.arange(20, 60)), ("a", "b", "none"), weights)
    for name, figures in vars(whole).items():
        assert len(figures) == 7
        np.testing.assert_array_equal(getattr(blocks, name), figures)


def test_running_means_leave_out_what_is_not_known() -> None:
    hits = Hits(np.arange(3), np.array([[1.0, 2, 1], [0, 0, 0]]), np.array([[1.0, 3, 4], [0, 0, 0]]))
    assert_allclose(_running_means(np.array([2.0, 5, 8]), hits), [[2, 4, 5], [1, 1, 1]])
    assert_allclose(_running_means(np.array([np.nan, 5, 8]), hits), [[0, 5, 6], [1, 1, 1]])


def test_gaps_lie_between_drawn_hits() -> None:
    after, before = _drawn_neighbours(np.array([[False, True, False, True]]))
    assert after.tolist() == [[1, 1, 3, 3, 3]]
    assert before.tolist() == [[1, 1, 1, 1, 3]]
    one = np.array([2.0])
    assert _line(one, np.array([1.0]), np.array([10.0]), np.array([3.0]), np.array([30.0])).tolist() == [20]
    assert _line(one, one, np.array([10.0]), one, np.array([30.0])).tolist() == [10]

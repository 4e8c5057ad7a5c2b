"""nuScenes' average precision: against a literal reading of its definition, and known cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_debug.detection.boxes import Boxes
from cp_debug.detection.metrics import (
    THRESHOLDS,
    Objects,
    average_precision,
    box_errors,
    class_average_precisions,
    match_centers,
)


def objects(rows: list[tuple[int, float, float, float]]) -> Objects:
    """From (sample, x, y, score)."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 4)
    samples = table[:, 0].astype(np.int64)
    return Objects(centers=table[:, 1:3], samples=samples, labels=np.zeros_like(samples), scores=table[:, 3])


def one_box_at_a_time(predicted: Objects, truth: Objects, threshold: float) -> tuple[list[int], float]:
    """The definition with nested loops: the match of each prediction, and the AP."""
    matched, hits, taken = [-1] * len(predicted.scores), [], set()
    for _, index in sorted(((s, i) for i, s in enumerate(predicted.scores)), reverse=True):
        best, nearest = np.inf, -1
        for other, center in enumerate(truth.centers):
            if truth.samples[other] == predicted.samples[index] and other not in taken:
                distance = np.linalg.norm(center - predicted.centers[index])
                if distance < best:
                    best, nearest = distance, other
        if best < threshold:
            taken.add(nearest)
            matched[index] = nearest
        hits.append(best < threshold)
    if not any(hits):
        return matched, 0.0
    recall = [sum(hits[: k + 1]) / len(truth.centers) for k in range(len(hits))]
    precision = [sum(hits[: k + 1]) / (k + 1) for k in range(len(hits))]
    sampled = np.interp(np.linspace(0, 1, 101), recall, precision, right=0)[11:]
    return matched, float(np.mean([max(p - 0.1, 0) for p in sampled]) / 0.9)


# A coarse grid: equal distances and equal scores must come up often.
coordinate = st.integers(-4, 4).map(lambda value: value / 2)
rows = st.lists(
    st.tuples(st.integers(0, 2), coordinate, coordinate, st.sampled_from([0.1, 0.5, 0.7, 0.9])), max_size=12
)


@given(rows, rows)
def test_agrees_with_the_definition(predicted_rows, truth_rows):
    predicted, truth = objects(predicted_rows), objects(truth_rows)
    matched, precisions = match_centers(predicted, truth), average_precision(predicted, truth)
    for level, threshold in enumerate(THRESHOLDS):
        expected_match, expected = one_box_at_a_time(predicted, truth, threshold)
        assert matched[level].tolist() == expected_match
        assert precisions[level] == pytest.approx(expected, abs=1e-12)


@given(rows.filter(len))
def test_perfect_predictions_score_one(truth_rows):
    truth = objects(truth_rows)
    assert average_precision(truth, truth) == pytest.approx(1.0)


@given(rows, rows)
def test_bounded_and_not_falling_with_the_threshold_when_objects_are_far_apart(predicted_rows, truth_rows):
    precisions = average_precision(objects(predicted_rows), objects(truth_rows))
    assert ((precisions >= 0) & (precisions < 1 + 1e-9)).all()
    apart = objects([(sample, 100 * index, 0, 1) for index, (sample, *_) in enumerate(truth_rows)])
    near = objects([(sample, 100 * index + x, y, s) for index, (sample, x, y, s) in enumerate(truth_rows)])
    assert (np.diff(average_precision(near, apart)) >= 0).all()


@given(rows, rows, st.randoms(use_true_random=False))
def test_order_of_samples_does_not_matter(predicted_rows, truth_rows, random):
    distinct = [(sample, x, y, 1 / (1 + index)) for index, (sample, x, y, _) in enumerate(predicted_rows)]
    truth = objects(truth_rows)
    before = average_precision(objects(distinct), truth)
    random.shuffle(distinct)
    assert average_precision(objects(distinct), truth) == pytest.approx(before, abs=1e-12)


def test_known_values():
    truth = objects([(0, 0, 0, 1), (0, 10, 0, 1)])
    half = objects([(0, 0.7, 0, 0.9)])  # finds one of two, 0.7 m off: precision 1 up to recall 0.5, bins 11 to 50 of 90
    assert average_precision(half, truth) == pytest.approx([0, 40 / 90, 40 / 90, 40 / 90])
    other_sample = objects([(1, 0, 0, 0.9)])
    assert average_precision(other_sample, truth).tolist() == [0, 0, 0, 0]
    broken = objects([(0, np.nan, np.nan, 0.9)])
    assert average_precision(broken, truth).tolist() == [0, 0, 0, 0]


def test_classes_are_scored_apart():
    centers, scores = np.array([[0.0, 0.0], [5.0, 0.0]]), np.array([1.0, 1.0])
    truth = Objects.gather([(centers, np.array([0, 1]), scores)])
    swapped = Objects.gather([(centers, np.array([0, 2]), scores)])
    assert class_average_precisions(swapped, truth, 3).mean(axis=1) == pytest.approx([1, 0, 0])


def boxes(*rows: tuple[float, ...], attributes: tuple[str, ...] = ("",)) -> Boxes:
    """From x, y, z, length, width, height, yaw, vx, vy: one box a sample."""
    count = len(rows)
    zeros = np.zeros(count, np.int64)
    return Boxes.of(rows, np.arange(count), zeros, np.ones(count), np.array(attributes * (count // len(attributes))))


def test_errors_of_a_box_are_those_of_the_definition() -> None:
    truth = boxes((1, 2, 0, 4, 2, 1, 3.1, 1, 0))
    (errors,) = box_errors(boxes((4, 6, 9, 2, 2, 2, -3.1, 4, 4)), truth, np.array([0])).T
    # 4 of (8 + 8 − 4) overlap; over the seam at π it is a small turn; z counts nowhere.
    assert errors == pytest.approx([5, 1 - 4 / 12, 2 * np.pi - 6.2, 5, np.nan], nan_ok=True)
    (half_turn,) = box_errors(boxes((1, 2, 0, 4, 2, 1, 0, 1, 0)), truth, np.array([0]), half_turn=True).T
    assert half_turn[2] == pytest.approx(np.pi - 3.1)
    (around,) = box_errors(boxes((1, 2, 0, 4, 2, 1, 3.1 + 4 * np.pi, 1, 0)), truth, np.array([0])).T
    assert around[2] == pytest.approx(0, abs=1e-9)
    assert np.isnan(box_errors(truth, truth, np.array([-1]))).all()


@pytest.mark.parametrize(("name", "wrong"), [("moving", 0), ("parked", 1), ("", np.nan)])
def test_an_attribute_is_right_wrong_or_unknown(name: str, wrong: float) -> None:
    truth = boxes((1, 2, 0, 4, 2, 1, 3, 1, 0), attributes=(name,))
    found = box_errors(boxes((1, 2, 0, 4, 2, 1, 3, 1, 0), attributes=("moving",)), truth, np.array([0]))
    assert found[4] == pytest.approx([wrong], nan_ok=True)

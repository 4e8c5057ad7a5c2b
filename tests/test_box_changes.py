"""Largest change of a box: an interval that holds kernels which were not emulated."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cp_debug.detection.changes import box_changes, changes
from cp_debug.prediction.box_changes import joined, largest_changes, quantile, within
from cp_debug.prediction.result import Interval


@dataclass
class Boxes:
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.7062), (2, 4.30265), (3, 3.18245)])
def test_students_t_as_tables_have_it(freedom: int, t: float) -> None:
    assert within(np.array([t]), freedom) == pytest.approx(0.95, abs=1e-5)


def test_further_draws_lie_inside() -> None:
    """Boxes of very different sensitivity: the draws' own range holds half as many."""
    rng = np.random.default_rng(0)
    inside = by_range = 0
    for _ in range(300):
        scales = np.exp(rng.normal(0, 1.5, 40))
        drawn = np.abs(rng.normal(0, scales, (4, 40)))
        low, high = (quantile(drawn[:3], p) for p in (0.025, 0.975))
        largest = drawn.max(1)
        inside += low <= largest[3] <= high
        by_range += largest[:3].min() <= largest[3] <= largest[:3].max()
    assert 0.92 <= inside / 300 <= 0.99
    assert by_range / 300 < 0.7


def test_the_interval_reaches_from_the_mildest_arithmetic_to_the_coarsest() -> None:
    rng = np.random.default_rng(1)
    places = rng.uniform(0, 1e3, (30, 7))
    reference = Boxes(places, np.full(30, 0.5), np.zeros(30, int))

    def family(size: float) -> list[dict[int, tuple[float, float, float, float]]]:
        tests = (Boxes(places + rng.normal(0, size, places.shape), reference.scores, reference.labels) for _ in "abc")
        return [box_changes(changes(reference, test), reference, test) for test in tests]

    coarse, mild = family(1e-3), family(1e-4)
    told = largest_changes([coarse, mild])
    assert told["size"].low < 4e-4 < 1e-3 < told["size"].high
    assert told["size"].expected == max(change[1] for change in coarse[0].values())
    assert told["score"] == Interval(0.0, 0.0, 0.0)
    assert joined(told, {}) == told
    assert joined(told, largest_changes([mild]))["size"].high == told["size"].high


def test_boxes_that_one_kernel_loses_do_not_count() -> None:
    found = {0: (1e-3, 1e-3, 0.0, 0.0), 1: (5.0, 5.0, 1.0, 0.5)}
    assert largest_changes([[found, {0: found[0]}]])["center"].high < 1
    assert largest_changes([[found, {}]]) == {}


def test_a_way_that_changes_nothing_moves_only_the_lower_end() -> None:
    rng = np.random.default_rng(2)
    family = [{box: tuple(np.abs(rng.normal(0, 1e-3, 4))) for box in range(20)} for _ in range(3)]
    none = dict.fromkeys(range(20), (0.0, 0.0, 0.0, 0.0))
    told, apart = largest_changes([family]), largest_changes([[*family, none]])
    assert told["size"].low > 0 == apart["size"].low
    assert (apart["size"].expected, apart["size"].high) == (told["size"].expected, told["size"].high)
    assert largest_changes([family, [none]])["size"] == apart["size"]


def boxes(*objects: tuple[float, float]) -> Any:
    """Boxes of one class at (x, 0) with a score."""
    place = np.array([[x, 0.0] for x, _ in objects])
    return SimpleNamespace(boxes=place, scores=np.array([s for _, s in objects]), labels=np.zeros(len(objects), int))


@pytest.mark.parametrize(
    ("x", "score", "kind"),
    [(0.05, 0.52, "kept"), (0.15, 0.5, "moved"), (0.0, 0.6, "moved"), (0.0, 0.4, "moved"), (0.15, 0.6, "moved")],
)
def test_a_box_has_moved_by_its_place_or_by_its_score(x: float, score: float, kind: str) -> None:
    (change,) = changes(boxes((0.0, 0.5)), boxes((x, score)))
    assert change.kind == kind
    assert change.distance == pytest.approx(x)
    assert change.score == pytest.approx(score - 0.5)
    assert change.severity == (False, pytest.approx(max(x, abs(score - 0.5))))


def test_what_vanished_or_appeared_is_worse_than_what_moved() -> None:
    found = changes(boxes((0.0, 0.3), (50.0, 0.9)), boxes((0.0, 0.9), (80.0, 0.2)))
    assert [c.kind for c in sorted(found, key=lambda c: c.severity, reverse=True)] == ["lost", "gained", "moved"]
    assert {c.kind: c.score for c in found} == {
        "moved": pytest.approx(0.6), "gained": pytest.approx(0.2), "lost": pytest.approx(-0.9)
    }  # fmt: skip

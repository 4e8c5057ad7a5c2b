"""Figures of a trial that a goal limits: which sample, which output, and in which direction they count."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cp_debug.detection.evaluation import ConfidenceInterval
from cp_debug.errors import InputError
from cp_debug.mixed_precision.goal import Goal, _excess
from cp_debug.mixed_precision.result import MixedPrecisionResult
from cp_debug.mixed_precision.sensitivity import Int8Effect, LayerSensitivity
from cp_debug.mixed_precision.trials import Judge, Measured, Trial, _or_infinite
from cp_debug.recipes.base import Component, Sample
from cp_debug.recipes.centerpoint.decode import Detections
from cp_debug.recipes.data.base import Truth

PLACES = [(0.0, 0.0), (10.0, 0.0), (0.0, 10.0), (10.0, 10.0)]


def outputs(**arrays: Any) -> dict[str, dict[str, np.ndarray]]:
    return {"head": {name: np.asarray(array, np.float64) for name, array in arrays.items()}}


def model(**extra: Any) -> Any:
    return SimpleNamespace(name="m", components=[Component("head", ["x"], ["a", "b"])], **extra)


def test_the_worst_sample_of_each_output_counts() -> None:
    samples = [Sample({}, "s0"), Sample({}, "s1")]
    exact = outputs(a=[3.0, 4.0], b=[30.0, 40.0])
    judge = Judge(model(), samples, [exact, exact], Goal.parse("rel_l2<1"))
    tests = [outputs(a=[3.0, 4.5], b=[30.0, 40.0]), outputs(a=[3.0, 4.05], b=[30.0, 42.0])]
    for results in (tests, tests[::-1]):
        measured = judge.measure(results)
        assert measured.outputs == {"a": pytest.approx(0.1), "b": pytest.approx(0.04)}
        assert measured.figures == {"rel_l2": pytest.approx(0.1), "max_abs": pytest.approx(2.0)}
    assert measured.error == pytest.approx(np.sqrt((0.1**2 + 0.04**2) / 2))
    assert judge.measure([exact, outputs(a=[3.0, np.nan], b=[30.0, 40.0])]).figures["rel_l2"] == np.inf
    with pytest.raises(InputError, match="the test has no output 'b'; its outputs are a"):
        judge.measure([exact, outputs(a=[3.0, 4.0])])


def scene(found: int, *, moved: float = 0.0) -> np.ndarray:
    """Of four objects the first ``found``, ``moved`` metres beside them, with falling scores."""
    return np.array([[x + moved, y, 1.0 - 0.1 * i] for i, (x, y) in enumerate(PLACES[:found])]).reshape(-1, 3)


class Detecting(SimpleNamespace):
    """A model whose one output holds x, y and score of boxes."""

    class_names = ("car",)
    region = (-100.0, -100.0, 100.0, 100.0)

    def decode(self, sample: Sample, results: Any) -> Detections:
        rows = results["head"]["a"].reshape(-1, 3)
        boxes = np.zeros((len(rows), 9), np.float32)
        boxes[:, :2], boxes[:, 3:6] = rows[:, :2], 1
        return Detections(boxes, rows[:, 2].astype(np.float32), np.zeros(len(rows), np.int32))


def detecting(goal: str) -> Judge:
    rows = scene(4)
    boxes = np.zeros((4, 7), np.float32)
    boxes[:, :2], boxes[:, 3:6] = rows[:, :2], 1
    truth = Truth(boxes, np.zeros(4, np.int64), np.zeros((4, 2), np.float32), np.full(4, 9), np.full(4, ""))
    samples = [Sample({}, f"s{i}", truth) for i in range(2)]
    made = Detecting(name="m", components=[Component("head", ["x"], ["a"])])
    return Judge(made, samples, [outputs(a=scene(3))] * 2, Goal.parse(goal))


def test_a_loss_of_map_is_a_rise_of_its_figure_and_a_gain_a_fall() -> None:
    """Three of four objects are found: one fewer loses about a quarter, in points of 100; one more gains as much."""
    judge = detecting("map_drop<1")
    worse, same, better = (judge.measure([outputs(a=scene(n))] * 2).figures["map_drop"] for n in (2, 3, 4))
    assert same == 0
    assert 20 < worse < 40
    assert -40 < better < -20


def test_boxes_are_counted_by_what_became_of_them_over_all_samples() -> None:
    judge = detecting("boxes_lost==0 and boxes_gained==0 and boxes_moved==0")
    figures = judge.measure([outputs(a=scene(1)), outputs(a=scene(4, moved=0.5))]).figures
    assert {name: figures[name] for name in ("boxes_lost", "boxes_gained", "boxes_moved")} == {
        "boxes_lost": 2,
        "boxes_gained": 1,
        "boxes_moved": 3,
    }
    assert "map_drop" not in figures


def test_a_goal_tells_how_far_it_is_missed_by_its_worst_figure() -> None:
    goal = Goal.parse("rel_l2<1e-3 and boxes_lost==0 and max_abs<=2")
    figures = {"rel_l2": 5e-4, "boxes_lost": 0.0, "max_abs": 3.0}
    assert goal.excess(figures) == pytest.approx(1.5)
    assert not goal.holds(figures)
    assert goal.holds(figures | {"max_abs": 2.0})
    assert goal.excess(figures | {"boxes_lost": 1.0}) == np.inf
    assert goal.excess(figures | {"rel_l2": np.nan}) == np.inf


def test_decibels_rise_as_the_error_falls() -> None:
    assert Int8Effect(0.1, {}).sqnr == pytest.approx(20)
    assert Int8Effect(0.01, {}).sqnr == pytest.approx(40)
    assert Int8Effect(0.0, {}).sqnr == np.inf


def trial(layers: int, error: float, *, emulated: bool = False, broken: str = "") -> Trial:
    figures = {} if broken else {"rel_l2": error}
    return Trial(
        frozenset({("net", f"n{i}") for i in range(layers)}), layers, emulated, Measured(figures), 1.0, None, broken
    )


def test_the_front_holds_what_no_other_trial_beats_on_the_backend() -> None:
    trials = [
        trial(0, 0.5),
        trial(1, 0.6),  # more layers, and worse
        trial(2, 0.1),
        trial(2, 0.2),
        trial(1, 0.01, emulated=True),
        trial(3, 0.0, broken="no kernel"),
        trial(4, 0.1),
        trial(5, 0.05),
    ]
    result = MixedPrecisionResult(
        "m", "ort", "trt", False, "fp16", "rel_l2<1", 9, True, [], True, trials[2], trials[0], trials, {}
    )
    assert result.pareto == [trials[0], trials[2], trials[7]]


def interval(value: float, low: float, high: float) -> dict[str, ConfidenceInterval]:
    return {"mAP": ConfidenceInterval(value, low, high)}


def test_layers_are_ranked_by_what_leaving_them_out_gives_then_by_their_share() -> None:
    def layer(name: str, share: float, scores: dict[str, ConfidenceInterval], without: float) -> LayerSensitivity:
        return LayerSensitivity(name, "Conv2d", 9, 0.1, share, Int8Effect(without, scores))

    sure, chance = interval(0.05, 0.02, 0.09), interval(0.05, -0.01, 0.09)
    layers = [
        LayerSensitivity("small", "Conv2d", 9, 0.1, 0.05, None),
        LayerSensitivity("not tried", "Conv2d", 9, 0.1, 0.06, None),
        layer("chance", 0.4, chance, 0.3),
        layer("error", 0.3, chance, 0.2),
        layer("sure", 0.2, sure, 0.4),
        layer("surer", 0.1, interval(0.05, 0.03, 0.09), 0.4),
    ]
    backwards = layers[::-1]
    assert sorted(backwards, key=lambda row: row.severity) == layers


def test_the_change_of_a_score_rises_over_what_was_before() -> None:
    before = Measured(draws={"mAP": np.array([0.5, 0.4, 0.6])})
    after = Measured(draws={"mAP": np.array([0.7, 0.5, 0.9])})
    change = after.change("mAP", before)
    assert change.value == pytest.approx(0.2)
    assert 0.1 <= change.low < change.high <= 0.3 + 1e-9
    assert before.change("mAP", after).value == pytest.approx(-0.2)


def test_figures_beyond_a_limit() -> None:
    assert _excess(3.0, 2.0) == 1.5
    assert _excess(0.0, 0.0) == 0
    assert _excess(1e-9, 0.0) == math.inf
    assert _excess(math.nan, 1.0) == math.inf
    assert [_or_infinite(v) for v in (2.0, math.nan, math.inf, -math.inf)] == [2.0, math.inf, math.inf, math.inf]

"""What happened to boxes, intervals of scores, goals and sensitivities, with figures computed by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from cp_debug.detection.boxes import Boxes, Predictions
from cp_debug.detection.changes import (
    MATCHING,
    MOVED,
    RESCORED,
    BoxChange,
    DetectionChange,
    changes,
    compare_detections,
)
from cp_debug.detection.evaluation import (
    ConfidenceInterval,
    EvaluationOptions,
    Rings,
    by_class,
    by_distance,
    draw_samples,
    rings_of,
)
from cp_debug.detection.metrics import Scores, _position_in_group, box_errors, score
from cp_debug.errors import InputError
from cp_debug.mixed_precision.goal import Goal
from cp_debug.mixed_precision.layers import FusionGroup
from cp_debug.mixed_precision.search import Predictor
from cp_debug.mixed_precision.sensitivity import Int8Effect
from cp_debug.mixed_precision.trials import Measured
from cp_debug.recipes.data.base import Truth
from cp_debug.reports.numbers import fixed, signed


@dataclass
class Detections:
    """x, y, z, length, width, height, yaw of each box, its score and its class."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def detected(*rows: tuple[float, float, int] | tuple[float, float, int, dict[int, float]]) -> Detections:
    """Boxes at (x, 0, 0) of 4 × 2 × 1.5 m: x, score, class, and other columns."""
    boxes = np.array([[r[0], 0, 0, 4, 2, 1.5, 0] for r in rows], np.float64).reshape(-1, 7)
    for box, more in zip(boxes, (r[3] if len(r) > 3 else {} for r in rows), strict=True):
        for column, value in more.items():
            box[column] = value
    return Detections(boxes, np.array([r[1] for r in rows]), np.array([r[2] for r in rows], np.int64))


# Boxes --------------------------------------------------------------------------------------------------------------


def test_each_box_of_either_side_has_one_fate() -> None:
    reference = detected((0, 0.9, 0), (10, 0.8, 0), (20, 0.7, 0), (30, 0.6, 1))
    test = detected((30, 0.55, 0), (20.5, 0.7, 0), (0.01, 0.6, 0), (10, 0.79, 0))
    found = {(c.kind, c.reference, c.test): c for c in changes(reference, test)}
    assert found.keys() == {("gained", None, 0), ("moved", 2, 1), ("moved", 0, 2), ("kept", 1, 3), ("lost", 3, None)}
    assert found["gained", None, 0].score == pytest.approx(0.55)  # of another class than the one that stands there
    assert found["lost", 3, None].score == pytest.approx(-0.6)
    assert found["moved", 0, 2].score == pytest.approx(-0.3)
    assert found["moved", 2, 1].distance == pytest.approx(0.5)
    assert found["kept", 1, 3].score == pytest.approx(-0.01)


@pytest.mark.parametrize(
    ("moved", "rescored", "kind"),
    [
        (0.99 * MOVED, 0.0, "kept"), (1.01 * MOVED, 0.0, "moved"), (0.0, 0.98 * RESCORED, "kept"),
        (0.0, 1.02 * RESCORED, "moved"), (0.0, -1.02 * RESCORED, "moved"), (0.99 * MATCHING, 0.0, "moved"),
        (1.01 * MATCHING, 0.0, "gained"),
    ],
)  # fmt: skip
def test_a_box_moved_beyond_a_place_or_a_score_and_is_another_beyond_the_matching(
    moved: float, rescored: float, kind: str
) -> None:
    found = changes(detected((5, 0.5, 0)), detected((5 + moved, 0.5 + rescored, 0)))
    assert found[0].kind == kind
    assert len(found) == (2 if kind == "gained" else 1)


def test_boxes_that_appear_or_vanish_are_worse_than_those_that_move() -> None:
    ordered = [
        BoxChange("kept", 0, 0, 0.05, 0.01), BoxChange("moved", 0, 0, 0.1, -0.3), BoxChange("moved", 0, 0, 1.9, 0.0),
        BoxChange("gained", None, 0, 0.0, 0.1), BoxChange("lost", 0, None, 0.0, -0.4),
    ]  # fmt: skip
    backwards = ordered[::-1]
    assert sorted(backwards, key=lambda c: c.severity) == ordered


def test_the_largest_differences_are_those_of_all_dimensions() -> None:
    reference = detected((0, 0.9, 0), (10, 0.5, 0))
    test = detected(
        (0.3, 0.8, 0, {2: -0.4, 5: 0.8, 6: -0.2}), (10, 0.7, 0, {3: 4.1, 6: 2 * math.pi + 0.1})
    )  # fmt: skip
    found = compare_detections(reference, test)
    assert (found.reference, found.lost, found.gained, found.moved) == (2, 0, 0, 2)
    assert found.max_center == pytest.approx(0.5)
    assert found.max_size == pytest.approx(0.7)
    assert found.max_yaw == pytest.approx(0.2)
    assert found.max_score == pytest.approx(0.2)
    assert found.mean_score == pytest.approx(0.05)
    says = "2 boxes: 0 lost, 0 gained, 2 moved; at most 0.5 m in centre, 0.7 m in size, 0.2 rad in yaw, 0.2 in score"
    assert str(found) == f"{says} (+0.05 on average)"
    half_turn = compare_detections(detected((0, 1, 0)), detected((0, 1, 0, {6: -3 * math.pi})))
    assert half_turn.max_yaw == pytest.approx(math.pi)


# Errors and scores --------------------------------------------------------------------------------------------------


def nine(*rows: tuple[float, ...], attributes: tuple[str, ...]) -> Boxes:
    zeros = np.zeros(len(rows), np.int64)
    return Boxes.of(rows, zeros, zeros, np.ones(len(rows)), np.array(attributes))


def test_errors_of_a_found_box() -> None:
    truth = nine((0, 0, 0, 4, 2, 1, 0.1, 1, 0), (9, 9, 0, 1, 1, 1, 0, np.nan, np.nan), attributes=("moving", ""))
    predicted = nine(
        (0.3, 0.4, 5, 2, 2, 2, -0.2, 1, 2), (0, 0, 0, 1, 1, 1, 0, 0, 0), (9, 9, 0, 1, 1, 1, 3, 0, 0),
        attributes=("parked", "moving", "moving"),
    )  # fmt: skip
    found = box_errors(predicted, truth, np.array([0, -1, 1]))
    # 2·2·1 common of 8 + 8 − 4: z does not count.
    assert found[:, 0].tolist() == pytest.approx([0.5, 1 - 4 / 12, 0.3, 2.0, 1.0])
    assert np.isnan(found[:, 1]).all()
    assert found[:3, 2].tolist() == pytest.approx([0, 0, 3.0])
    assert np.isnan(found[3:, 2]).all()
    half = box_errors(predicted, truth, np.array([0, -1, 1]), half_turn=True)
    assert half[2, 2] == pytest.approx(math.pi - 3)


def test_finite_boxes_have_seven_finite_numbers() -> None:
    rows = [[0.0] * 9 for _ in range(8)]
    for place in range(7):
        rows[place][place] = math.nan
    rows[7][8] = math.nan  # velocity may be unknown
    assert nine(*map(tuple, rows), attributes=("",) * 8).finite.tolist() == [False] * 7 + [True]


def test_a_summary_weighs_map_five_times_and_each_error_once() -> None:
    precisions = np.array([[[0.2, 0.4, 0.6, 0.8], [0.0, 0.0, 0.2, 0.2]]])
    errors = np.array([[[0.5, 0.2, 3.0, 0.4, np.nan], [0.1, 0.4, np.nan, 0.8, np.nan]]])
    two = np.array([[[0.3, 0.1], [0.5, 0.3]]])
    found = Scores(precisions, errors, two, two / 2, np.zeros((1, 2))).summary()
    assert found["mAP"] == pytest.approx([0.3])
    expected = {"mATE": 0.3, "mASE": 0.3, "mAOE": 3.0, "mAVE": 0.6, "mAAE": 0.0}
    assert {name: float(found[name][0]) for name in expected} == pytest.approx(expected)
    assert found["NDS"] == pytest.approx([(5 * 0.3 + 0.7 + 0.7 + 0 + 0.4 + 1) / 10])
    assert [float(found[n][0]) for n in ("BEV AP@0.5", "BEV AP@0.7", "3D AP@0.5", "3D AP@0.7")] == pytest.approx(
        [0.4, 0.2, 0.2, 0.1]
    )


def test_an_interval_holds_95_of_100_draws_and_not_the_samples_themselves() -> None:
    draws = np.concatenate(([500.0], np.arange(1001.0)))
    assert ConfidenceInterval.of(draws) == (500.0, pytest.approx(25), pytest.approx(975))
    assert ConfidenceInterval.of(np.array([7.0])) == (7, 7, 7)
    assert ConfidenceInterval.of(np.concatenate(([1e9], np.zeros(100)))) == (1e9, 0, 0)


def test_draws_are_as_many_samples_as_there_are() -> None:
    weights = draw_samples(7, 500, 3)
    assert weights.shape == (501, 7)
    assert (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 7).all()
    assert np.array_equal(weights, draw_samples(7, 500, 3))
    assert not np.array_equal(weights, draw_samples(7, 500, 4))
    assert abs(weights[1:].mean(axis=0) - 1).max() < 6 * math.sqrt(6 / 7 / 500)  # standard deviations of the mean


# Goals and predictions ----------------------------------------------------------------------------------------------


def test_the_excess_over_a_goal_is_that_of_its_worst_figure() -> None:
    goal = Goal.parse("rel_l2<1e-3 and boxes_lost==0")
    assert goal.excess({"rel_l2": 2e-3, "boxes_lost": 0}) == pytest.approx(2)
    assert goal.excess({"rel_l2": 5e-4, "boxes_lost": 0}) == pytest.approx(0.5)
    assert goal.excess({"rel_l2": 5e-4, "boxes_lost": 1}) == math.inf
    assert goal.excess({"rel_l2": math.nan, "boxes_lost": 0}) == math.inf
    assert goal.holds({"rel_l2": 9.9e-4, "boxes_lost": 0})
    assert not goal.holds({"rel_l2": 1e-3, "boxes_lost": 0})
    assert Goal.parse("rel_l2<=1e-3").holds({"rel_l2": 1e-3})
    assert not goal.holds({"rel_l2": 9.9e-4, "boxes_lost": 1})
    assert not goal.holds({"rel_l2": math.nan, "boxes_lost": 0})


def groups(count: int) -> list[FusionGroup]:
    return [FusionGroup("net", (f"n{i}",), f"layer{i}") for i in range(count)]


def predictor(goal: str, local: list[float], shares: list[float]) -> Predictor:
    layers = groups(len(local))
    of_nodes = {("net", f"n{i}"): share for i, share in enumerate(shares)}
    return Predictor(layers, Goal.parse(goal), lambda group: local[layers.index(group)], lambda kept: of_nodes)


def names(found: list[FusionGroup]) -> list[str]:
    return [group.name for group in found]


def test_layers_with_the_largest_shares_are_kept_until_the_rest_is_predicted_to_hold() -> None:
    """25 = 16 + 4 + 4 + 1: without the largest 3 of 5 is left, without two 2.2, without three 1."""
    shares = [0.04, 0.64, 0.16, 0.16]
    whole = Measured({"rel_l2": 5.0, "max_abs": 50.0}, {"y": 5.0})
    assert names(predictor("rel_l2<2.5", [1, 2, 3, 4], shares).extend([], whole)) == ["layer1", "layer3"]
    assert len(predictor("rel_l2<3.5", [1] * 4, shares).extend([], whole)) == 1
    assert len(predictor("max_abs<35", [1] * 4, shares).extend([], whole)) == 1
    assert len(predictor("max_abs<25", [1] * 4, shares).extend([], whole)) == 2
    assert len(predictor("max_abs<25 and rel_l2<1.5", [1] * 4, shares).extend([], whole)) == 3
    # Of boxes nobody knows how they follow the error: three tenths of it may remain.
    assert len(predictor("boxes_lost==0", [1] * 4, shares).extend([], whole)) == 3


def test_a_layer_against_the_divergence_is_kept_last() -> None:
    whole = Measured({"rel_l2": 1.0}, {"y": 1.0})
    assert names(predictor("rel_l2<1e-9", [1] * 3, [-0.1, 0.8, 0.3]).extend([], whole)) == ["layer1", "layer2"]
    # A share as small as one against it says nothing yet: it is asked again with the others kept.
    assert names(predictor("rel_l2<1e-9", [1] * 3, [-0.5, 1.2, 0.3]).extend([], whole)) == ["layer1"]


def test_where_shares_do_not_add_up_those_that_lead_are_kept_whatever_their_sign() -> None:
    whole = Measured({"rel_l2": 1.0}, {"y": 1.0})
    assert names(predictor("rel_l2<1e-9", [1] * 4, [0.01, -0.16, 0.05, 0.001]).extend([], whole)) == [
        "layer1",
        "layer2",
    ]


def test_what_overflows_by_itself_is_kept_before_anything_is_asked() -> None:
    made = predictor("rel_l2<1", [1, math.inf, 3, math.inf], [0] * 4)
    assert names(made.extend([], Measured({"rel_l2": math.inf}, {"y": math.inf}))) == ["layer1", "layer3"]
    assert made.shares == {}


def test_where_no_share_is_known_the_set_doubles() -> None:
    made = predictor("rel_l2<1e-9", [5, 4, 3, 2, 1], [0] * 5)
    whole = Measured({"rel_l2": 9.0, "max_abs": 9.0}, {"y": 9.0})
    assert names(made.extend([], whole)) == ["layer0"]
    assert names(made.extend(groups(5)[:2], whole)) == ["layer2", "layer3"]
    assert len(made.extend(groups(5)[:4], whole)) == 1


# Sensitivity --------------------------------------------------------------------------------------------------------


def effect(error: float, *change: float) -> Int8Effect:
    return Int8Effect(error, {"mAP": ConfidenceInterval(*change)} if change else {})


def test_an_error_of_several_outputs_is_their_root_mean_square() -> None:
    assert Measured({}, {"a": 3.0, "b": 4.0}).error == pytest.approx(math.sqrt(12.5))
    assert effect(0.01).sqnr == pytest.approx(40)
    assert effect(0.0).sqnr == math.inf


def test_a_change_is_the_score_now_less_the_score_before() -> None:
    before, now = Measured(draws={"mAP": np.array([0.5, 0.6, 0.4])}), Measured(draws={"mAP": np.array([0.4, 0.3, 0.3])})
    value, low, high = now.change("mAP", before)
    assert value == pytest.approx(-0.1)
    assert -0.3 <= low < high <= -0.1


def test_an_object_is_found_as_often_as_its_sample_is_drawn() -> None:
    def boxes(*places: tuple[float, int]) -> Boxes:
        rows = np.array([[x, 0, 0, 4, 2, 1.5, 0, 0, 0] for x, _ in places], np.float64)
        count = len(places)
        return Boxes.of(rows, np.array([s for _, s in places]), [0] * count, [0.9] * count, np.array([""] * count))

    predicted, truth = boxes((0.0, 0), (0.0, 1), (9.0, 1), (50.0, 2)), boxes((0.1, 0), (0.1, 1), (9.1, 1), (0.0, 2))
    draws = np.array([[1.0, 1.0, 1.0], [3.0, 0.0, 0.0], [0.0, 2.0, 1.0]])
    found = score(predicted, truth, ["car"], draws)
    assert found.found.tolist() == [[3.0], [3.0], [4.0]]


# In parts -----------------------------------------------------------------------------------------------------------


def test_rings_begin_where_the_one_before_ends() -> None:
    rings = rings_of([20, 40.5], EvaluationOptions())
    assert rings.names == ["0–20 m", "20–40.5 m", "from 40.5 m"]
    places = np.array([[0, 0], [12, 16.1], [20, 0], [-40.5, 0], [30, 27], [math.nan, 0]])
    assert rings.of(places).tolist() == [0, 1, 1, 2, 1, 2]
    assert rings_of([], EvaluationOptions(region=(-30, -54, 40, 20))).edges == (18.0, 36.0)
    assert rings_of([], EvaluationOptions(ranges={"car": 30, "bus": 50})).edges == (16.7, 33.3)
    assert rings_of([], EvaluationOptions()).edges == (20.0, 40.0)
    for edges in ([20, 20], [20, 10], [0, 10], [-1]):
        with pytest.raises(InputError, match="expected metres that rise, as in 20,40"):
            rings_of(edges, EvaluationOptions())


def in_parts(*lost: float) -> tuple[dict[str, Predictions], list[Truth]]:
    """Two samples of two classes: cars at 5, 30 and 55 m, buses at 8 m; the test finds none at the places ``lost``."""
    objects = [(5.0, 0), (30.0, 0), (55.0, 0), (8.0, 1)]
    rows = np.array([[x, 0, 1, 4, 2, 2, 0, 0, 0] for x, _ in objects], np.float32)
    labels, count = np.array([label for _, label in objects]), len(objects)
    truth = Truth(rows[:, :7], labels, rows[:, 7:], np.full(count, 9), np.array([""] * count))

    def predictions(missing: tuple[float, ...]) -> Predictions:
        kept = ~np.isin(rows[:, 0], missing)
        boxes, kinds = np.tile(rows[kept], (2, 1)), np.tile(labels[kept], 2)
        scores = np.full(len(boxes), 0.9, np.float32)
        return Predictions(boxes, scores, kinds.astype(np.int16), np.array([kept.sum()] * 2))

    return {"torch": predictions(()), "trt": predictions(lost)}, [truth, truth]


def test_each_class_has_its_own_precision_and_difference() -> None:
    options = EvaluationOptions(draws=3)
    car, bus = by_class(*in_parts(8.0), ["car", "bus"], options)
    assert (car.part, car.objects, bus.part, bus.objects) == ("car", 6, "bus", 2)
    assert car.figures["trt"]["AP"].value == bus.figures["torch"]["AP"].value == pytest.approx(1)
    assert car.differences["trt"]["AP"].value == 0
    assert bus.figures["trt"]["AP"].value == 0
    assert bus.differences["trt"]["AP"].value == pytest.approx(-1)
    assert "torch" not in bus.differences


def test_each_ring_has_the_classes_that_stand_there() -> None:
    options, rings = EvaluationOptions(draws=3), Rings((20.0, 60.0))
    near, middle = by_distance(*in_parts(8.0, 55.0), ["car", "bus"], options, rings)  # nothing stands beyond 60 m
    assert (near.part, near.objects, middle.part, middle.objects) == ("0–20 m", 4, "20–60 m", 4)
    assert near.figures["torch"]["mAP"].value == middle.figures["torch"]["mAP"].value == pytest.approx(1)
    assert near.figures["trt"]["mAP"].value == pytest.approx(0.5)  # the cars there, no buses
    assert 0 < middle.figures["trt"]["mAP"].value < 0.6  # cars alone: half of them
    assert near.differences["trt"]["mAP"].value == pytest.approx(-0.5)
    assert set(near.figures["trt"]) == {"mAP", "NDS"}


def test_positions_count_what_stands_before_in_the_same_group() -> None:
    assert _position_in_group(np.array([7, 3, 7, 7])).tolist() == [0, 0, 1, 2]
    assert _position_in_group(np.array([2, 2, 0, 1, 0, 2])).tolist() == [0, 1, 0, 0, 1, 2]
    assert _position_in_group(np.array([], np.int64)).tolist() == []


def test_changes_of_detections_add_up() -> None:
    first = DetectionChange(10, 2, 1, 3, 0.1, 0.2, 0.3, 0.4, 0.05)
    second = DetectionChange(4, 2, 0, 1, 0.2, 0.1, 0.4, 0.3, -0.15)
    both = first + second
    assert (both.reference, both.lost, both.gained, both.moved) == (14, 4, 1, 4)
    assert (both.max_center, both.max_size, both.max_yaw, both.max_score) == (0.2, 0.2, 0.4, 0.4)
    assert both.mean_score == pytest.approx((0.05 * 8 - 0.15 * 2) / 10)
    assert str(first).startswith("10 boxes: 2 lost, 1 gained, 3 moved; at most 0.1 m in centre, 0.2 m in size, 0.3 rad")
    assert str(DetectionChange(3, 3, 1)) == "3 boxes: 3 lost, 1 gained"
    assert (DetectionChange() + DetectionChange()).mean_score == 0


def test_what_rounds_to_zero_has_no_minus() -> None:
    assert [signed(v) for v in (-0.00001, -0.0, 0.00001, -0.00006)] == ["+0.0000", "+0.0000", "+0.0000", "-0.0001"]
    assert [fixed(v, 1) for v in (-0.04, -0.06, math.nan)] == ["0.0", "-0.1", "–"]
    change = DetectionChange(3, 0, 0, mean_score=-0.0)
    assert "+0 on average" in str(change)

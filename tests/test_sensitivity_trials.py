"""Trials of a sensitivity profile, on runs whose figures are known beforehand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cp_debug.detection.evaluation import ConfidenceInterval
from cp_debug.errors import InputError
from cp_debug.mixed_precision.layers import FusionGroup
from cp_debug.mixed_precision.sensitivity import (
    Int8Effect,
    LayerSensitivity,
    choose_layers,
    get_sensitive_layers,
    is_scored,
    profile_of,
)
from cp_debug.mixed_precision.trials import Measured
from cp_debug.recipes.base import Sample
from cp_debug.recipes.data.base import Truth

SAMPLES = [Sample({}, "a"), Sample({}, "b")]


class Errors:
    """A model whose layers bring known errors to its one output; their squares, and losses of mAP, add up."""

    def __init__(self, errors: Mapping[str, float], losses: Mapping[str, float] | None = None) -> None:
        self.errors, self.losses = errors, losses
        self.model: Any = SimpleNamespace(name="net")
        self.all = frozenset(errors)
        self.asked: list[frozenset[str]] = []
        self.notes: list[str] = []
        self.precision = "int8"

    def measure(
        self, samples: Sequence[Sample], sets: Iterable[frozenset[str]], *, draws: int, on_step: Any
    ) -> dict[frozenset[str], Measured]:
        assert list(samples) == SAMPLES
        return {kept: self.of(kept) for kept in sets}

    def shares(self, samples: Sequence[Sample]) -> list[LayerSensitivity]:
        assert list(samples) == SAMPLES
        whole = sum(error**2 for error in self.errors.values())
        return [LayerSensitivity(n, "Conv2d", len(n), error / 2, error**2 / whole) for n, error in self.errors.items()]

    def of(self, kept: frozenset[str]) -> Measured:
        self.asked.append(kept)
        low = [n for n in self.errors if n not in kept]
        error = math.sqrt(sum(self.errors[n] ** 2 for n in low))
        draws = {}
        if self.losses is not None:
            draws["mAP"] = np.full(3, 0.6 - sum(self.losses[n] for n in low))
        return Measured({"rel_l2": error}, {"y": error}, draws)


ERRORS = {"a": 0.3, "bb": 0.4, "ccc": 0.0}


def test_a_layer_has_its_share_and_is_left_out() -> None:
    profile = profile_of(_any(Errors(ERRORS, {"a": 0.2, "bb": 0.1, "ccc": 0.0})), SAMPLES, data="d")
    found = {row.layer: row for row in profile.layers}
    assert {name: round(row.share, 6) for name, row in found.items()} == {"a": 0.36, "bb": 0.64, "ccc": 0.0}
    left_out = {name: row.left_out for name, row in found.items() if row.left_out is not None}
    assert {name: round(effect.error, 6) for name, effect in left_out.items()} == {"a": 0.4, "bb": 0.3, "ccc": 0.5}
    assert (found["bb"].weights, found["bb"].kind, found["bb"].introduced) == (2, "Conv2d", 0.2)
    # Against FP32 what INT8 costs, for a layer that is left out what it gives back.
    assert profile.int8.scores["mAP"].value == pytest.approx(-0.3)
    assert left_out["a"].scores["mAP"].value == pytest.approx(0.2)
    assert profile.scores["mAP"] == pytest.approx(0.6)
    assert (profile.model, profile.data, profile.samples, profile.int8.error) == ("net", "d", 2, pytest.approx(0.5))


def test_layers_are_ranked_by_what_they_cost() -> None:
    assert [row.layer for row in profile_of(_any(Errors(ERRORS)), SAMPLES).layers] == ["bb", "a", "ccc"]  # by share
    scored = Errors(ERRORS, {"a": 0.2, "bb": 0.1, "ccc": 0.0})
    assert [row.layer for row in profile_of(_any(scored), SAMPLES).layers] == ["a", "bb", "ccc"]


@pytest.mark.parametrize(("budget", "left"), [(0.6, []), (0.45, ["bb"]), (0.35, ["bb"]), (0.2, ["bb", "a"])])
def test_layers_are_left_out_until_the_rest_is_within_the_budget(budget: float, left: list[str]) -> None:
    runner: Any = Errors(ERRORS)
    profile = profile_of(runner, SAMPLES)
    runner.asked.clear()
    choice = choose_layers(runner, SAMPLES, profile, budget)
    assert runner.asked[:3] == [runner.all, frozenset(), *([frozenset(left)] if left else [])]  # at once the prediction
    assert sorted(choice.skipped) == sorted(left)
    assert choice.loss.value <= budget
    assert choice.loss.value == pytest.approx(runner.of(frozenset(left)).error)
    assert choice.budget == budget
    assert get_sensitive_layers(profile, budget) == left


def test_a_budget_of_map_counts_what_is_lost() -> None:
    runner: Any = Errors(ERRORS, {"a": 0.2, "bb": 0.05, "ccc": -0.01})
    profile = profile_of(runner, SAMPLES, budget=0.06)
    assert profile.choice is not None
    assert profile.choice.skipped == ["a"]
    assert profile.choice.loss.value == pytest.approx(0.04)
    assert get_sensitive_layers(profile, 0.06) == ["a"]
    assert get_sensitive_layers(profile, 1.0) == []
    with pytest.raises(InputError, match="expected a positive budget"):
        choose_layers(runner, SAMPLES, profile, 0.0)


def test_decibels_and_scores_of_an_effect_are_written_and_read() -> None:
    change = ConfidenceInterval(-0.1, -0.2, -0.05)
    effect = Int8Effect(0.01, {"mAP": change})
    assert effect.sqnr == pytest.approx(40)
    assert effect.derived() == {"sqnr_db": pytest.approx(40), "mAP": change}
    assert Int8Effect(0.0, {}).sqnr == math.inf
    assert Int8Effect.fields_from({"error": 0.01, "sqnr_db": 40.0, "mAP": 1})["scores"] == {"mAP": 1}


def test_detections_are_scored_where_there_are_classes_and_truth_everywhere() -> None:
    truth = Truth(*(np.zeros(0) for _ in Truth.__dataclass_fields__))
    known = [Sample({}, "a", truth=truth), Sample({}, "b", truth=truth)]
    detector: Any = SimpleNamespace(class_names=("car",))
    assert is_scored(detector, known)
    assert not is_scored(detector, [*known, Sample({}, "c")])
    assert not is_scored(_any(SimpleNamespace()), known)


def kept(component: str, node: str) -> frozenset[FusionGroup]:
    return frozenset([FusionGroup(component, (node,), node)])


def _any(value: Any) -> Any:
    return value

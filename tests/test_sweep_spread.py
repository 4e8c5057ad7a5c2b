"""Figures over samples: what they mean for broken values, and which samples stand out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_debug.sweep.spread import FEWEST, OUTLYING, Spread, numeric, outliers, outlying, robust_scores

figures = st.lists(st.floats(0, 1e300) | st.sampled_from([math.nan, math.inf]), min_size=1, max_size=40)


@given(figures)
def test_a_spread_is_in_order_and_names_a_sample_that_has_the_worst(values: list[float]) -> None:
    spread = Spread.of(values)
    known = [value for value in values if not math.isnan(value)]
    if spread is None:
        assert not known
        return
    assert spread.count == len(known)
    assert min(known) <= spread.median <= spread.p95 <= spread.worst
    assert spread.worst == max(known) == values[spread.sample]
    assert sum(value <= spread.p95 for value in known) >= 0.95 * len(known)


@given(st.lists(st.floats(1e-9, 1e9), min_size=2, max_size=30), st.floats(1e-3, 1e3))
def test_scores_do_not_depend_on_the_unit(values: list[float], unit: float) -> None:
    scaled = robust_scores(np.array(values) * unit)
    np.testing.assert_allclose(robust_scores(values), scaled, rtol=1e-3, atol=1e-3)


def test_scores_of_a_normal_distribution_are_standard_deviations() -> None:
    logs = np.random.default_rng(0).standard_normal(20_000) * 0.3 - 5
    np.testing.assert_allclose(robust_scores(10**logs), (logs + 5) / 0.3, atol=0.1)


def test_one_sample_among_many_stands_out() -> None:
    values = [1e-3, 1.1e-3, 0.9e-3, 1.05e-3, 1.2e-3, 0.8, 0.95e-3]
    found = outlying(values)
    assert list(found) == [5]
    assert found[5] > OUTLYING


def test_a_broken_sample_stands_out_infinitely() -> None:
    assert outlying([1e-3, 2e-3, 1.5e-3, math.inf, 1.2e-3, 1.1e-3]) == {3: math.inf}


@pytest.mark.parametrize(
    "values",
    [
        [1e-3] * 8,
        [0.0] * 8,
        [1e-3, 1.0001e-3, 1e-3, 1.0001e-3, 1e-3, 1.01e-3],  # tight: not twice the median
        [1e-3] * (FEWEST - 2) + [1.0],  # too few
        [math.nan] * 10,
    ],
)
def test_nobody_stands_out(values: list[float]) -> None:
    assert outlying(values) == {}


def test_more_than_half_equal() -> None:
    assert list(outlying([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 5.0])) == [7]


def test_samples_that_stand_out_in_layers_alone_are_named_too() -> None:
    steady = [1.0, 1.1, 0.9, 1.05, 1.0, 0.95]
    names = [f"scene {i}" for i in range(6)]
    found = outliers(names, steady, {"a": steady, "b": [*steady[:4], 50.0, 1.0], "c": [*steady[:4], 60.0, 1.0]})
    assert [(each.sample, each.score, each.layers) for each in found] == [("scene 4", None, ["b", "c"])]


@pytest.mark.parametrize(
    ("value", "number"), [("Infinity", math.inf), ("NaN", math.inf), (math.nan, math.inf), (3, 3.0)]
)
def test_numbers_that_json_lacks(value: object, number: float) -> None:
    assert numeric(value) == number


def test_what_is_absent_is_not_broken() -> None:
    assert math.isnan(numeric(None))


def test_a_reason_is_told_once_though_every_message_names_its_own_sample() -> None:
    from cp_debug.reports.sweep import by_reason
    from cp_debug.sweep.run import FailedTasks

    def failed(file: str, error: str) -> FailedTasks:
        return FailedTasks("net.onnx", ["ort", "emu-fp16"], f"{file}, sample 0", error)

    failures = [failed(f"/in/{n}.npz", f"/in/{n}.npz: unknown input 'y'; /in/{n}.npz has no x") for n in range(3)]
    failures.append(FailedTasks("net.onnx", ["ort"], "sample 4", "out of memory"))
    (first, tasks), (second, others) = by_reason(failures)
    assert (first, tasks) == ("unknown input 'y'; its file has no x", failures[:3])
    assert (second, others) == ("out of memory", failures[3:])

"""Choice of a cause by its evidence, from figures that are given: how much must be explained, and what is chance."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cp_debug.bisect.causes import search
from cp_debug.bisect.causes.base import Candidate
from cp_debug.bisect.causes.search import Explanation, accepted, explain


def layer(*, residuals: dict[str, float], contrast: float = 1.0, wrong: int = 1000, expected: float = 1e-9) -> Any:
    """A layer whose introduced error is 1; ``residuals``: cause → what of it the cause leaves."""

    def explained(value: Any) -> tuple[float, float]:
        return 1 - residuals[value], residuals[value]

    nothing = torch.zeros(4)
    context = SimpleNamespace(trimmer=SimpleNamespace(freed=lambda size: None))
    return SimpleNamespace(
        explained=explained, exact=nothing, test=nothing, context=context, strange=False,
        expected=expected, introduced=1.0, contrast=contrast, wrong=wrong, held=lambda value: value,
    )  # fmt: skip


def candidate(cause: str, **about: Any) -> Candidate:
    value: Any = cause  # ``layer`` looks up what it leaves by this
    return Candidate(cause, cause, value, **about)


class Family:
    """Proposes the candidates that it is given."""

    costly = by_node = structural = False

    def __init__(self, *candidates: Candidate, approximate: bool = False) -> None:
        self.candidates, self.approximate = candidates, approximate

    def __call__(self, segment: Any) -> Iterator[Candidate]:
        return iter(self.candidates)


def chosen(segment: Any, *families: Family) -> Explanation:
    return explain(segment, families=families)[0]


@pytest.mark.parametrize(("residual", "contrast", "named"), [(0.09, 1.0, True), (0.11, 1.0, False), (0.09, 0.5, False)])
def test_nine_tenths_of_the_error_and_of_the_results_own_variation_must_be_explained(
    residual: float, contrast: float, named: bool
) -> None:
    """Where a large result is lost, anything small explains nine tenths of the error: it must be like what is there."""
    assert (accepted(layer(residuals={"a": residual}, contrast=contrast), candidate("a")) is not None) == named


@pytest.mark.parametrize(
    ("approximate", "residual", "named"),
    [(True, 0.09, True), (True, 0.11, False), (False, 0.004, True), (False, 0.006, False)],
)
def test_what_is_computed_exactly_must_explain_all_but_rounding(
    approximate: bool, residual: float, named: bool
) -> None:
    found = chosen(layer(residuals={"a": residual}), Family(candidate("a"), approximate=approximate))
    assert (found.cause is not None) == named
    assert (found.cause or found.runner_up) is not None
    assert (found.explained if named else found.runner_up_explained) == pytest.approx(1 - residual)


def test_what_leaves_no_more_than_the_rounding_is_complete() -> None:
    for expected, named in ((0.01, False), (0.03, True)):
        found = chosen(layer(residuals={"a": 0.05}, expected=expected), Family(candidate("a")))
        assert (found.cause is not None) == named


@pytest.mark.parametrize(
    ("wrong", "parameters", "named"),
    [(1, 0, False), (2, 0, False), (3, 0, True), (3, 1, False), (4, 1, True), (2, 2, False)],
)
def test_one_of_many_hypotheses_may_fit_few_wrong_elements_by_chance(wrong: int, parameters: int, named: bool) -> None:
    """300 hypotheses, each within 0.4 % of n wrong elements by chance with 0.004ⁿ: 1.2, 0.005 and 2e-5 of them."""
    found = chosen(layer(residuals={"a": 0.004}, wrong=wrong), Family(candidate("a", parameters=parameters)))
    assert (found.cause is not None) == named
    where = chosen(layer(residuals={"a": 0.004}, wrong=wrong), Family(candidate("a", located=True)))
    assert where.cause is not None  # it copies the wrong elements: chance has no part in it


@pytest.mark.parametrize(("fitted", "plain", "named"), [(0.002, 0.003, "plain"), (0.001, 0.004, "fitted")])
def test_of_equal_explanations_the_simplest_is_named_and_the_best_of_the_others_beside_it(
    fitted: float, plain: float, named: str
) -> None:
    """Within a factor of 1.6 they are equal; four times nearer is better, though fitted."""
    families = [Family(candidate("fitted", parameters=3)), Family(candidate("plain")), Family(candidate("worse"))]
    found = chosen(layer(residuals={"fitted": fitted, "plain": plain, "worse": 0.5}), *families)
    assert found.cause is not None
    assert found.cause.cause == named
    assert found.runner_up is not None
    second = ("worse", 0.5) if named == "plain" else ("plain", pytest.approx(1 - plain))
    assert (found.runner_up.cause, found.runner_up_explained) == second
    assert found.equals == ()


@pytest.mark.parametrize(("first", "second", "told"), [(0.5, 0.5001, "b"), (0.5001, 0.5, "b"), (0.49, 0.5, "a")])
def test_of_two_runners_up_that_are_as_near_the_simpler_is_told(first: float, second: float, told: str) -> None:
    """Which one is nearer by a rounding depends on the processor."""
    families = [Family(candidate("best")), Family(candidate("a", parameters=9)), Family(candidate("b", parameters=3))]
    found = chosen(layer(residuals={"best": 0.001, "a": first, "b": second}), *families)
    assert found.runner_up is not None
    assert found.runner_up.cause == told


def test_another_cause_that_explains_as_much_with_no_more_numbers_is_told_with_it() -> None:
    families = [Family(candidate("a")), Family(candidate("b")), Family(candidate("seen", observed=True))]
    found = chosen(layer(residuals={"a": 0.002, "b": 0.003, "seen": 0.002}), *families)
    assert found.cause is not None
    assert {found.cause.cause, *(c.cause for c in found.equals)} == {"a", "b"}


@pytest.mark.parametrize(("declared", "told"), [(True, set()), (False, {"left out"})])
def test_beside_what_the_declared_precision_gives_nothing_is_told_that_has_only_the_same_effect(
    declared: bool, told: set[str]
) -> None:
    families = [Family(candidate("underflow", heard=True, declared=declared)), Family(candidate("left out"))]
    found = chosen(layer(residuals={"underflow": 0.002, "left out": 0.003}), *families)
    assert found.cause is not None
    assert found.cause.cause == "underflow"
    assert {c.cause for c in found.equals} == told


def test_of_equal_causes_the_one_from_the_family_with_the_fewest_others_is_named() -> None:
    many = Family(candidate("many"), *(candidate(f"other {i}") for i in range(8)))
    residuals = {"many": 0.002, "rare": 0.003} | {f"other {i}": 0.9 for i in range(8)}
    found = chosen(layer(residuals=residuals), many, Family(candidate("rare")))
    assert found.cause is not None
    assert found.cause.cause == "rare"


@pytest.mark.parametrize(("simple", "many", "cause"), [(9e-4, 32, "plain"), (2e-3, 32, "fitted"), (9e-4, 1, "fitted")])
def test_many_numbers_that_gain_rounding_alone_lose_to_none(simple: float, many: int, cause: str) -> None:
    """Both leave nothing but rounding, the fit half as much: that half is what its numbers have learnt of rounding."""
    segment = layer(residuals={"plain": simple, "fitted": simple / 2}, expected=simple / 2)
    families = Family(candidate("plain")), Family(candidate("fitted", parameters=many))
    best = chosen(segment, *families).cause
    assert best is not None
    assert best.cause == cause


def bare_candidate(cause: str = "a", parameters: int = 0, **fields: Any) -> Any:
    given = {"located": False, "declared": False, "observed": False, "evidence": {}}
    return SimpleNamespace(cause=cause, parameters=parameters, **{**given, **fields})


@pytest.mark.parametrize(
    ("wrong", "parameters", "residual", "chance"),
    [
        (100, 0, 0.5, False),
        (3, 0, 0.5, True),
        (2, 0, 1e-6, False),
        (2, 2, 1e-6, True),
        (5, 2, 0.5, True),
        (0, 0, 0.5, True),
        (18, 0, 0.5, True),
        (19, 0, 0.5, False),
    ],
)
def test_few_wrong_elements_may_fit_by_chance(wrong: int, parameters: int, residual: float, chance: bool) -> None:
    """300 hypotheses, each with a share of 0.5 in n elements: 300 · 0.5¹⁸ is above a thousandth, 0.5¹⁹ below."""
    segment: Any = SimpleNamespace(wrong=wrong, introduced=1.0)
    assert search._by_chance(segment, bare_candidate(parameters=parameters), residual) is chance
    assert not search._by_chance(segment, bare_candidate(parameters=parameters, located=True), residual)
    assert not search._by_chance(segment, bare_candidate(parameters=parameters, observed=True), residual)


def test_fewer_numbers_that_leave_rounding_alone_are_simpler() -> None:
    best: Any = SimpleNamespace(candidate=bare_candidate(parameters=8))
    for parameters, complete, explained, simpler in (
        (5, True, 0.9995, True),
        (6, True, 0.9995, False),
        (5, False, 0.9995, False),
        (5, True, 0.998, False),
    ):
        tried: Any = SimpleNamespace(
            candidate=bare_candidate(parameters=parameters), complete=complete, explained=explained
        )
        assert search._simpler(tried, best) is simpler


def test_operators_that_the_same_cause_may_name_as_well() -> None:
    def tried(op: str, cause: str = "a", parameters: int = 1, accepted: bool = True) -> Any:
        return SimpleNamespace(candidate=bare_candidate(cause, parameters, evidence={"op": op}), accepted=accepted)

    chosen = tried("Relu")
    others = [
        tried("Relu"),
        tried("Clip"),
        tried("Tanh", "b"),
        tried("Elu", parameters=2),
        tried("Abs", accepted=False),
    ]
    assert search._alike(chosen, others) == ("Clip",)
    chosen.candidate.evidence = {}
    assert search._alike(chosen, others) == ()

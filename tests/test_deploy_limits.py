"""Limits of a verification, from figures that are given: whose limit counts, which output is the worst, what passes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cp_debug.deploy.verify import (
    MARGIN,
    ScenarioResult,
    TensorCheck,
    Tolerances,
    VerifyOptions,
    VerifyResult,
    _check_not_empty,
    _RunningScenario,
    _uncompared,
    verify,
    what_is_wrong,
)
from cp_debug.errors import InputError
from cp_debug.graph.pairing import Pairing
from cp_debug.probes.statistics import compare
from cp_debug.programs.paired import check_outputs
from cp_debug.programs.pipeline import Key
from cp_debug.recipes.base import Sample


def test_a_limit_is_the_users_for_the_tensor_before_that_for_the_precision() -> None:
    limits = Tolerances({"heat@fp16": 0.1, "heat": 0.2, "fp16": 0.3}, ["heat", "reg"])
    assert limits.limit("heat", 1e-6, "fp32", "fp16") == 0.1
    assert limits.limit("heat", 1e-6, "fp32", "fp32") == 0.2
    assert limits.limit("reg", 1e-6, "fp32", "fp16") == 0.3
    assert limits.limit("reg", 1e-6, "fp32", "fp32") == pytest.approx(MARGIN * 1e-6)
    assert limits.limit("reg", 1e-6, "fp64", "fp32") == pytest.approx(MARGIN * 1e-6)
    plain = Tolerances({}, ["reg"])
    assert plain.limit("reg", 1e-6, "fp32", "fp16") == pytest.approx(MARGIN * 1e-6 * 2**13)  # 24 bits against 11
    for wrong in ("nose", "heat@fp99", "nose@fp16"):
        with pytest.raises(InputError, match="expected a tensor"):
            Tolerances({wrong: 1.0}, ["heat"])


@pytest.mark.parametrize(
    ("reference", "test", "max_abs", "says"),
    [
        ([1.0, 2.0], [1.0, 2.0], None, ""),
        ([1.0, 2.0], [1.0, 2.0001], None, ""),
        ([1.0, 2.0], [1.0, 2.1], None, "relative L2 0.045; expected at most 0.001"),
        ([1.0, 2.0], [1.0, 2.001], 1e-4, "max |Δ| 0.001; expected at most 0.0001"),
        ([1.0, 2.0], [1.0, 2.001], 1.0, ""),
        ([1.0, 2.0], [float("nan"), float("inf")], None, "2 NaN or Inf"),
        ([1.0, float("inf")], [1.0, 2.0], None, "the reference holds 1 NaN or Inf, the test none"),
        ([1.0, 2.0], [1.0], None, "the shape is [1]; expected [2]"),
    ],
)
def test_what_is_wrong_with_an_output(reference: Any, test: Any, max_abs: float | None, says: str) -> None:
    import numpy as np

    stats = compare(np.array(reference, np.float32), np.array(test, np.float32))
    assert what_is_wrong(stats, 1e-3, max_abs) == says


def test_the_worst_sample_of_an_output_is_kept_with_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    sides: Any = [
        SimpleNamespace(backend=SimpleNamespace(spec=s, precision="fp32"), record=lambda s=s: s, programs=[])
        for s in ("torch", "ort")
    ]
    running = _RunningScenario(*sides, Tolerances({}, ["y"]), None)
    made = lambda *parts: SimpleNamespace(parts=parts)  # noqa: E731
    monkeypatch.setattr("cp_debug.deploy.verify.ScenarioResult", made)
    for number, (source, off) in enumerate((("a", 0.1), ("b", 0.5), ("c", 0.2))):
        values = {"torch": np.ones(4, np.float32), "ort": np.full(4, 1 + off, np.float32)}
        passes: Any = SimpleNamespace(
            sample=SimpleNamespace(source=source),
            outputs=lambda side, values=values: {"net": {"y": values[side.backend.spec]}},
            preprocessing=lambda sides, source=source: {source: "same"},
            detections=lambda sides, number=number: number or None,
        )
        running.add(passes, {Key("net", "y"): 1e-7})
    reference, test, (check,), voxels, detections, _ = running.result().parts  # type: ignore[attr-defined]
    assert running.result().judged_as == "fp32"
    assert (reference, test) == ("torch", "ort")
    assert (check.component, check.name, check.source, check.floor) == ("net", "y", "b", 1e-7)
    assert check.stats.rel_l2 == pytest.approx(0.5)
    assert check.why
    assert list(voxels) == ["a", "b", "c"]
    assert detections == 3  # those of the second and the third sample, added up


def test_a_verification_passes_where_all_scenarios_do() -> None:
    for passed in ((True, True), (True, False), (False, False)):
        scenarios: Any = [SimpleNamespace(passed=p) for p in passed]
        assert VerifyResult("m", ["s"], scenarios).passed == all(passed)


def test_a_scenario_of_which_nothing_was_compared_is_refused() -> None:
    some: Any = SimpleNamespace(name="torch → ort", checks=["a", "b"], empty=["a"])
    none: Any = SimpleNamespace(name="torch → trt", checks=["a", "b"], empty=["a", "b"])
    _check_not_empty([some])
    with pytest.raises(InputError, match="torch → trt: no output was compared: a, b without an element"):
        _check_not_empty([some, none])


def test_an_output_that_a_test_file_lacks_is_told_or_refused_where_others_hang_on_it() -> None:
    def outputs(*names: str) -> Any:
        return [SimpleNamespace(name=n) for n in names]

    ours: Any = SimpleNamespace(name="head", graph=SimpleNamespace(outputs=outputs("heat", "reg")))
    theirs: Any = SimpleNamespace(graph=SimpleNamespace(outputs=outputs("h", "r")), pairing=None)
    assert _uncompared([ours], [theirs]) == (set(), [])  # the same names
    theirs.pairing = Pairing({}, {}, {"heat": "h", "reg": "r"})
    assert _uncompared([ours], [theirs]) == (set(), [])
    theirs.pairing = Pairing({}, {}, {"heat": "h"})
    assert _uncompared([ours], [theirs]) == (set(), [Key("head", "reg")])
    theirs.pairing = Pairing({}, {}, {"heat": "h"}, left_out=["reg"])
    assert _uncompared([ours], [theirs]) == ({Key("head", "reg")}, [])
    theirs.pairing = Pairing({}, {}, {"heat": "h"})
    with pytest.raises(InputError, match=r"has no output that is 'reg'; its outputs are h, r"):
        check_outputs(ours.graph, theirs)  # of a component from which the next one computes on
    theirs.pairing = Pairing({}, {}, {})
    with pytest.raises(InputError, match=r"has no output that is 'heat'"):
        _uncompared([ours], [theirs])


def test_pillars_of_a_file_are_those_of_the_first_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Path | None]] = []
    monkeypatch.setattr(
        "cp_debug.deploy.verify._Passes", lambda model, sample, voxels: seen.append((sample.source, voxels))
    )
    monkeypatch.setattr("cp_debug.deploy.verify.checked", lambda model: model)
    model: Any = SimpleNamespace(name="m", components=[])
    samples = [Sample({}, name) for name in "abc"]
    found = verify(model, [], [], samples, VerifyOptions(voxels=Path("v.npz")))
    assert seen == [("a", Path("v.npz")), ("b", None), ("c", None)]
    assert found.samples == ["a", "b", "c"]


def check(off: float, why: str) -> TensorCheck:
    import numpy as np

    stats = compare(np.ones(4, np.float32), np.full(4, 1 + off, np.float32))
    return TensorCheck("net", "y", stats, 0.0, 0.1, "s", why)


def test_what_is_beyond_its_limit_is_worse_than_any_larger_difference() -> None:
    assert check(0.1, "too much").severity > check(5.0, "").severity > check(0.1, "").severity
    assert check(0.2, "too much").severity > check(0.1, "too much").severity


@pytest.mark.parametrize(("why", "agrees", "passes"), [("", True, True), ("too much", True, False), ("", False, False)])
def test_a_scenario_passes_where_tensors_are_within_limits_and_pillars_agree(
    why: str, agrees: bool, passes: bool
) -> None:
    side: Any = SimpleNamespace(spec="torch")
    pillars: Any = {"a": SimpleNamespace(agrees=True), "b": SimpleNamespace(agrees=agrees)}
    found = ScenarioResult(side, side, [check(0.1, ""), check(0.1, why)], pillars, None, {})
    assert found.passed == passes
    assert len(found.failures) == bool(why)


def test_the_largest_difference_is_limited_not_the_mean() -> None:
    import numpy as np

    stats = compare(np.ones(100, np.float32), np.r_[np.ones(99), 1.5].astype(np.float32))
    assert what_is_wrong(stats, 1.0, 0.4) == "max |Δ| 0.5; expected at most 0.4"
    assert what_is_wrong(stats, 1.0, 0.6) == ""

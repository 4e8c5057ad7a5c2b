"""The walk over a model's components: who is fed what, what is run, and what is not."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cp_debug.programs.walk import Walk, walk
from cp_debug.recipes.base import Arrays, Component, Sample

SAMPLE = Sample({"x": np.ones(2, np.float32)}, "here")


class Chain:
    """Three components; each is fed the sum of everything that is known."""

    name = "chain"
    components = tuple(Component(n, SimpleNamespace(), (f"{n}.in",), (f"{n}.out",)) for n in "abc")  # type: ignore[arg-type]

    def __init__(self) -> None:
        self.fed: list[tuple[str, tuple[str, ...]]] = []

    def feed(self, component: Component, sample: Sample, results: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
        self.fed.append((component.name, tuple(results)))
        return {f"{component.name}.in": sum((v for r in results.values() for v in r.values()), sample.arrays["x"])}


def doubled(component: Component, inputs: Arrays) -> Arrays:
    return {f"{component.name}.out": 2 * inputs[f"{component.name}.in"]}


def test_each_component_is_fed_what_those_before_it_gave() -> None:
    model: Any = Chain()
    results = walk(model, SAMPLE, doubled)
    assert model.fed == [("a", ()), ("b", ("a",)), ("c", ("a", "b"))]
    assert {name: outputs[f"{name}.out"][0] for name, outputs in results.items()} == {"a": 2, "b": 6, "c": 18}


def test_what_is_known_is_not_run() -> None:
    model: Any = Chain()
    known = {"a": {"a.out": np.full(2, 10, np.float32)}}
    results = walk(model, SAMPLE, doubled, known)
    assert [name for name, _ in model.fed] == ["b", "c"]
    assert results["b"]["b.out"][0] == 22
    assert list(known) == ["a"], "the caller's results are his own"


def test_nothing_is_fed_before_it_is_asked_for() -> None:
    model: Any = Chain()
    steps = list(Walk(model, SAMPLE))
    assert not model.fed
    assert [step.fed for step in steps] == [True, False, False]
    steps[0].outputs = {"a.out": steps[0].inputs["a.in"]}
    assert [step.fed for step in steps] == [True, True, False]
    assert (steps[0].known, steps[1].known, steps[1].last, steps[2].last) == (True, False, False, True)
    assert steps[0].inputs is steps[0].inputs
    assert model.fed == [("a", ())]


def test_one_step_by_name() -> None:
    model: Any = Chain()
    step = Walk(model, SAMPLE, {"a": {"a.out": SAMPLE.arrays["x"]}}).at("b")
    assert step.inputs["b.in"][0] == 2
    with pytest.raises(KeyError):
        Walk(model, SAMPLE).at("z")

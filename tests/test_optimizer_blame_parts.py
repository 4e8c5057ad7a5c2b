"""The search for the optimizers that make a difference, on differences that are known beforehand."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from cp_debug.bisect.optimizer_blame import Culprit, OptimizerBlame, Rewrite, _OptimizerSearch


class Known(_OptimizerSearch):
    """Optimizers that make known differences, which add up; the first of a pair in ``hidden`` lets the second work."""

    def __init__(self, makes: Mapping[str, float], floor: float = 0.0, hidden: Mapping[str, str] = {}) -> None:
        self._makes, self._floor, self._hidden = makes, floor, hidden
        self._seen = {}
        self._backend: Any = SimpleNamespace(level="all", spec="ort-all")
        self._programs: Any = [SimpleNamespace(name="net")]

    def _difference(self, disabled: frozenset[str], level: str | None = None) -> float:
        known = {"basic": 0.0, "extended": 0.25}.get(level or "all")
        found = sum(d for name, d in self._makes.items() if name not in disabled) if known is None else known
        return self._seen.setdefault((level or "all", disabled), found)

    def _active(self, disabled: Collection[str]) -> list[str]:
        shown = [name for name in self._makes if name not in self._hidden or self._hidden[name] in disabled]
        return [name for name in shown if name not in disabled]

    def _replacements(self, program: Any, disabled: Collection[str]) -> list[Any]:
        return [
            SimpleNamespace(original=(f"{name}-node",), operators=(name,))
            for name in self._makes
            if name not in disabled
        ]


def test_those_that_make_the_difference_are_named_with_it_the_largest_first() -> None:
    found = Known({"tiny": 0.001, "large": 0.6, "larger": 0.7}).run()
    assert [(c.optimizer, c.difference) for c in found.responsible] == [
        ("larger", pytest.approx(0.701)), ("large", pytest.approx(0.601)),
    ]  # fmt: skip
    assert found.difference_with == pytest.approx(1.301)
    assert found.difference_without == pytest.approx(0.001)
    assert found.level == "extended"
    assert found.active == ["tiny", "large", "larger"]
    assert found.responsible[0].rewrites == (Rewrite("net", ("larger-node",), ("larger",)),)
    assert found.nodes == ["larger-node", "large-node"]
    assert found.runs > 4


def test_nothing_is_searched_up_to_the_noise_floor() -> None:
    found = Known({"a": 0.5}, floor=0.5).run()
    assert (found.responsible, found.level) == ([], None)
    assert found.difference_with == found.difference_without == 0.5
    found = Known({"a": 0.5}, floor=0.2).run()
    assert [c.optimizer for c in found.responsible] == ["a"]
    assert found.level == "extended"


def test_what_remains_may_be_a_hundredth_of_the_whole_or_the_noise_floor() -> None:
    assert [c.optimizer for c in Known({"a": 1.0, "b": 0.009}).run().responsible] == ["a"]
    assert len(Known({"a": 1.0, "b": 0.02}).run().responsible) == 2
    assert [c.optimizer for c in Known({"a": 1.0, "b": 0.02}, floor=0.1).run().responsible] == ["a"]


def test_optimizers_that_had_nothing_left_to_do_are_tried_once_others_are_disabled() -> None:
    found = Known({"first": 0.5, "second": 0.5}, hidden={"second": "first"}).run()
    assert sorted(c.optimizer for c in found.responsible) == ["first", "second"]
    assert found.active == ["first"]


def test_nobody_is_responsible_where_the_difference_stays() -> None:
    class Stays(Known):
        def _difference(self, disabled: frozenset[str], level: str | None = None) -> float:
            return 0.3

    found = Stays({"a": 0.3}).run()
    assert found.responsible == []
    assert found.difference_without == 0.3


def test_nodes_are_told_once() -> None:
    culprits = [Culprit(name, 1.0, (Rewrite("net", ("n", name), ("op",)),)) for name in "ab"]
    found = OptimizerBlame("all", 1.0, 0.0, culprits)
    assert found.nodes == ["n", "a", "b"]
    assert found.derived() == {"responsible": ["a", "b"], "nodes": ["n", "a", "b"]}

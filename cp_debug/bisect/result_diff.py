"""Difference of two results: of yesterday's engine and today's, of two versions of a runtime, around a fix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cp_debug.bisect.result import DIVERGENT, GUILTY, INHERITED, OK, SHAPE, BisectResult, LayerRow, TestResult
from cp_debug.display import Shown
from cp_debug.errors import InputError
from cp_debug.serialize import JsonForm

SCHEMA = "cpdebug.diff/1"
FACTOR = 2.0
"""Smallest factor between two errors of a layer that is told: noise of atomics and of other tactics is below it."""
WORSE, BETTER, NEW, GONE = "worse", "better", "new", "gone"
_RANKS = (OK, INHERITED, DIVERGENT, SHAPE, GUILTY)


@dataclass
class LayerState:
    """Figures of one layer, or of one final output, in one of the two results."""

    verdict: str
    within: bool
    rel_l2: float
    introduced: float | None
    excess: float | None

    @classmethod
    def of(cls, row: LayerRow) -> LayerState:
        """The figures of a row of a result."""
        replay = row.replay
        return cls(
            row.verdict,
            row.within,
            row.stats.rel_l2,
            replay.introduced if replay else None,
            replay.excess if replay else None,
        )

    @property
    def error(self) -> float:
        """Relative L2 of the error that the layer introduced, where it was replayed; else of its divergence."""
        figure = self.rel_l2 if self.introduced is None else self.introduced
        return math.inf if math.isnan(figure) else figure


@dataclass
class LayerChange:
    """A layer, or a final output, that is not as it was."""

    component: str
    name: str
    op: str
    change: str
    """``worse``, ``better``, ``new`` (only after) or ``gone`` (only before)."""
    before: LayerState | None
    after: LayerState | None

    @property
    def weight(self) -> tuple[float, ...]:
        """Sort key, most important first: changed verdicts before changed numbers, then the larger error."""
        states = [state for state in (self.before, self.after) if state is not None]
        ranks = [_RANKS.index(state.verdict) for state in states]
        changed = len(set(ranks)) > 1 or len(states) == 1
        return (-float(changed), -max(ranks), -max(state.error for state in states))


@dataclass
class TestDiff(JsonForm):
    """One test backend in both results."""

    __test__ = False  # not a test, whatever its name tells pytest

    before: str
    """Spec of the backend."""
    after: str
    agrees: tuple[bool, bool]
    """Whether it agreed with the reference before, and after."""
    layers: list[LayerChange]
    outputs: list[LayerChange]
    """Final outputs whose verdict or error is another."""
    new_causes: list[str]
    gone_causes: list[str]
    same: int
    """Number of layers that are as they were."""

    @property
    def worse(self) -> bool:
        """Whether it agreed and no longer does, a layer became guilty, or an output left its tolerance."""
        guilty = [c for c in self.layers if c.change in (WORSE, NEW) and c.after and c.after.verdict == GUILTY]
        lost = [c for c in self.outputs if c.change == GONE or (c.change == WORSE and c.after and not c.after.within)]
        was_guilty = [c for c in guilty if c.before is not None and c.before.verdict == GUILTY]
        return self.agrees == (True, False) or len(guilty) > len(was_guilty) or bool(lost)

    @property
    def says(self) -> str:
        """The difference in a sentence."""
        counts = {kind: sum(c.change == kind for c in self.layers) for kind in (WORSE, BETTER, NEW, GONE)}
        parts = [f"{count} {kind}" for kind, count in counts.items() if count]
        words = {(True, True): "agrees as before", (True, False): "no longer agrees", (False, True): "agrees now"}
        verdict = words.get(self.agrees, "still does not agree")
        return f"{verdict}; layers: {', '.join(parts) or 'none changed'}, {self.same} as before"

    def derived(self) -> dict[str, Any]:
        """Whether the test got worse, and the difference in a sentence."""
        return {"worse": self.worse, "says": self.says}


@dataclass(repr=False)
class ResultDiff(JsonForm, Shown):
    """Two results, test by test."""

    model: str
    before: str
    """Model of the first result; files and folders as the user named them belong to whoever shows it."""
    after: str
    tests: list[TestDiff]
    factor: float
    notes: list[str] = field(default_factory=list)

    @property
    def worse(self) -> bool:
        """Whether any test got worse."""
        return any(test.worse for test in self.tests)

    def derived(self) -> dict[str, Any]:
        """The schema, and whether any test got worse."""
        return {"schema": SCHEMA, "worse": self.worse}


def diff_results(before: BisectResult, after: BisectResult, *, factor: float = FACTOR) -> ResultDiff:
    """The layers, outputs and causes in which two results differ; backends are paired by their specs.

    Where each result has one test, they are compared whatever they are called. A number counts as changed from
    ``factor`` on, for layers that are beyond what their precision explains in either result. Raises InputError where no
    backend or no layer is in both.
    """
    for side, result in (("before", before), ("after", after)):
        if isinstance(result, str | Path):
            raise InputError(f"{side}: a path; expected a result, as open_result({str(result)!r}) reads it")
        if not isinstance(result, BisectResult):
            raise InputError(f"{side}: {type(result).__name__}; expected a result, as diagnose or open_result give it")
    pairs = _pairs(before, after)
    if not pairs:
        names = [", ".join(test.backend.spec for test in result.tests) for result in (before, after)]
        raise InputError(f"no backend is in both results: {names[0]} against {names[1]}")
    tests = [_test(a, b, factor) for a, b in pairs]
    if not any(test.same or any(c.before and c.after for c in test.layers) for test in tests):
        raise InputError(f"no layer is in both results, of {before.model} and of {after.model}")
    return ResultDiff(after.model, before.model, after.model, tests, factor, list(_notes(before, after, pairs)))


def _pairs(before: BisectResult, after: BisectResult) -> list[tuple[TestResult, TestResult]]:
    by_spec = {test.backend.spec: test for test in after.tests}
    pairs = [(test, by_spec[test.backend.spec]) for test in before.tests if test.backend.spec in by_spec]
    if not pairs and len(before.tests) == len(after.tests) == 1:
        return [(before.tests[0], after.tests[0])]
    return pairs


def _notes(before: BisectResult, after: BisectResult, pairs: Sequence[tuple[TestResult, TestResult]]) -> Iterator[str]:
    if before.model != after.model:
        yield f"the models are called differently: {before.model}, {after.model}"
    if before.samples != after.samples:
        yield "the samples are others, so numbers may differ for that reason alone"
    if before.reference.spec != after.reference.spec:
        yield f"the references differ: {before.reference.spec}, {after.reference.spec}"
    for a, b in pairs:
        yield from (
            f"{b.backend.spec}: {name} was {version}, is {b.backend.versions[name]}"
            for name, version in a.backend.versions.items()
            if b.backend.versions.get(name, version) != version
        )
    for side, result, place in (("before", before, 0), ("after", after, 1)):
        paired = [pair[place] for pair in pairs]
        alone = [test.backend.spec for test in result.tests if not any(test is each for each in paired)]
        if alone:
            yield f"only {side}: {', '.join(alone)}"


def _test(before: TestResult, after: TestResult, factor: float) -> TestDiff:
    layers, same = _changes(before.rows, after.rows, factor)
    outputs, _ = _changes(before.outputs, after.outputs, factor)
    causes = [
        {(finding.cause, *sorted(finding.layers)): finding.headline for finding in test.findings}
        for test in (before, after)
    ]
    return TestDiff(
        before.backend.spec,
        after.backend.spec,
        (before.agrees, after.agrees),
        layers,
        outputs,
        [text for key, text in causes[1].items() if key not in causes[0]],
        [text for key, text in causes[0].items() if key not in causes[1]],
        same,
    )


def _changes(before: Sequence[LayerRow], after: Sequence[LayerRow], factor: float) -> tuple[list[LayerChange], int]:
    """The rows that differ, most important first, and how many do not."""
    matched = dict(_matched(before, after))
    changes, same = [], 0
    for index, row in enumerate(before):
        other = after[matched[index]] if index in matched else None
        states = LayerState.of(row), LayerState.of(other) if other else None
        change = GONE if states[1] is None else _change(states[0], states[1], factor)
        same += not change
        if change:
            shown = other or row
            changes.append(LayerChange(shown.component, shown.name, shown.op, change, *states))
    taken = set(matched.values())
    changes += [
        LayerChange(row.component, row.name, row.op, NEW, None, LayerState.of(row))
        for index, row in enumerate(after)
        if index not in taken
    ]
    return sorted(changes, key=lambda change: change.weight), same


def _matched(before: Sequence[LayerRow], after: Sequence[LayerRow]) -> Iterator[tuple[int, int]]:
    """Places of rows about the same value: by its name in the graph, else by the layer's name where that is unique."""
    left = set(range(len(before)))
    right = dict(enumerate(after))
    for key in (lambda row: (row.component, row.onnx), lambda row: (row.component, row.name, row.op)):
        places: dict[Any, list[int]] = {}
        for index, row in right.items():
            places.setdefault(key(row), []).append(index)
        for index in sorted(left):
            candidates = places.get(key(before[index]), [])
            if len(candidates) == 1 and candidates[0] in right:
                yield index, candidates[0]
                left.discard(index)
                del right[candidates[0]]


def _change(before: LayerState, after: LayerState, factor: float) -> str:
    ranks = _RANKS.index(before.verdict), _RANKS.index(after.verdict)
    if ranks[0] != ranks[1]:
        return WORSE if ranks[1] > ranks[0] else BETTER
    if before.within != after.within:
        return BETTER if after.within else WORSE
    if all(state.within and (state.excess is None or state.excess <= 1) for state in (before, after)):
        return ""  # rounding, however it is done
    low, high = sorted((before.error, after.error))
    if high == low or high < factor * low:
        return ""
    return WORSE if after.error > before.error else BETTER

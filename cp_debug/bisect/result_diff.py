"""Difference of two results: of yesterday's engine and today's, of two versions of a runtime, around a fix.

Its basis is told as well: which of their components belong together, and what else is not the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cp_debug.bisect.result import DIVERGENT, GUILTY, INHERITED, OK, SHAPE, BisectResult, LayerRow, TestResult
from cp_debug.display import Shown
from cp_debug.errors import InputError
from cp_debug.safe_text import amount
from cp_debug.serialize import JsonForm

SCHEMA = "cpdebug.diff/1"
FACTOR = 2.0
"""Smallest factor between two errors of a layer that is told: noise of atomics and of other tactics is below it."""
WORSE, BETTER, NEW, GONE, UNKNOWN = "worse", "better", "new", "gone", "unknown"
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
        return self.error_as(self.replayed)

    def error_as(self, replayed: bool) -> float:
        """``error``, or without ``replayed`` the relative L2 of the divergence; infinite for NaN."""
        figure = self.rel_l2 if self.introduced is None or not replayed else self.introduced
        return math.inf if math.isnan(figure) else figure

    @property
    def replayed(self) -> bool:
        """Whether a replay judged it; else nobody knows what the layer introduced."""
        return self.introduced is not None or self.verdict in (GUILTY, INHERITED)


@dataclass
class LayerChange:
    """A layer, or a final output, that is not as it was."""

    component: str
    name: str
    op: str
    change: str
    """``worse``, ``better``, ``new`` (only after), ``gone`` (only before); ``unknown``: guilty in one result, and not
    replayed in the other."""
    before: LayerState | None
    after: LayerState | None
    onnx: str = ""
    """Name of the value in the graph."""

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

    derives = ("worse", "says")
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
    replayed: tuple[bool, bool] = (True, True)
    """Whether any layer was replayed before, and after."""

    @property
    def worse(self) -> bool:
        """Whether it agreed and no longer does, or there is another of the ``reasons``."""
        return self.agrees == (True, False) or bool(self.reasons)

    @property
    def reasons(self) -> list[str]:
        """Reasons besides the verdict why it is worse: layers that became guilty, outputs gone or farther off."""
        said = []
        for change in self.layers:
            guilty = change.change in (WORSE, NEW) and change.after is not None and change.after.verdict == GUILTY
            if guilty and (change.before is None or change.before.verdict != GUILTY):
                said.append(f"layer {change.name} {'is new and' if change.before is None else 'became'} guilty")
        if (more := len(said) - 3) > 0:
            said[3:] = [f"so did {amount(more, 'other layer')}"]
        for change in self.outputs:
            if change.change == GONE:
                said.append(f"output {change.onnx} is gone")
            elif change.change == WORSE and change.after and not change.after.within:
                left = change.before is not None and change.before.within
                said.append(f"output {change.onnx} {'left its tolerance' if left else 'is further off'}")
        return said

    @property
    def says(self) -> str:
        """The difference in a sentence."""
        counts = {kind: sum(c.change == kind for c in self.layers) for kind in (WORSE, BETTER, NEW, GONE, UNKNOWN)}
        parts = [f"{count} {kind}" for kind, count in counts.items() if count]
        words = {(True, True): "agrees as before", (True, False): "no longer agrees", (False, True): "agrees now"}
        verdict = words.get(self.agrees, "still does not agree")
        unsure = {(True, False, False): "before", (False, True, True): "after"}  # agreed, agrees, replayed before
        side = unsure.get((*self.agrees, self.replayed[0])) if self.replayed[0] != self.replayed[1] else None
        aside = f" (nothing was replayed {side})" if side else ""
        why = f", but {', '.join(self.reasons)}" if self.reasons and self.agrees[1] else ""
        why = f": {', '.join(self.reasons)}" if self.reasons and not self.agrees[1] else why
        return f"{verdict}{aside}{why}; layers: {', '.join(parts) or 'none changed'}, {self.same} as before"


@dataclass(repr=False)
class ResultDiff(JsonForm, Shown):
    """Two results, test by test."""

    schema = SCHEMA
    derives = ("schema", "worse")
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


def diff_results(before: BisectResult, after: BisectResult, *, factor: float = FACTOR) -> ResultDiff:
    """The layers, outputs and causes in which two results differ; backends are paired by their specs.

    Where each result has one test, or one component, these are compared whatever they are called. A number counts as
    changed from ``factor`` on, for layers that are beyond what their precision explains in either result. Raises
    InputError where no backend or no layer is in both.
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
    components = [_paired_components(a, b) for a, b in pairs]
    tests = [_test(a, b, names, factor) for (a, b), names in zip(pairs, components, strict=True)]
    if not any(test.same or any(c.before and c.after for c in test.layers) for test in tests):
        raise InputError(f"no layer is in both results, of {before.model} and of {after.model}")
    return ResultDiff(
        after.model, before.model, after.model, tests, factor, list(_result_notes(before, after, pairs, components))
    )


def _pairs(before: BisectResult, after: BisectResult) -> list[tuple[TestResult, TestResult]]:
    by_spec = {test.backend.spec.partition(" (")[0]: test for test in after.tests}
    specs = [(test, test.backend.spec.partition(" (")[0]) for test in before.tests]
    pairs = [(test, by_spec[spec]) for test, spec in specs if spec in by_spec]
    if not pairs and len(before.tests) == len(after.tests) == 1:
        return [(before.tests[0], after.tests[0])]
    return pairs


def _test(before: TestResult, after: TestResult, components: Mapping[str, str], factor: float) -> TestDiff:
    layers, same = _changes(before.rows, after.rows, components, factor)
    outputs, _ = _changes(before.outputs, after.outputs, components, factor)
    causes = [
        {(finding.cause, *sorted(finding.layers)): finding.headline for finding in test.findings}
        for test in (before, after)
    ]
    replayed = _was_replayed(before), _was_replayed(after)
    return TestDiff(
        before.backend.spec,
        after.backend.spec,
        (before.agrees, after.agrees),
        layers,
        outputs,
        [text for key, text in causes[1].items() if key not in causes[0]] if replayed[0] else [],
        [text for key, text in causes[0].items() if key not in causes[1]] if replayed[1] else [],
        same,
        replayed,
    )


def _changes(
    before: Sequence[LayerRow], after: Sequence[LayerRow], components: Mapping[str, str], factor: float
) -> tuple[list[LayerChange], int]:
    """The rows that differ, most important first, and how many do not. ``components``: before → after."""
    matched = dict(_matched(before, after, components))
    changes, same = [], 0
    for index, row in enumerate(before):
        other = after[matched[index]] if index in matched else None
        states = LayerState.of(row), LayerState.of(other) if other else None
        change = GONE if states[1] is None else _change(states[0], states[1], factor)
        same += not change
        if change:
            shown = other or row
            changes.append(LayerChange(shown.component, shown.name, shown.op, change, *states, shown.onnx))
    taken = set(matched.values())
    changes += [
        LayerChange(row.component, row.name, row.op, NEW, None, LayerState.of(row), row.onnx)
        for index, row in enumerate(after)
        if index not in taken
    ]
    return sorted(changes, key=lambda change: change.weight), same


def _matched(
    before: Sequence[LayerRow], after: Sequence[LayerRow], components: Mapping[str, str]
) -> Iterator[tuple[int, int]]:
    """Places of rows about the same value: by its name in the graph, else by the layer's name where that is unique."""
    before = [replace(row, component=components.get(row.component, f"before/{row.component}")) for row in before]
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
    replayed = before.replayed and after.replayed
    if before.replayed != after.replayed:
        verdicts = {before.verdict, after.verdict}
        if GUILTY in verdicts and verdicts & {OK, DIVERGENT}:
            return UNKNOWN
        before, after = _not_replayed(before), _not_replayed(after)
    ranks = _RANKS.index(before.verdict), _RANKS.index(after.verdict)
    if ranks[0] != ranks[1]:
        return WORSE if ranks[1] > ranks[0] else BETTER
    if before.within != after.within:
        return BETTER if after.within else WORSE
    if all(state.within and (state.excess is None or state.excess <= 1) for state in (before, after)):
        return ""  # rounding, however it is done
    errors = before.error_as(replayed), after.error_as(replayed)
    low, high = sorted(errors)
    if high == low or high < factor * low:
        return ""
    return WORSE if errors[1] > errors[0] else BETTER


def _not_replayed(state: LayerState) -> LayerState:
    """The state as it is without a replay."""
    verdict = state.verdict if state.verdict == SHAPE else OK if state.within else DIVERGENT
    return replace(state, verdict=verdict, introduced=None, excess=None)


Pairs = Sequence[tuple[TestResult, TestResult]]


def _was_replayed(test: TestResult) -> bool:
    """Whether any layer of a test was replayed."""
    return any(row.replay is not None and row.replay.skipped is None for row in test.rows)


def _paired_components(before: TestResult, after: TestResult) -> dict[str, str]:
    """Component before → after. A file's component has the file's name, so names alone do not decide.

    One of each are a pair. Of several those of equal names are, then those that share most of their values, unless
    another shares as many.
    """
    ours, theirs = _values(before), _values(after)
    if len(ours) == len(theirs) == 1:
        return {next(iter(ours)): next(iter(theirs))}
    pairs = {name: name for name in ours if name in theirs}
    left = [name for name in ours if name not in pairs]
    right = [name for name in theirs if name not in pairs]
    shares = {(a, b): len(ours[a] & theirs[b]) / len(ours[a] | theirs[b]) for a in left for b in right}
    while shares and (most := max(shares.values())) > 0:
        best = [pair for pair, share in shares.items() if share == most]
        for a, b in best:
            if sum(a == other or b == another for other, another in best) == 1:
                pairs[a] = b
        taken = {name for pair in best for name in pair}  # those that are as close to several stay alone
        shares = {(a, b): share for (a, b), share in shares.items() if not {a, b} & taken}
    return pairs


def _values(test: TestResult) -> dict[str, set[str]]:
    """Component → names of its values."""
    values: dict[str, set[str]] = {}
    for row in test.rows:
        values.setdefault(row.component, set()).add(row.onnx)
    return values


def _result_notes(
    before: BisectResult, after: BisectResult, pairs: Pairs, components: Sequence[Mapping[str, str]]
) -> Iterator[str]:
    """Sentences about what may make numbers differ besides the layers, and about what was not compared.

    ``pairs``: tests before and after; ``components``: those of each pair, by ``_paired_components``.
    """
    yield from _models(before, after, pairs)
    yield from _components(pairs, components)
    if before.samples != after.samples:
        yield "the samples are different, so numbers may differ for that reason alone"
    elif before.inputs and after.inputs and before.inputs != after.inputs:
        yield "the samples have other values under the same names, so numbers may differ for that reason alone"
    if before.reference.spec != after.reference.spec:
        yield f"the references differ: {before.reference.spec}, {after.reference.spec}"
    yield from dict.fromkeys(
        f"{b.spec}: {name} was {version}, is {b.versions[name]}"
        for a, b in [(before.reference, after.reference), *((a.backend, b.backend) for a, b in pairs)]
        for name, version in a.versions.items()
        if b.versions.get(name, version) != version
    )
    for a, b in pairs:
        if _was_replayed(a) != _was_replayed(b):
            side = "after" if _was_replayed(a) else "before"
            yield (
                f"{b.backend.spec}: {side}, no layer was replayed, so introduced errors and causes are unknown: layers "
                "are compared by their divergence only"
            )
    for side, result, place in (("before", before, 0), ("after", after, 1)):
        paired = [pair[place] for pair in pairs]
        alone = [test.backend.spec for test in result.tests if not any(test is each for each in paired)]
        if alone:
            yield f"only {side}: {', '.join(alone)}"


def _models(before: BisectResult, after: BisectResult, pairs: Pairs) -> Iterator[str]:
    """Other names of the models, and other content under the same name."""
    if before.model != after.model:
        yield f"the models have different names: {before.model}, {after.model}"
    changed = _other(before.model_sha256, after.model_sha256)
    if changed and before.model == after.model:
        yield f"{after.model} has changed: its graph or its weights differ ({changed})"
    elif changed:
        yield f"the models are not the same network: graph or weights differ ({changed})"
    elif before.model != after.model and before.model_sha256 and before.model_sha256 == after.model_sha256:
        yield "the models are the same network: graphs and weights are equal"
    if before.test_model != after.test_model:
        names = [result.test_model or result.model for result in (before, after)]
        yield f"the models of the tests have different names: {names[0]}, {names[1]}"
    for a, b in pairs:
        other = _other(a.model_sha256, b.model_sha256)
        if other and other != changed:
            name = after.test_model or after.model
            yield f"{b.backend.spec} ran another network than before: graph or weights of {name} differ ({other})"


def _other(before: str, after: str) -> str:
    """Both SHA-256, shortened; empty where they are equal or one is not known."""
    return f"SHA-256 {before[:12]}, {after[:12]}" if before and after and before != after else ""


def _components(pairs: Pairs, components: Sequence[Mapping[str, str]]) -> Iterator[str]:
    paired = {(a, b): len(names) == 1 for names in components for a, b in names.items() if a != b}
    for only, how in ((True, ", because each result has only one"), (False, ", by the values they share")):
        if named := [f"{a} = {b}" for (a, b), alone in paired.items() if alone == only]:
            yield f"components paired: {', '.join(named)}{how}"
    for place, side in enumerate(("before", "after")):
        alone = dict.fromkeys(
            row.component
            for pair, names in zip(pairs, components, strict=True)
            for row in pair[place].rows
            if row.component not in (names.values() if place else names)
        )
        if alone:
            noun = amount(len(alone), "component").split(" ", 1)[1]
            yield f"{noun} only {side}: {', '.join(alone)}"

"""Basis of a difference of two results: which of their components belong together, and what else is not the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from cp_debug.backends.base import RunRecord
from cp_debug.bisect.result import BisectResult, TestResult
from cp_debug.safe_text import amount

Pairs = Sequence[tuple[TestResult, TestResult]]


def was_replayed(test: TestResult) -> bool:
    """Whether any layer of a test was replayed."""
    return any(row.replay is not None and row.replay.skipped is None for row in test.rows)


def paired_components(before: TestResult, after: TestResult) -> dict[str, str]:
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


def result_notes(
    before: BisectResult, after: BisectResult, pairs: Pairs, components: Sequence[Mapping[str, str]]
) -> Iterator[str]:
    """Sentences about what may make numbers differ besides the layers, and about what was not compared.

    ``pairs``: tests before and after; ``components``: those of each pair, by ``paired_components``.
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
        text for a, b in [(before.reference, after.reference), *_records(pairs)] for text in _versions(a, b)
    )
    for a, b in pairs:
        if was_replayed(a) != was_replayed(b):
            side = "after" if was_replayed(a) else "before"
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


def _records(pairs: Pairs) -> list[tuple[RunRecord, RunRecord]]:
    return [(a.backend, b.backend) for a, b in pairs]


def _versions(before: RunRecord, after: RunRecord) -> Iterator[str]:
    for name, version in before.versions.items():
        if after.versions.get(name, version) != version:
            yield f"{after.spec}: {name} was {version}, is {after.versions[name]}"

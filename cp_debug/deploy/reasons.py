"""Reasons in words why a verification failed."""

from __future__ import annotations

from collections.abc import Iterator

from cp_debug.deploy.verify import ScenarioResult
from cp_debug.graph.pairing import places


def reasons(scenario: ScenarioResult) -> Iterator[str]:
    """Phrases for missing and moved outputs, the worst tensor, the voxels, the guilty layer and its cause."""
    if missing := scenario.missing:
        yield f"the test lacks output{'s' * (len(missing) > 1)} {', '.join(missing)} of the reference"
    if scenario.moved:
        yield f"the outputs are in another order: {places(scenario.moved)}"
    if failures := scenario.failures:
        worst = max(failures, key=lambda check: check.severity)
        yield f"{len(failures)} of {len(scenario.checks)} outputs fail, the worst is {worst.name}: {worst.why}"
        ours = worst.stats.nan_ref + worst.stats.inf_ref
        if ours and not worst.stats.mismatched:
            yield f"the reference has the same {ours} NaN or Inf: they come from the model or its input"
    wrong = [change for change in scenario.preprocessing.values() if not change.agrees]
    if wrong:
        yield f"the voxels differ: {wrong[0]}"
    yield from culprits(scenario)


def culprits(scenario: ScenarioResult) -> Iterator[str]:
    """Phrases for the guilty layer and the cause that explains most, where the failure was bisected."""
    for test in scenario.bisect.tests if scenario.bisect else ():
        if test.first_divergent is not None:
            verdict = "guilty" if test.guilty else "first divergent"
            yield f"{verdict} layer {test.first_divergent.name}"
        if test.findings:
            yield f"cause: {test.findings[0].headline}"

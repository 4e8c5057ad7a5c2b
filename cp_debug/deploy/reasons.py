"""Why a verification failed, in words."""

from __future__ import annotations

from collections.abc import Iterator

from cp_debug.deploy.verify import ScenarioResult


def reasons(scenario: ScenarioResult) -> Iterator[str]:
    """The worst tensor, the voxels, the guilty layer and its cause."""
    if failures := scenario.failures:
        worst = max(failures, key=lambda check: check.severity)
        yield f"{len(failures)} of {len(scenario.checks)} outputs fail, the worst is {worst.name}: {worst.why}"
        ours = worst.stats.nan_ref + worst.stats.inf_ref
        if ours and not worst.stats.mismatched:
            yield f"the reference has the same {ours} NaN or Inf: they are the model's or its input's, not the export's"
    wrong = [change for change in scenario.preprocessing.values() if not change.agrees]
    if wrong:
        yield f"the voxels differ: {wrong[0]}"
    yield from culprits(scenario)


def culprits(scenario: ScenarioResult) -> Iterator[str]:
    """The guilty layer and the cause that explains most, for what was bisected."""
    for test in scenario.bisect.tests if scenario.bisect else ():
        if test.first_divergent is not None:
            what = "guilty" if test.guilty else "first divergent"
            yield f"{what} layer {test.first_divergent.name}"
        if test.findings:
            yield f"cause: {test.findings[0].headline}"

"""A result in a few lines of plain text: what ``print`` shows, and what a failed test says."""

from __future__ import annotations

from collections.abc import Iterator

from cp_debug.bisect.result import BisectResult, TestResult
from cp_debug.reports.causes import lines
from cp_debug.reports.tables import verdict_line
from cp_debug.safe_text import one_line

MOST_FINDINGS = 3
"""Findings that are told of one test; the others are counted."""


def summary(result: BisectResult) -> str:
    """The model, the verdict on each test, and of its findings the largest: cause, effect and fix."""
    tests = ", ".join(test.backend.spec for test in result.tests)
    text = [f"{result.model}: {result.reference.spec} against {tests}"]
    for test in result.tests:
        text += _test(test)
    return "\n".join(map(one_line, text))


def _test(test: TestResult) -> Iterator[str]:
    yield verdict_line(test).plain
    for finding in test.findings[:MOST_FINDINGS]:
        yield f"  {finding.headline}"
        labelled = dict(lines(finding))
        yield from (f"    {label}: {labelled[label]}" for label in ("effect", "fix") if label in labelled)
    if len(test.findings) > MOST_FINDINGS:
        yield f"  and {len(test.findings) - MOST_FINDINGS} more findings"
    if test.detections is not None:
        yield f"  detections: {test.detections}"

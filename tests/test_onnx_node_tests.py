"""ONNX's own operator tests: every one runs and agrees, or is refused by name; the counts are held."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from operators import node_tests, outcomes

EXPECTED = {"kernel": 1487, "reference": 391, "random": 6}
"""Outcome → tests of onnx 1.23.2: ``docs/operators.md``."""


def test_a_sample_agrees() -> None:
    found = list(outcomes(node_tests()[::40]))
    assert len(found) > 40
    assert [o for o in found if o.outcome in ("differs", "refused")] == []


@pytest.mark.slow
def test_the_counts_of_all() -> None:
    onnx = pytest.importorskip("onnx", minversion="1.23.2")
    if onnx.__version__ != "1.23.2":
        pytest.skip("the counts are those of onnx 1.23.2")
    found = list(outcomes(node_tests()))
    assert [o for o in found if o.outcome == "differs"] == []
    assert dict(Counter(o.outcome for o in found)) == EXPECTED

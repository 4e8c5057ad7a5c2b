"""ONNX's own operator tests: every one runs and agrees, or is refused by name; the counts are held."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from operators import node_tests, outcomes

from cp_debug.backends.kernels import KERNELS

EXPECTED = {"kernel": 1491, "reference": 387, "random": 6}
"""Outcome → tests of onnx 1.23.2: ``docs/operators.md``."""

UNTESTED = {"attention", "contrib", "integer", "paired_sums"}
"""Modules of kernels whose operators ONNX does not have, or tests only within graphs."""
MODULES = sorted({k.function.__module__.rpartition(".")[2] for k in KERNELS.values()} - UNTESTED)


@functools.cache
def by_module() -> dict[str, list[Any]]:
    """Module of kernels → the tests of one of its operators; those of graphs stand under the empty name."""
    found: dict[str, list[Any]] = {}
    for case in node_tests():
        nodes = case.model.graph.node
        kernel = KERNELS.get(nodes[0].op_type) if len(nodes) == 1 else None
        module = "" if kernel is None else kernel.function.__module__.rpartition(".")[2]
        found.setdefault(module, []).append(case)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_every_kernel_agrees(module: str) -> None:
    found = list(outcomes(by_module()[module]))
    assert len(found) >= 2
    assert [o for o in found if o.outcome not in ("kernel", "reference")] == []


@pytest.mark.slow
def test_a_sample_of_graphs_agrees() -> None:
    found = list(outcomes(by_module()[""][::20]))
    assert len(found) > 30
    assert [o for o in found if o.outcome in ("differs", "refused")] == []


@pytest.mark.slow
def test_the_counts_of_all() -> None:
    onnx = pytest.importorskip("onnx", minversion="1.23.2")
    if onnx.__version__ != "1.23.2":
        pytest.skip("the counts are those of onnx 1.23.2")
    found = list(outcomes(node_tests()))
    assert [o for o in found if o.outcome == "differs"] == []
    assert dict(Counter(o.outcome for o in found)) == EXPECTED
